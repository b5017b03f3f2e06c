// Memory that processes of one user on one host share. It has no name that a stranger could open or a killed process
// leave behind: a file without a folder, which peers reach through its creator's descriptor.
#pragma once
#include <sys/types.h>

#include <cstddef>

namespace fastagg::comm {

class Segment {
 public:
  /// A new segment, zeroed. Throws std::system_error.
  static Segment create(size_t bytes);
  /// The segment that a process of this user has created. Throws std::system_error, also if another user owns it.
  static Segment attach(pid_t creator, int descriptor, size_t bytes);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  ~Segment();

  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  int descriptor() const { return descriptor_; }
  /// For when all have attached: the memory stays until the last of them has gone.
  void close_descriptor();

 private:
  Segment(int descriptor, size_t bytes);

  int descriptor_;
  char* data_ = nullptr;
  size_t bytes_;
};

}  // namespace fastagg::comm

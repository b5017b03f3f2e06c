// Mapped files that somebody may cut short while they are read.
#pragma once
#include <cstdint>

namespace fastagg {

struct MappedRange;

/// Watches over memory that is a mapped file. To read behind the end of a file that was cut since it was mapped is
/// SIGBUS, and the end of the process. While the guard lives it gives bytes of 255 instead, which are NaN as any float,
/// and is remembered. The first guard installs a handler of SIGBUS, which hands all others to the one that was there
/// before.
class MappedFileGuard {
 public:
  /// `begin` is the mapping's first byte.
  MappedFileGuard(const void* begin, uint64_t nbytes);
  ~MappedFileGuard();
  MappedFileGuard(const MappedFileGuard&) = delete;
  MappedFileGuard& operator=(const MappedFileGuard&) = delete;

  /// Whether anything behind the file's end has been read.
  bool was_cut() const;

 private:
  MappedRange* range_;
};

}  // namespace fastagg

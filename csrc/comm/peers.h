// Who else takes part, and whether they still do.
#pragma once
#include <sys/types.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace fastagg::comm {

/// A rank, by its name, that has died, hung or left.
struct PeerLost : std::runtime_error {
  PeerLost(int rank, const std::string& what) : std::runtime_error(what), rank(rank) {}
  int rank;
};

/// A rank that was called with other operands.
struct Mismatch : std::runtime_error { using std::runtime_error::runtime_error; };

/// The processes of a group, in the order of their ranks.
class Peers {
 public:
  /// `names` are what errors call the ranks; a process 0 is not watched. Throws std::system_error.
  Peers(const std::vector<pid_t>& processes, std::vector<int> names, int rank);
  ~Peers();
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;

  int rank() const { return rank_; }
  int name(int rank) const { return names_[rank]; }
  int size() const { return static_cast<int>(descriptors_.size()); }
  /// The rank of a process that has ended, or -1. A zombie has ended.
  int ended() const;

 private:
  std::vector<int> descriptors_;  // of the processes; -1 for this one
  std::vector<int> names_;
  int rank_;
  int ended_ = -1;  // a rank whose process had gone before it could be watched
};

}  // namespace fastagg::comm

// The same-host transport: ranks exchange encoded chunks through a segment, in sizes that stay in the cache.
//
// A chunk passes three phases. *Publish*: every rank encodes its own values into its slot. *Reduce*: every rank adds up
// one slice of all ranks' slots, in rank order, and stores its mean. *Gather*: every rank decodes all the slices. Two
// slots take turns, so that ranks publish a chunk while others still read the one before. Counters tell who is how far.
#pragma once
#include <atomic>
#include <chrono>
#include <memory>

#include "core/cast.h"
#include "peers.h"
#include "segment.h"

namespace fastagg::comm {

/// Elements of a chunk: two slots a rank, and the means, fit the last-level cache.
constexpr int64_t kChunkElements = 128 << 10;
/// Up to so many elements every rank reduces all of them itself: one wait instead of two.
constexpr int64_t kOneShotElements = 16 << 10;

/// One all-reduce; every rank must name the same but for `data` and `rank`.
struct AllReduce {
  void* data;  // in place
  Code code;   // of the data
  int64_t count;
  Code wire;
  uint8_t block_shift;
  Rounding rounding;
  RandomKey key;
  bool mean;
};

struct Outcome {
  bool finite;         // the result
  int64_t wire_bytes;  // encoded, scales included, that this rank handed to others
};

class SharedMemory {
 public:
  using Clock = std::chrono::steady_clock;

  /// Bytes of the segment that a group of so many ranks needs.
  static size_t bytes(int ranks);

  SharedMemory(std::shared_ptr<Segment> segment, const std::vector<pid_t>& processes, std::vector<int> names, int rank);

  /// Sums or averages in place. Throws PeerLost (from then on at every call) or Mismatch.
  Outcome all_reduce(const AllReduce& operation, std::chrono::nanoseconds timeout);

  Segment& segment() { return *segment_; }

 private:
  struct Member;
  struct Slot;

  Member& member(int rank) const;
  Slot slot(int rank, uint64_t chunk) const;
  Slot means(uint64_t chunk) const;

  void publish(const AllReduce& operation, int64_t begin, int64_t end, uint64_t chunk);
  void reduce(const AllReduce& operation, int64_t begin, int64_t end, uint64_t chunk);
  bool reduce_alone(const AllReduce& operation, uint64_t chunk);
  bool gather(const AllReduce& operation, int64_t begin, int64_t end, uint64_t chunk);
  bool add_up(const AllReduce& operation, uint64_t chunk, int64_t count, int64_t begin, int64_t end, Code code,
              void* out) const;

  int64_t handed_bytes(const AllReduce& operation, int64_t count, bool alone) const;
  void announce(const AllReduce& operation);
  void compare(const AllReduce& operation);

  using Counter = std::atomic<uint64_t> Member::*;
  void wait_for_all(Counter counter, uint64_t value);
  void wait_for(int peer, Counter counter, uint64_t value);
  [[noreturn]] void give_up(int peer, const std::string& reason);
  int culprit(int peer) const;

  std::shared_ptr<Segment> segment_;
  Peers peers_;
  std::vector<float> sums_;
  std::vector<double> ones_;
  Clock::time_point deadline_;
  uint64_t calls_ = 0, chunks_ = 0;  // exchanged so far, the same on every rank
};

}  // namespace fastagg::comm

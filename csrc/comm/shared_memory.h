// The same-host transport: ranks exchange encoded chunks through a segment, in sizes that stay in the cache.
//
// Every rank owns one slice of the elements. A chunk is a piece of every slice, and passes three phases. *Publish*:
// each rank encodes its own values into its slot. *Reduce*: each rank adds up the pieces of its slice from all slots,
// in rank order, and encodes their mean. *Gather*: each rank decodes all the means. Phases of neighbouring chunks
// alternate, and three slots take turns, so that a rank which is a phase behind keeps nobody waiting. Counters tell who
// is how far. Two ranks, and few elements, are served in *one shot*: each rank reduces all that has been published.
#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>

#include "core/exchange.h"
#include "core/reduce.h"
#include "peers.h"
#include "segment.h"

namespace fastagg::comm {

/// Elements of a chunk: the slots of a few ranks, and of the means, fit the last-level cache.
constexpr int64_t kChunkElements = 128 << 10;
constexpr int64_t kSlots = 3;
/// Bytes of a call's description, the last one zero.
constexpr size_t kDescriptionBytes = 256;

/// One exchange, with what the ranks compare before a value is written.
struct Exchange : fastagg::Exchange {
  std::string description;  // of all that must be equal on all ranks; errors show it
};

struct Outcome {
  bool finite;         // the result
  int64_t wire_bytes;  // encoded, scales included, that this rank handed to others
  double squares;      // of the result, if wanted
};

/// How long a call waits for others.
struct Patience {
  std::chrono::nanoseconds timeout;
  std::function<bool()> is_interrupted;  // asked ten times a second: the user wants to leave
};

class SharedMemory {
 public:
  using Clock = std::chrono::steady_clock;

  /// Bytes of the segment that a group of so many ranks needs.
  static size_t bytes(int ranks);

  SharedMemory(std::shared_ptr<Segment> segment, const std::vector<pid_t>& processes, std::vector<int> names, int rank);

  // All throw PeerLost (from then on at every call), which names this rank if it was interrupted, or Mismatch.

  /// Sums or averages in place.
  Outcome all_reduce(const Exchange& exchange, const Patience& patience);
  /// The same, but each rank's slice alone holds the result; the rest is left as it is.
  Outcome reduce_scatter(const Exchange& exchange, const Patience& patience);
  /// Copies each rank's slice to all ranks.
  Outcome all_gather(const Exchange& exchange, const Patience& patience);
  /// Copies one rank's bytes to all.
  void broadcast(void* data, int64_t bytes, int root, const std::string& description, const Patience& patience);

  /// All ranks will throw PeerLost that names this one, which may be on another host; or the one that is returned, of
  /// which they were told before.
  int tell_lost(int name);
  /// Ends the wait of another thread, and every later one: this rank is lost to the others.
  void interrupt();

  Segment& segment() { return *segment_; }

 private:
  struct Member;
  struct Piece;
  enum class Phases : int32_t { all_reduce, one_shot, reduce_scatter, all_gather, broadcast };
  using Counter = std::atomic<uint64_t> Member::*;

  Member& member(int rank) const;
  Piece piece_of(const Exchange& exchange, int owner, int64_t chunk, int slot) const;
  int64_t chunks_of(const Exchange& exchange) const;

  /// All three phases; and those of the slices [first, last) alone, which are reduced where they are. Both tell whether
  /// the result is finite.
  bool share_slices(const Exchange& exchange);
  bool reduce_slices_of(const Exchange& exchange, int first, int last);
  void begin(const Exchange& exchange, Phases phases, const Patience& patience);
  void begin(const std::string& description, int64_t count, Phases phases, const Patience& patience);
  void compare(const std::string& description);
  Outcome end(const Exchange& exchange, bool finite);
  void finish(int64_t chunk, std::initializer_list<Counter> phases);

  bool reads_own_values(const Exchange& exchange) const;
  void publish(const Exchange& exchange, int64_t chunk);
  void publish_piece(const Exchange& exchange, const Piece& piece);
  void publish_slice(const Exchange& exchange, int64_t chunk);
  void reduce_to_means(const Exchange& exchange, int64_t chunk);
  bool reduce_in_place(const Exchange& exchange, int64_t chunk, int owner);
  bool add_up(const Exchange& exchange, int64_t chunk, int owner, const Cast& result, double factor, float* error);
  bool add_up_float64(const Piece& piece, double divisor, double factor, double* out);
  bool gather(const Exchange& exchange, int64_t chunk);
  bool gather_piece(const Exchange& exchange, const Piece& piece) const;
  Cast encoded_in(const Exchange& exchange, const Piece& piece, float factor, uint32_t random_rank) const;
  int64_t wire_bytes(const Exchange& exchange) const;

  /// Waits until all ranks have passed a phase of this call's first `chunks` chunks.
  void wait_for_all(Counter counter, int64_t chunks);
  void wait_for_one(int peer, Counter counter, int64_t chunks);
  void wait_for(int peer, Counter counter, uint64_t value);
  [[noreturn]] void give_up(int peer, const std::string& reason);
  int culprit(int peer) const;

  std::shared_ptr<Segment> segment_;
  Peers peers_;
  int64_t piece_elements_;
  std::vector<Source> sources_;  // of the piece that is being reduced
  const Patience* patience_;     // of this call
  Clock::time_point deadline_;   // of this call
  std::atomic<bool> interrupted_{false};
  Phases phases_;
  double* squares_ = nullptr;           // of what this rank has reduced in this call; null: not wanted
  uint64_t calls_ = 0, exchanged_ = 0;  // calls, and their chunks, before this one: the same on every rank
};

}  // namespace fastagg::comm

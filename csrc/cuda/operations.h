// The operations on a GPU: launchers that neither allocate nor wait. All memory is that of the current device.
#pragma once
#include <cuda_runtime_api.h>

#include "core/exchange.h"
#include "core/weighted_sum.h"

namespace fastagg::cuda {

/// Copies bytes, a multiple of four, from the host's memory, which may go when the call returns.
cudaError_t upload(const void* from, void* to, int64_t bytes, cudaStream_t stream) noexcept;

/// Elements of a leaf that a block of threads sums before it looks for its next task.
constexpr int64_t kTask = 1024;
/// Alignment of the widest access.
constexpr int kAlignment = 16;

/// A leaf with what every block needs to know about it.
struct TableLeaf {
  Leaf leaf;
  int64_t first_task;
  bool aligned;  // its arrays, all of them, to kAlignment
  bool scaled;   // whether blocks of a client have scales
};

/// What a leaf of `weighted_sum` asks for: a kernel each, for their registers.
enum class Part : uint8_t { sums, pairs, finite };
constexpr int kParts = 3;

FASTAGG_INLINE Part part_of(const Leaf& leaf) {
  return leaf.out == nullptr ? Part::finite : has_pairs(leaf.code) ? Part::pairs : Part::sums;
}

/// The leaves of one `weighted_sum`, in device memory with everything that they point to. None is empty.
struct LeafTable {
  const TableLeaf* leaves;
  int64_t count;
  int64_t tasks;
  bool parts[kParts];  // which are asked for
  int32_t* nonfinite;  // a flag a leaf, raised if one of its sums is not finite; the caller clears them
};

/// Every leaf's weighted sum or maximum.
cudaError_t weighted_sum(const LeafTable& table, cudaStream_t stream) noexcept;

/// A leaf of `server_step`, as a table holds it.
struct StepLeaf {
  ModelLeaf leaf;
  int64_t first_task;
  bool aligned;
};

/// The leaves of one `server_step`, in device memory. None is empty.
struct StepTable {
  const StepLeaf* leaves;
  int64_t count;
  int64_t tasks;
};

/// Every leaf's step, the moments in place.
cudaError_t server_step(const Optimizer& optimizer, const StepTable& table, cudaStream_t stream) noexcept;

/// Bytes of a tile of values that a block of threads shares.
constexpr int kSharedTileBytes = 32 << 10;

/// Values of a coordinate, and those that they are mixed from, that a tile holds as float64.
constexpr int kMaximumRows = kSharedTileBytes / 8;

/// Every leaf's `sorted_mean`, the rule's network and mixing in device memory. A flag is raised where a client's value
/// is not finite.
cudaError_t sorted_mean(const SortedMean& op, const LeafTable& table, cudaStream_t stream) noexcept;

/// Clients whose distances are measured at most: those of a tile of the fewest columns.
constexpr int kMaximumClients = kSharedTileBytes / (8 * 16);

/// One `squared_distances`: `sums` are parts * clients * clients zeros, `distances` clients * clients.
struct Distances {
  int32_t clients;
  int64_t parts;
  double* sums;
  double* distances;
};
/// Fails with cudaErrorInvalidValue for more clients than kMaximumClients.
cudaError_t squared_distances(const Distances& op, const LeafTable& table, cudaStream_t stream) noexcept;

/// Ranks whose arrays one `reduce` adds up: a kernel's parameters have no room for more.
constexpr int kMaximumRanks = 128;
/// Sums of squares that a `reduce` leaves: no launch has more blocks.
constexpr int kMaximumBlocks = 4096;

/// One reduction of all the result's elements. To squares[0 .. kMaximumBlocks) the sums of squares of the result's
/// parts are added, unless it is null; *nonfinite as for `cast`.
cudaError_t reduce(const Reduction& reduction, int32_t* nonfinite, double* squares, cudaStream_t stream) noexcept;

/// Float64 arrays, which travel as they are.
struct Reduction64 {
  const double* sources[kMaximumRanks];
  int32_t ranks;
  double divisor, factor;  // out = sum / divisor * factor
  int64_t count;
  double* out;
};
cudaError_t reduce_float64(const Reduction64& reduction, int32_t* nonfinite, double* squares,
                           cudaStream_t stream) noexcept;

/// One cast. *nonfinite is raised if something became infinite or NaN, unless it is null.
cudaError_t cast(const Cast& cast, int32_t* nonfinite, cudaStream_t stream) noexcept;

/// Blocks of threads of one all-reduce, at most.
constexpr int kPeerBlocks = 1024;

/// What begins the memory of a rank that all its peers reach; zero at first.
struct PeerControl {
  uint32_t calls;   // all-reduces that this rank has ended
  uint32_t ended;   // blocks of threads that have ended the running one
  uint32_t failed;  // not 0: a rank was lost, and nothing can be exchanged any more
  // How far the peers' blocks are, as they tell, in the lower half; in the upper one what they were called with.
  uint64_t arrived[kPeerBlocks][kMaximumRanks];
};

constexpr int64_t kPeerControlBytes = (sizeof(PeerControl) + 255) / 256 * 256;

/// Marks a rank that was called with something else, where a lost one would be named.
constexpr uint32_t kDiffers = UINT32_C(1) << 31;

/// One all-reduce among devices that reach each other's memory. Behind its control every rank's has two slots, which
/// take turns.
struct PeerExchange {
  Exchange exchange;  // its stretches in device memory
  int32_t rank, ranks;
  char* memory[kMaximumRanks];  // every rank's, as this device reaches it
  int64_t slot_bytes;
  int32_t blocks;        // of threads, at most; the same on all ranks
  uint32_t description;  // a digest of what must be the same on all ranks
  int64_t timeout;       // nanoseconds
  uint32_t* lost;  // the host's: receives a lost rank + 1, or one that differs. What the host writes ends every wait
  int32_t* nonfinite;  // as for `cast`
  double* squares;     // as for `reduce`
};
/// Fails with cudaErrorInvalidValue if a slot is too small. Once a rank is lost or differs, what the blocks that waited
/// for it write is NaN, and nonfinite, and so is the whole result of every later call.
cudaError_t all_reduce(const PeerExchange& peers, cudaStream_t stream) noexcept;

}  // namespace fastagg::cuda

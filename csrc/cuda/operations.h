// The operations on a GPU: launchers that neither allocate nor wait. All memory is that of the current device.
#pragma once
#include <cuda_runtime_api.h>

#include "core/types.h"

namespace fastagg::cuda {

/// Elements of a leaf that a block of threads sums before it looks for its next task.
constexpr int64_t kTask = 1024;
/// Alignment of the widest access.
constexpr int kAlignment = 16;

/// A leaf with what every block needs to know about it.
struct TableLeaf {
  Leaf leaf;
  int64_t first_task;
  bool aligned;  // its arrays, all of them, to kAlignment
};

/// The leaves of one `weighted_sum`, in device memory with everything that they point to. None is empty.
struct LeafTable {
  const TableLeaf* leaves;
  int64_t count;
  int64_t tasks;
  int32_t* nonfinite;  // a flag a leaf, raised if one of its sums is not finite; the caller clears them
};

/// Every leaf's weighted sum or maximum.
cudaError_t weighted_sum(const LeafTable& table, cudaStream_t stream) noexcept;

/// Ranks whose arrays one `reduce` adds up; more are added up in several, through float32: the order is the same.
constexpr int kMaximumRanks = 64;
/// Sums of squares that a `reduce` leaves: no launch has more blocks.
constexpr int kMaximumBlocks = 4096;

/// One reduction of all the result's elements. squares[0 .. kMaximumBlocks), which the caller clears, receives the sums
/// of squares of the result's parts, unless it is null; *nonfinite as for `cast`.
cudaError_t reduce(const Reduction& reduction, int32_t* nonfinite, double* squares, cudaStream_t stream) noexcept;

/// One cast. *nonfinite is raised if something became infinite or NaN, unless it is null.
cudaError_t cast(const Cast& cast, int32_t* nonfinite, cudaStream_t stream) noexcept;

}  // namespace fastagg::cuda

// `sorted_mean`: every leaf of a model in one launch. A thread sorts its own column of a tile in shared memory, by the
// network that csrc/cpu/sorted_mean.h walks: the same bits.
#include "core/sorted_mean.h"
#include "core/weighted_sum.h"
#include "lane.cuh"
#include "launch.cuh"

namespace fastagg::cuda {
namespace {

struct Tile { alignas(kAlignment) char bytes[kSharedTileBytes]; };

/// Columns of a tile of so many rows, one a thread.
FASTAGG_INLINE int columns_of(int64_t rows, int64_t element_bytes) {
  const int64_t fitting = kSharedTileBytes / (rows * element_bytes);
  return static_cast<int>(fitting < kThreads ? fitting : kThreads);
}

/// Decodes the clients' elements i into a column; true if they are finite.
template <Code work>
FASTAGG_INLINE bool decode_column(const Leaf& leaf, int64_t i, Element<work>* column, int stride) {
  bool finite = true;
  for (int32_t k = 0; k < leaf.clients; ++k) {
    const Source source = leaf.sources[k];
    with_code(source.code, [&](auto constant) {
      constexpr Code code = decltype(constant)::value;
      if constexpr (!is_state(code) && (work == Code::float64 || !is_wide(code))) {
        const Element<work> x = decoded<ThreadLane, code, work>(source, i).values[0];
        finite &= !not_finite(x);
        column[k * stride] = sortable(x);
      }
    });
  }
  return finite;
}

/// The mixtures of the clients' elements.
template <Code work>
FASTAGG_INLINE void mix_column(const SortedMean& op, int32_t count, const Element<work>* clients, Element<work>* column,
                               int stride) {
  for (int32_t r = 0; r < op.rows; ++r) {
    double sum[1];
    mix<ThreadLane, work>(
        op.mixing + int64_t{r} * count, count,
        [&](int32_t k, double (&x)[1]) { x[0] = static_cast<double>(clients[k * stride]); }, sum);
    column[r * stride] = static_cast<Element<work>>(sum[0]);
  }
}

/// The mean of the window of the elements i; true if all clients' are finite.
template <Code work>
FASTAGG_INLINE bool mean_of_window(const SortedMean& op, const Leaf& leaf, int64_t i, Element<work>* column,
                                   int stride) {
  Element<work>* const clients = op.mixing == nullptr ? column : column + op.rows * stride;
  const bool finite = decode_column<work>(leaf, i, clients, stride);
  if (op.mixing != nullptr) mix_column<work>(op, leaf.clients, clients, column, stride);
  for (int64_t c = 0; c < op.comparators; ++c) {
    const Comparator comparator = op.network[c];
    compare_exchange<ThreadLane>(column[comparator.low * stride], column[comparator.high * stride]);
  }
  double sum[1];
  sum_of_window<ThreadLane, work>(op, SortedColumn<ThreadLane, work>{column, stride}, sum);
  with_code(leaf.code, [&](auto constant) {
    constexpr Code code = decltype(constant)::value;
    if constexpr (!has_scales(code) && !is_state(code))
      store_mean<ThreadLane, code, false>(Result(leaf_of_windows(leaf, work), leaf.out, leaf.companion), i, sum);
  });
  return finite;
}

/// A thread's share of the elements [begin, end) of a leaf; true if all clients' values there are finite.
template <Code work>
__device__ inline bool sort_range(const SortedMean& op, const Leaf& leaf, int64_t begin, int64_t end, int thread) {
  const int columns = columns_of(scratch_rows(op, leaf), sizeof(Element<work>));
  auto* const tile = reinterpret_cast<Element<work>*>(block_shared<Tile>().bytes);
  bool finite = true;
  if (thread < columns)
    for (int64_t i = begin + thread; i < end; i += columns)
      finite &= mean_of_window<work>(op, leaf, i, tile + thread, columns);
  return finite;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    sorted_mean_kernel(const __grid_constant__ SortedMean op, LeafTable table) {
  int64_t index = 0;
  for (int64_t task = blockIdx.x; task < table.tasks; task += gridDim.x) {
    index = leaf_of(table, index, task);
    const TableLeaf entry = table.leaves[index];
    const int64_t begin = (task - entry.first_task) * kTask;
    const int64_t end = begin + kTask < entry.leaf.count ? begin + kTask : entry.leaf.count;
    const auto thread = static_cast<int>(threadIdx.x);
    const bool wide = is_wide(entry.leaf);
    __syncthreads();  // the tile's columns have other owners where its values have another type
    const bool finite = wide ? sort_range<Code::float64>(op, entry.leaf, begin, end, thread)
                             : sort_range<Code::float32>(op, entry.leaf, begin, end, thread);
    if (!finite) atomicOr(&table.nonfinite[index], 1);
  }
}

}  // namespace

cudaError_t sorted_mean(const SortedMean& op, const LeafTable& table, cudaStream_t stream) noexcept {
  return launch_persistent(sorted_mean_kernel, table.tasks, stream, op, table);
}

}  // namespace fastagg::cuda

// `squared_distances`: a block of threads sums a part of all leaves, tile by tile in shared memory, a thread a pair of
// clients, in the order of csrc/cpu/squared_distances.h; a second kernel adds the parts up. The same bits.
#include "core/squared_distances.h"
#include "lane.cuh"
#include "launch.cuh"

namespace fastagg::cuda {
namespace {

struct Tile { alignas(kAlignment) double values[kSharedTileBytes / sizeof(double)]; };

/// Decodes `count` elements of all clients from `begin` on, behind them zeros up to `padded`, each thread its share;
/// true if they are finite.
FASTAGG_INLINE bool decode_tile(const Leaf& leaf, int64_t begin, int count, int padded, int columns, double* tile,
                                int thread) {
  bool finite = true;
  for (int place = thread; place < leaf.clients * padded; place += kThreads) {
    const int k = place / padded, i = place % padded;
    const Source source = leaf.sources[k];
    double x = 0;
    if (source.data != nullptr && i < count)
      with_code(source.code, [&](auto constant) {
        constexpr Code code = decltype(constant)::value;
        if constexpr (!is_state(code)) x = decoded<ThreadLane, code, Code::float64>(source, begin + i).values[0];
      });
    finite &= !not_finite(x);
    tile[k * columns + i] = x;
  }
  return finite;
}

/// The squared distance of two rows of a tile.
FASTAGG_INLINE double distance(const double* x, const double* y, int padded) {
  double strides[kPairStrides] = {};
  for (int i = 0; i < padded; i += kPairStrides)
    for (int stride = 0; stride < kPairStrides; ++stride) {
      const double difference = x[i + stride] - y[i + stride];
      strides[stride] = strides[stride] + difference * difference;
    }
  return sum_of_pair_strides(strides);
}

/// Adds the distances of a thread's pairs of rows to their sums.
FASTAGG_INLINE void add_distances(int32_t clients, const double* tile, int columns, int padded, double* sums,
                                  int thread) {
  int32_t i = 0, j = thread + 1;
  while (i < clients - 1) {
    if (j >= clients) {  // into the next row of the triangle
      j += ++i + 1 - clients;
      continue;
    }
    sums[int64_t{i} * clients + j] += distance(tile + i * columns, tile + j * columns, padded);
    j += kThreads;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks) squared_distances_kernel(Distances op, LeafTable table) {
  double* const tile = block_shared<Tile>().values;
  const auto columns = static_cast<int>(tile_columns(op.clients * static_cast<int64_t>(sizeof(double))));
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t part = blockIdx.x;
  int64_t index = 0;
  for (int64_t task = part * table.tasks / op.parts; task < (part + 1) * table.tasks / op.parts; ++task) {
    index = leaf_of(table, index, task);
    const TableLeaf entry = table.leaves[index];
    int64_t begin = (task - entry.first_task) * kTask;
    const int64_t end = begin + kTask < entry.leaf.count ? begin + kTask : entry.leaf.count;
    for (; begin < end; begin += columns) {
      const auto count = static_cast<int>(end - begin < columns ? end - begin : columns);
      const int padded = (count + kPairStrides - 1) / kPairStrides * kPairStrides;
      const bool finite = decode_tile(entry.leaf, begin, count, padded, columns, tile, thread);
      if (!finite) atomicOr(&table.nonfinite[index], 1);
      __syncthreads();
      add_distances(op.clients, tile, columns, padded, op.sums + part * op.clients * op.clients, thread);
      __syncthreads();
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks) add_parts_kernel(Distances op) {
  const int64_t entries = int64_t{op.clients} * op.clients;
  for (int64_t entry = blockIdx.x * kThreads + threadIdx.x; entry < entries; entry += gridDim.x * kThreads) {
    const int64_t i = entry / op.clients, j = entry % op.clients;
    double sum = 0;
    for (int64_t part = 0; part < op.parts; ++part)
      sum += op.sums[part * entries + (i < j ? entry : j * op.clients + i)];
    op.distances[entry] = sum;
  }
}

}  // namespace

cudaError_t squared_distances(const Distances& op, const LeafTable& table, cudaStream_t stream) noexcept {
  static_assert(kTask == kDistanceTask, "the parts are those of the CPU");
  static_assert(kMaximumClients * kLeastColumns * sizeof(double) <= kSharedTileBytes, "a tile holds all clients");
  if (op.clients > kMaximumClients) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(op.parts);
  const cudaError_t error = launch(squared_distances_kernel, blocks, kThreads, 0, stream, op, table);
  if (error != cudaSuccess) return error;
  return launch_persistent(add_parts_kernel, int64_t{op.clients} * op.clients / kThreads + 1, stream, op);
}

}  // namespace fastagg::cuda

// How kernels start. Compiled by g++, the same kernels run on the CPU for the tests.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"  // tests/cuda_on_cpu
#endif
#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>

#include "operations.h"

namespace fastagg::cuda {

#ifdef __CUDACC__
/// Threads of a block, in every kernel.
constexpr int kThreads = 128;

/// Starts a kernel. Its own error comes back, and nobody's before it.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const auto start = [&](auto&... parameter) {
    void* addresses[] = {&parameter...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, shared_bytes, stream);
  };
  return std::apply(start, parameters);
}

/// A variable that the threads of a block share: one for each type and kernel.
template <class T>
__device__ inline T& block_shared() {
  __shared__ T variable;
  return variable;
}
#else
constexpr int kThreads = 64;  // each is a thread of the CPU: two warps are enough to find what is wrong
using cuda_on_cpu::block_shared;
using cuda_on_cpu::launch;
#endif

/// Blocks that a multiprocessor shall hold at least: this bounds the registers, above what the kernels need.
constexpr int kBlocks = 6;

/// Launches as many blocks as the current device holds at once, but no more than there are tasks: blocks walk the tasks
/// in strides of the grid.
template <class... Parameters, class... Arguments>
cudaError_t launch_persistent(void (*kernel)(Parameters...), int64_t tasks, cudaStream_t stream,
                              Arguments&&... arguments) {
  int device = 0, processors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, reinterpret_cast<const void*>(kernel), kThreads, 0);
  if (error != cudaSuccess || tasks == 0) return error;
  const int64_t at_once = std::min<int64_t>(int64_t{processors} * std::max(blocks, 1), kMaximumBlocks);
  const auto grid = static_cast<unsigned>(std::min(tasks, at_once));
  return launch(kernel, grid, kThreads, 0, stream, std::forward<Arguments>(arguments)...);
}

/// The index of the leaf of a table that a task belongs to, at or behind `leaf`.
template <class Table>
FASTAGG_INLINE int64_t leaf_of(const Table& table, int64_t leaf, int64_t task) {
  int64_t end = table.count;
  while (end - leaf > 1) {
    const int64_t middle = leaf + (end - leaf) / 2;
    (table.leaves[middle].first_task <= task ? leaf : end) = middle;
  }
  return leaf;
}

}  // namespace fastagg::cuda

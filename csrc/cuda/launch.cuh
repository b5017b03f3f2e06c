// How kernels start: the only place that knows <<<>>>. Compiled by g++, the same kernels run on the CPU for the tests.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_on_cpu.h"  // tests/cuda_on_cpu
#endif
#include <algorithm>
#include <cstdint>
#include <utility>

#include "operations.h"

namespace fastagg::cuda {

/// Threads of a block, in every kernel.
constexpr int kThreads = 128;
/// Blocks that a multiprocessor shall hold at least: this bounds the registers, above what the kernels need.
constexpr int kBlocks = 6;

#ifdef __CUDACC__
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  return cudaGetLastError();
}
#else
using cuda_on_cpu::launch;
#endif

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

}  // namespace fastagg::cuda

// Test-only: lets g++ compile a .cu file and run its kernels, one std::thread per CUDA thread, one block after another.
// Sanitizers see every access, so TSan reports a missing __syncthreads() at its line. Threads of a block that wait at
// different barriers, where a GPU would hang, make the launch fail.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>  // for g++: types and error codes; __global__ and __device__ mean nothing
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32, kMaximumThreads = 1024;

/// What the threads of the running block share. Once they have diverged, no barrier holds anybody: they run to their
/// end, and the launch reports the error.
struct Block {
  unsigned threads = 0;
  std::atomic<unsigned> waiting{0};
  std::atomic<bool> diverged{false};
  unsigned long long lanes[kMaximumThreads];  // values on their way between the threads of a warp
  alignas(16) char dynamic_shared[48 * 1024];
};
inline Block block;
inline thread_local unsigned rank;

/// A barrier that notices when every thread of the block waits at one, for then nobody is left to complete it.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}

  void arrive_and_wait() {
    if (block.diverged) return;
    const unsigned phase = phase_;
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_ = 0;
      block.waiting -= threads_ - 1;
      advance();
      return;
    }
    if (block.waiting.fetch_add(1) + 1 == block.threads) give_up();
    while (phase_ == phase && !block.diverged) phase_.wait(phase);
  }

  void advance() {
    ++phase_;
    phase_.notify_all();
  }

 private:
  static void give_up();

  const unsigned threads_;
  std::atomic<unsigned> arrived_{0}, phase_{0};
};

/// The barriers of the running block: its end's, __syncthreads()'s, and its warps'.
inline std::deque<Barrier> barriers;
inline Barrier& end_barrier() { return barriers[0]; }
inline Barrier& block_barrier() { return barriers[1]; }
inline Barrier& warp_barrier() { return barriers[2 + rank / kWarp]; }

inline void Barrier::give_up() {
  block.diverged = true;
  for (Barrier& barrier : barriers) barrier.advance();
}

/// What another lane of the warp passes to the same call.
template <class T>
T shuffle(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof block.lanes[0], "a shuffle moves at most 8 bytes");
  std::memcpy(&block.lanes[rank], &value, sizeof value);
  warp_barrier().arrive_and_wait();
  std::memcpy(&value, &block.lanes[rank / kWarp * kWarp + source_lane], sizeof value);
  warp_barrier().arrive_and_wait();
  return value;
}

inline void set_indices(dim3 grid, dim3 size, unsigned thread, unsigned index) {
  rank = thread, blockDim = size, gridDim = grid;
  threadIdx = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
  blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
}

/// Runs a kernel to its end. Arguments are converted once a thread and block, as a GPU copies them. One launch at a
/// time:
/// __shared__ variables are static.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t,
                   Arguments&&... arguments) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const unsigned count = size.x * size.y * size.z, blocks = grid.x * grid.y * grid.z;
  if (count > kMaximumThreads || count % kWarp != 0 || shared_bytes > sizeof block.dynamic_shared)
    return cudaErrorInvalidConfiguration;
  block.threads = count, block.waiting = 0, block.diverged = false;
  barriers.clear();
  barriers.emplace_back(count);
  barriers.emplace_back(count);
  for (unsigned warp = 0; warp < count / kWarp; ++warp) barriers.emplace_back(kWarp);
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < count; ++thread)
    threads.emplace_back([&, thread] {
      for (unsigned index = 0; index < blocks; ++index) {
        set_indices(grid, size, thread, index);
        kernel(static_cast<Parameters>(arguments)...);
        end_barrier().arrive_and_wait();
      }
    });
  for (std::thread& thread : threads) thread.join();
  return block.diverged ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace cuda_on_cpu

// What kernels may call; whatever is missing is a few lines. Warp functions need the whole warp.
inline void __syncthreads() { cuda_on_cpu::block_barrier().arrive_and_wait(); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::warp_barrier().arrive_and_wait(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle(value, cuda_on_cpu::rank % cuda_on_cpu::kWarp ^ static_cast<unsigned>(mask));
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  cuda_on_cpu::block.lanes[cuda_on_cpu::rank] = vote;
  cuda_on_cpu::warp_barrier().arrive_and_wait();
  const unsigned first = cuda_on_cpu::rank / cuda_on_cpu::kWarp * cuda_on_cpu::kWarp;
  for (unsigned lane = 0; lane < cuda_on_cpu::kWarp; ++lane)
    votes |= static_cast<unsigned>(cuda_on_cpu::block.lanes[first + lane]) << lane;
  cuda_on_cpu::warp_barrier().arrive_and_wait();
  return votes;
}
template <class T>
T atomicOr(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_or(value);
}
template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value);
}

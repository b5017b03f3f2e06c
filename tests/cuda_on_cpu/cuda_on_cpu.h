// Test-only: lets g++ compile a .cu file and run its kernels, one std::thread per CUDA thread, one block after another.
// Sanitizers see every access, so TSan reports a missing __syncthreads() at its line. Threads of a block that wait at
// different barriers, where a GPU would hang, make the launch fail. Kernels that host threads launch run at once, as on
// several devices.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>  // for g++: types and error codes; __global__ and __device__ mean nothing
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#undef __shared__
#define __shared__ static_assert(false, "block_shared() has what threads of a block share");
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32, kMaximumThreads = 1024;

class Barrier;

/// What the threads of a launch share. Once those of a block have diverged, no barrier holds anybody: they run to their
/// end, and the launch reports the error.
struct Launch {
  explicit Launch(unsigned count);

  const unsigned threads;
  std::deque<Barrier> barriers;  // the end's, __syncthreads()'s, and the warps'
  std::atomic<unsigned> waiting{0}, votes{0};
  std::atomic<bool> diverged{false};
  unsigned long long lanes[kMaximumThreads];  // values on their way between the threads of a warp
  alignas(16) char shared[48 * 1024];
};
inline thread_local Launch* running;
inline thread_local unsigned rank;

/// A barrier that notices when every thread of the block waits at one, for then nobody is left to complete it. It waits
/// by the system's own call: std::atomic's wait() shares its table among all, which would order one rank's accesses
/// behind another's and hide their races from TSan; locks took several times as long.
class Barrier {
 public:
  Barrier(Launch& launch, unsigned threads) : launch_(launch), threads_(threads) {}

  void arrive_and_wait() {
    if (launch_.diverged) return;
    const unsigned phase = phase_;
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_ = 0;
      launch_.waiting -= threads_ - 1;
      advance();
      return;
    }
    if (launch_.waiting.fetch_add(1) + 1 == launch_.threads) give_up();
    while (phase_ == phase && !launch_.diverged) futex(FUTEX_WAIT_PRIVATE, phase);
  }

 private:
  void advance() {
    ++phase_;
    futex(FUTEX_WAKE_PRIVATE, INT_MAX);
  }

  void futex(int operation, unsigned value) { syscall(SYS_futex, &phase_, operation, value, nullptr, nullptr, 0); }

  void give_up() {
    launch_.diverged = true;
    for (Barrier& barrier : launch_.barriers) barrier.advance();
  }

  Launch& launch_;
  const unsigned threads_;
  std::atomic<unsigned> arrived_{0}, phase_{0};
};

inline Launch::Launch(unsigned count) : threads(count) {
  barriers.emplace_back(*this, count);
  barriers.emplace_back(*this, count);
  for (unsigned warp = 0; warp < count / kWarp; ++warp) barriers.emplace_back(*this, kWarp);
}

inline Barrier& end_barrier() { return running->barriers[0]; }
inline Barrier& block_barrier() { return running->barriers[1]; }
inline Barrier& warp_barrier() { return running->barriers[2 + rank / kWarp]; }

/// A variable that the threads of a block share. A kernel has one: all lie at the same place.
template <class T>
T& block_shared() {
  static_assert(sizeof(T) <= sizeof(Launch::shared), "a block has less shared memory");
  return *reinterpret_cast<T*>(running->shared);
}

/// What another lane of the warp passes to the same call.
template <class T>
T shuffle(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(unsigned long long), "a shuffle moves at most 8 bytes");
  std::memcpy(&running->lanes[rank], &value, sizeof value);
  warp_barrier().arrive_and_wait();
  std::memcpy(&value, &running->lanes[rank / kWarp * kWarp + source_lane], sizeof value);
  warp_barrier().arrive_and_wait();
  return value;
}

inline void set_indices(dim3 grid, dim3 size, unsigned thread, unsigned index) {
  rank = thread, blockDim = size, gridDim = grid;
  threadIdx = {thread % size.x, thread / size.x % size.y, thread / (size.x * size.y)};
  blockIdx = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
}

/// Runs a kernel to its end. Arguments are converted once a thread and block, as a GPU copies them.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t,
                   Arguments&&... arguments) {
  const unsigned count = size.x * size.y * size.z, blocks = grid.x * grid.y * grid.z;
  if (count > kMaximumThreads || count % kWarp != 0 || shared_bytes > 0) return cudaErrorInvalidConfiguration;
  const auto shared = std::make_unique<Launch>(count);
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < count; ++thread)
    threads.emplace_back([&, thread] {
      running = shared.get();
      for (unsigned index = 0; index < blocks; ++index) {
        set_indices(grid, size, thread, index);
        kernel(static_cast<Parameters>(arguments)...);
        end_barrier().arrive_and_wait();
      }
    });
  for (std::thread& thread : threads) thread.join();
  return shared->diverged ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace cuda_on_cpu

// What kernels may call; whatever is missing is a few lines. Warp functions need the whole warp.
inline void __syncthreads() { cuda_on_cpu::block_barrier().arrive_and_wait(); }
/// Whether one of the block's threads votes so. The votes are cleared between two barriers.
inline int __syncthreads_or(int vote) {
  std::atomic<unsigned>& votes = cuda_on_cpu::running->votes;
  if (vote != 0) ++votes;
  __syncthreads();
  const bool any = votes != 0;
  __syncthreads();
  if (vote != 0) --votes;
  return any;
}
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::warp_barrier().arrive_and_wait(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle(value, cuda_on_cpu::rank % cuda_on_cpu::kWarp ^ static_cast<unsigned>(mask));
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  cuda_on_cpu::running->lanes[cuda_on_cpu::rank] = vote;
  cuda_on_cpu::warp_barrier().arrive_and_wait();
  const unsigned first = cuda_on_cpu::rank / cuda_on_cpu::kWarp * cuda_on_cpu::kWarp;
  for (unsigned lane = 0; lane < cuda_on_cpu::kWarp; ++lane)
    votes |= static_cast<unsigned>(cuda_on_cpu::running->lanes[first + lane]) << lane;
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

// Flags by which devices tell each other how far they are, and the time that they wait.
#pragma once
#include <chrono>
#include <cstdint>
#include <thread>

#include "launch.cuh"

namespace fastagg::cuda {

/// Stores a flag in any device's memory, or the host's, behind all that this thread has seen written.
__device__ inline void signal(uint64_t* flag, uint64_t value) {
#ifdef __CUDA_ARCH__
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
#else
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
#endif
}

/// Reads a flag: what was written before it was stored can be read from now on.
__device__ inline uint64_t observe(const uint64_t* flag) {
#ifdef __CUDA_ARCH__
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
#else
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
#endif
}

/// Reads and stores a word of the host's, with which nothing else comes.
__device__ inline uint32_t read_word(const uint32_t* word) {
#ifdef __CUDA_ARCH__
  return *static_cast<const volatile uint32_t*>(word);
#else
  return __atomic_load_n(word, __ATOMIC_RELAXED);
#endif
}

__device__ inline void write_word(uint32_t* word, uint32_t value) {
#ifdef __CUDA_ARCH__
  *static_cast<volatile uint32_t*>(word) = value;
#else
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
#endif
}

/// Nanoseconds of a clock that goes on while others' kernels run.
__device__ inline int64_t nanoseconds() {
#ifdef __CUDA_ARCH__
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#else
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
#endif
}

/// Lets others run between two looks at a flag.
__device__ inline void relax() {
#ifdef __CUDA_ARCH__
  __nanosleep(20);
#else
  std::this_thread::sleep_for(std::chrono::microseconds(20));
#endif
}

}  // namespace fastagg::cuda

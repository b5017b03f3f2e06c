// A block's threads pass a value to their neighbours through shared memory. Planted faults, chosen by a definition,
// show that the harness finds what it is there for.
#include <cstdio>

#include "cuda/launch.cuh"

namespace {

constexpr int kThreads = 64;

__global__ void pass_on(int* values) {
  auto& shared = fastagg::cuda::block_shared<int[kThreads]>();
  shared[threadIdx.x] = values[threadIdx.x];
#ifndef PLANT_MISSING_BARRIER
  __syncthreads();
#endif
  values[threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
#ifdef PLANT_DIVERGENT_BARRIER
  if (threadIdx.x % 2 == 0) __syncthreads();
#endif
#ifdef PLANT_DIVERGENT_SHUFFLE
  if (threadIdx.x < 8) values[threadIdx.x] = __shfl_xor_sync(0xffffffff, values[threadIdx.x], 1);
#endif
}

}  // namespace

int main() {
  int values[kThreads];
  for (int i = 0; i < kThreads; ++i) values[i] = i;
  if (fastagg::cuda::launch(pass_on, 1, kThreads, 0, nullptr, values) != cudaSuccess) {
    std::puts("diverged");
    return 2;
  }
  for (int i = 0; i < kThreads; ++i)
    if (values[i] != (i + 1) % kThreads) return 3;
  return 0;
}

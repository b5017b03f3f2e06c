// Two ranks pass values to each other through memory that both reach, as csrc/cuda/all_reduce.cu does. Planted faults,
// chosen by a definition, show that the harness finds what it is there for.
#include <cstdio>
#include <thread>

#include "cuda/signal.cuh"

namespace {

constexpr int kThreads = 64;

struct Memory {
  int values[kThreads];
  uint64_t flag;
};

__global__ void pass_to_peer(Memory* own, const Memory* peer, int* received) {
  own->values[threadIdx.x] = static_cast<int>(threadIdx.x);
#ifndef PLANT_EARLY_SIGNAL
  __syncthreads();
#endif
  if (threadIdx.x == 0) fastagg::cuda::signal(&own->flag, 1);
#ifndef PLANT_MISSING_WAIT
  if (threadIdx.x == 0)
    while (fastagg::cuda::observe(&peer->flag) == 0) fastagg::cuda::relax();
#endif
  __syncthreads();
  received[threadIdx.x] = peer->values[kThreads - 1 - threadIdx.x];
}

}  // namespace

int main() {
  Memory memory[2] = {};
  int received[2][kThreads];
  const auto run = [&](int rank) {
    fastagg::cuda::launch(pass_to_peer, 1, kThreads, 0, nullptr, &memory[rank], &memory[1 - rank], received[rank]);
  };
  std::thread other(run, 1);
  run(0);
  other.join();
  for (const auto& values : received)
    for (int i = 0; i < kThreads; ++i)
      if (values[i] != kThreads - 1 - i) return 3;
  return 0;
}

// Threads as the ranks of a same-host group, over one mapping: so ThreadSanitizer sees what processes do to each other.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "comm/shared_memory.h"

namespace {

using namespace fastagg;
using comm::SharedMemory;

std::atomic<int> failures{0};

void expect(bool right, const char* what) {
  if (right) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

/// What every rank holds at element i: small integers, so that every wire but sign keeps their mean.
float value_at(int64_t i, int rank) { return static_cast<float>(i % 5 - 2 + rank * 2); }

void reduce_all(SharedMemory& group, int rank, int ranks) {
  for (const Code wire : {Code::float32, Code::float16, Code::bfloat16, Code::wire_int8}) {
    for (const int64_t count : {int64_t{0}, int64_t{5}, int64_t{16384}, int64_t{16385}, int64_t{300001}}) {
      std::vector<float> x(count);
      for (int64_t i = 0; i < count; ++i) x[i] = value_at(i, rank);
      const auto outcome = group.all_reduce({x.data(), Code::float32, count, wire, 8, Rounding::nearest, {}, nullptr, 0, true, 1, nullptr, 0, nullptr, false},
                                            std::chrono::seconds(60));
      bool right = outcome.finite;
      for (int64_t i = 0; i < count; ++i) right &= x[i] == value_at(i, 0) + static_cast<float>(ranks - 1);
      expect(right, "a mean");
    }
  }
  bool refused = false;
  try {
    float x[3] = {};
    group.all_reduce({x, Code::float32, rank == 0 ? 2 : 3, Code::float32, 8, Rounding::nearest, {}, nullptr, 0, true, 1, nullptr, 0, nullptr, false},
                     std::chrono::seconds(60));
  } catch (const comm::Mismatch&) {
    refused = true;
  }
  expect(refused == (ranks > 1), "a mismatch on every rank");
}

}  // namespace

int main() {
  for (const int ranks : {1, 2, 3, 5}) {
    const auto segment = std::make_shared<comm::Segment>(comm::Segment::create(SharedMemory::bytes(ranks)));
    const std::vector<pid_t> processes(ranks, getpid());
    std::vector<int> names;
    for (int rank = 0; rank < ranks; ++rank) names.push_back(rank);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank)
      threads.emplace_back([&, rank] {
        SharedMemory group(segment, processes, names, rank);
        reduce_all(group, rank, ranks);
      });
    for (std::thread& thread : threads) thread.join();
  }
  std::printf("exchanges among threads: %d failed\n", failures.load());
  return failures == 0 ? 0 : 1;
}

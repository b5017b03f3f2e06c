// Threads as the ranks of a same-host group, over one mapping: so ThreadSanitizer sees what processes do to each other.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <string>
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

/// The mean at element i, and what a rank adds to it: small integers, so that every wire but sign keeps them.
float mean_at(int64_t i) { return static_cast<float>(i % 5 - 2); }
float offset_of(int rank, int ranks) { return static_cast<float>(2 * rank - (ranks - 1)); }

/// An exchange of float32 values to nearest, without feedback.
comm::Exchange exchange_of(std::vector<float>& x, Code wire) {
  comm::Exchange exchange{};
  exchange.data = x.data();
  exchange.code = Code::float32;
  exchange.count = static_cast<int64_t>(x.size());
  exchange.wire = wire;
  exchange.block_shift = 8;
  exchange.rounding = Rounding::nearest;
  exchange.mean = true;
  exchange.encoded_factor = 1;
  exchange.factor = 1;
  exchange.description = std::to_string(x.size()) + " elements";
  return exchange;
}

std::vector<float> values_of(int64_t count, int rank, int ranks) {
  std::vector<float> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = mean_at(i) + offset_of(rank, ranks);
  return x;
}

/// Whether the elements [begin, end) are the mean over all ranks.
bool is_mean(const std::vector<float>& x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    if (x[i] != mean_at(i)) return false;
  return true;
}

void reduce_all(SharedMemory& group, int rank, int ranks) {
  const comm::Patience wait{std::chrono::seconds(60), [] { return false; }};
  for (const Code wire : {Code::float32, Code::float16, Code::bfloat16, Code::wire_int8}) {
    for (const int64_t count : {0, 5, 16384, 16385, 300001}) {
      std::vector<float> x = values_of(count, rank, ranks);
      comm::Exchange exchange = exchange_of(x, wire);
      exchange.norm = true;
      const comm::Outcome outcome = group.all_reduce(exchange, wait);
      double squares = 0;
      for (const float mean : x) squares += mean * mean;
      expect(outcome.finite && is_mean(x, 0, count), "a mean");
      expect(outcome.squares == squares, "a sum of squares");

      std::vector<float> y = values_of(count, rank, ranks), residual(count), error(count, 1);
      comm::Exchange halves = exchange_of(y, wire);
      halves.residual = residual.data();
      halves.error = error.data();
      group.reduce_scatter(halves, wait);
      const Slice own = slice_of(count, rank, ranks);
      expect(is_mean(y, own.begin, own.end), "a slice's mean");
      group.all_gather(exchange_of(y, wire), wait);
      expect(is_mean(y, 0, count), "the slices of all");
    }
  }
  for (const int root : {0, ranks - 1}) {
    for (const size_t bytes : {0, 5, 10 << 20}) {  // more than the slots hold at once
      std::vector<char> text(bytes, static_cast<char>(rank));
      group.broadcast(text.data(), static_cast<int64_t>(bytes), root, "bytes", wait);
      expect(std::all_of(text.begin(), text.end(), [&](char one) { return one == root; }), "the root's bytes");
    }
  }
  bool refused = false;
  try {
    std::vector<float> x(rank == 0 ? 2 : 3);
    group.all_reduce(exchange_of(x, Code::float32), wait);
  } catch (const comm::Mismatch&) {
    refused = true;
  }
  expect(refused == (ranks > 1), "a mismatch on every rank");
}

}  // namespace

int main() {
  for (const int ranks : {1, 2, 3, 5, 64}) {
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

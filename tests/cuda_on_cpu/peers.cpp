// The all-reduce kernel of several ranks at once, each a host thread as if on a device of its own, compared byte by
// byte with the CPU's operations one after the other: a program without Python, for the sanitizers.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "core/reduce.h"
#include "cpu/operations.h"
#include "cuda/operations.h"

namespace fastagg {
namespace {

std::atomic<int> failures{0};

/// What all ranks are called with.
struct Case {
  Code code, wire;
  Rounding rounding;
  int ranks;
  int64_t count, shift;  // elements, and how many of them the arrays begin beyond an aligned address
  bool mean, feedback;
  double factor;
};

/// One rank's tensor, residual and error, all beyond an aligned address by the case's shift.
struct Rank {
  std::vector<char> memory;
  std::vector<float> residuals, errors;
  char* data;
  float *residual, *error;

  Rank(const Case& given, int rank) : memory(encoded_bytes(given.code, given.count + given.shift) + 64) {
    std::mt19937 random(rank);
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> values(given.count);
    for (float& value : values) value = normal(random);
    residuals.resize(given.count + given.shift), errors.resize(given.count + given.shift, 7);
    for (float& value : residuals) value = normal(random) / 100;
    residual = residuals.data() + given.shift, error = errors.data() + given.shift;
    data = memory.data() + encoded_bytes(given.code, given.shift);
    cpu::cast(
        {{values.data(), nullptr, Code::float32, 0}, given.code, 0, Rounding::nearest, {}, given.count, data, nullptr});
  }

  Exchange exchange(const Case& given, int rank) {
    Exchange op{};
    op.data = data, op.code = given.code, op.count = given.count;
    op.wire = given.wire, op.block_shift = 8, op.rounding = given.rounding;
    op.key = {7, 1, 2, static_cast<uint32_t>(rank)};
    op.mean = given.mean, op.norm = true, op.factor = given.factor;
    op.encoded_factor = given.mean && given.wire == Code::float16 ? 0.25f : 1.0f;
    if (given.feedback) op.residual = residual, op.residual_factor = 0.5f, op.error = error;
    return op;
  }
};

/// An encoded array of a case's wire.
struct Row {
  std::vector<uint64_t> codes;
  std::vector<float> scales;

  explicit Row(const Case& given) : codes(given.count + 1), scales(given.count / 256 + 1) {}
  Source source(const Case& given) const { return {codes.data(), scales.data(), given.wire, 8}; }
  Cast result(const Exchange& op, uint32_t rank) {
    Cast cast{{op.data, nullptr, op.code, 0}, op.wire, 8, op.rounding, op.key, op.count, codes.data(), scales.data()};
    cast.key.rank = rank;
    return cast;
  }
};

std::vector<Source> sources_of(const Case& given, const std::vector<Row>& rows) {
  std::vector<Source> sources;
  for (const Row& row : rows) sources.push_back(row.source(given));
  return sources;
}

/// What all ranks publish.
std::vector<Row> publish(const Case& given, std::vector<Exchange>& ops) {
  std::vector<Row> rows;
  for (const Exchange& op : ops) {
    rows.emplace_back(given);
    const Source own{op.data, nullptr, op.code, 0};
    const Feedback feedback{op.residual, op.residual_factor, op.error, 1 / op.encoded_factor, false};
    if (given.wire == Code::float64) memcpy(rows.back().codes.data(), op.data, 8 * op.count);
    else
      cpu::reduce({&own, 1, 1 / op.encoded_factor, feedback, rows.back().result(op, op.key.rank)}, 0, op.count,
                  nullptr);
  }
  return rows;
}

/// The quotients of an owner's slice, where `result` says; what is lost is the owner's.
void add_up(const Case& given, const std::vector<Row>& rows, const Exchange& owner, int rank, Cast result,
            double factor) {
  const Slice slice = slice_of(given.count, rank, given.ranks);
  const auto share = static_cast<float>(given.mean ? given.ranks : 1);
  if (given.wire == Code::float64) {
    std::vector<const double*> sources;
    for (const Row& row : rows) sources.push_back(reinterpret_cast<const double*>(row.codes.data()) + slice.begin);
    cpu::reduce_float64(sources.data(), given.ranks, slice.end - slice.begin, share, factor,
                        static_cast<double*>(result.out) + slice.begin, nullptr);
    return;
  }
  const std::vector<Source> sources = sources_of(given, rows);
  const bool loses = result.code == given.wire || result.code == Code::float16 || result.code == Code::bfloat16;
  const Feedback feedback{nullptr, 0, loses ? owner.error : nullptr, static_cast<float>(share / factor), true};
  const auto divisor = static_cast<float>(share * owner.encoded_factor / factor);
  cpu::reduce({sources.data(), given.ranks, divisor, feedback, result}, slice.begin, slice.end, nullptr);
}

/// What the first rank's tensor holds in the end.
void reduce_one_after_the_other(const Case& given, std::vector<Exchange>& ops) {
  const std::vector<Row> rows = publish(given, ops);
  Cast result{{}, given.code, 0, Rounding::nearest, {}, given.count, ops[0].data, nullptr};
  if (in_one_shot(given.count, given.ranks)) {
    for (int rank = 0; rank < given.ranks; ++rank) add_up(given, rows, ops[rank], rank, result, given.factor);
    return;
  }
  Row means(given);
  const double factor = given.wire == Code::float64 ? given.factor : 1;  // of float64: in the one rounding
  for (int rank = 0; rank < given.ranks; ++rank)
    add_up(given, rows, ops[rank], rank, means.result(ops[rank], kMeansRank), factor);
  if (given.wire == Code::float64) {
    memcpy(result.out, means.codes.data(), 8 * given.count);
    return;
  }
  result.source = means.source(given);
  result.factor = static_cast<float>(given.factor);
  cpu::cast(result);
}

/// The memory of all ranks, which outlives a call: exchanges follow one another in it.
class Peers {
 public:
  explicit Peers(int ranks) : memory_(ranks) {
    for (auto& memory : memory_) memory.resize(sizeof(cuda::PeerControl) + 256 + 2 * kSlot);
  }

  cuda::PeerExchange exchange(const Exchange& op, int rank) {
    cuda::PeerExchange peers{};
    peers.exchange = op, peers.rank = rank, peers.ranks = static_cast<int32_t>(memory_.size());
    for (size_t peer = 0; peer < memory_.size(); ++peer) {
      const auto address = reinterpret_cast<uintptr_t>(memory_[peer].data());
      peers.memory[peer] = memory_[peer].data() + (256 - address % 256) % 256;
    }
    peers.slot_bytes = kSlot, peers.blocks = 2, peers.timeout = INT64_C(60'000'000'000), peers.lost = &lost_;
    return peers;
  }

  uint32_t lost() const { return lost_; }

 private:
  static constexpr int64_t kSlot = 8 * 3 * 4 * kChunk;  // larger tensors take several launches
  std::vector<std::vector<char>> memory_;
  uint32_t lost_ = 0;
};

void compare(const Case& given, Peers& peers) {
  std::vector<Rank> ranks, expected;
  std::vector<Exchange> ops;
  ranks.reserve(given.ranks), expected.reserve(given.ranks);
  for (int rank = 0; rank < given.ranks; ++rank) {
    ranks.emplace_back(given, rank), expected.emplace_back(given, rank);
    ops.push_back(expected.back().exchange(given, rank));
  }
  reduce_one_after_the_other(given, ops);

  std::vector<std::thread> threads;
  std::atomic<bool> correct{true};
  for (int rank = 0; rank < given.ranks; ++rank)
    threads.emplace_back([&, rank] {
      std::vector<double> squares(cuda::kPeerBlocks);
      int32_t nonfinite = 0;
      cuda::PeerExchange exchange = peers.exchange(ranks[rank].exchange(given, rank), rank);
      exchange.nonfinite = &nonfinite, exchange.squares = squares.data();
      if (cuda::all_reduce(exchange, nullptr) != cudaSuccess || nonfinite != 0) correct = false;
      if (memcmp(ranks[rank].data, expected[0].data, encoded_bytes(given.code, given.count)) != 0) correct = false;
      if (memcmp(ranks[rank].error, expected[rank].error, 4 * given.count) != 0) correct = false;
      std::vector<float> result(given.count);
      cpu::cast({{expected[0].data, nullptr, given.code, 0},
                 Code::float32,
                 0,
                 Rounding::nearest,
                 {},
                 given.count,
                 result.data(),
                 nullptr});
      double sum = 0, expected_sum = 0;
      for (const double part : squares) sum += part;
      for (const float x : result) expected_sum += static_cast<double>(x) * x;
      if (std::abs(sum - expected_sum) > 1e-6 * expected_sum) correct = false;
    });
  for (std::thread& thread : threads) thread.join();
  if (correct && peers.lost() == 0) return;
  ++failures;
  std::printf("all_reduce of %d elements of code %d by wire %d among %d ranks: different\n",
              static_cast<int>(given.count), static_cast<int>(given.code), static_cast<int>(given.wire), given.ranks);
}

void compare_all() {
  const Code wires[] = {Code::float32,       Code::float16,   Code::bfloat16,  Code::wire_fp8_e4m3,
                        Code::wire_fp8_e5m2, Code::wire_int8, Code::wire_int4, Code::wire_sign};
  for (const int ranks : {1, 2, 3, 4}) {
    Peers peers(ranks);
    for (const int64_t count : {int64_t{1}, int64_t{1000}, int64_t{30001}}) {
      for (const Code wire : wires) {
        const bool odd = static_cast<int>(wire) % 2 == 1;
        const Code code = static_cast<Code>((static_cast<int>(wire) + ranks) % 4);
        const bool stochastic = odd && wire != Code::float32 && wire != Code::wire_sign;
        compare({code, wire, stochastic ? Rounding::stochastic : Rounding::nearest, ranks, count, odd ? 1 : 0, !odd,
                 odd || ranks == 3, odd ? 1.0 : 1 / 3.0},
                peers);
      }
      compare({Code::float64, Code::float64, Rounding::nearest, ranks, count, 0, true, false, 1 / 3.0}, peers);
    }
  }
}

/// A rank that does not come ends the others' wait, and all that they write is NaN.
void lose_a_rank() {
  const Case given{Code::float32, Code::float16, Rounding::nearest, 3, 30001, 0, true, false, 1};
  Peers peers(3);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank)
    threads.emplace_back([&, rank] {
      for (int call = 0; call < 2; ++call) {
        Rank own(given, rank);
        int32_t nonfinite = 0;
        cuda::PeerExchange exchange = peers.exchange(own.exchange(given, rank), rank);
        exchange.timeout = call == 0 ? 200'000'000 : INT64_C(60'000'000'000);  // the second one does not wait at all
        exchange.nonfinite = &nonfinite;
        bool correct = cuda::all_reduce(exchange, nullptr) == cudaSuccess && nonfinite == 1;
        for (int64_t i = 0; i < given.count; ++i) correct &= std::isnan(reinterpret_cast<float*>(own.data)[i]);
        if (!correct) ++failures, std::puts("a lost rank: not all is NaN");
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (peers.lost() != 3) ++failures, std::puts("a lost rank: not named");
}

}  // namespace
}  // namespace fastagg

int main() {
  fastagg::compare_all();
  fastagg::lose_a_rank();
  std::puts(fastagg::failures == 0 ? "the same bytes on all ranks" : "different bytes");
  return fastagg::failures != 0;
}

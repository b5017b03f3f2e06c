// The operations on the CPU and as CUDA kernels on the CPU, compared byte by byte: a program without Python, for the
// sanitizers, which make an interpreter slow and loud.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "core/sorting_network.h"
#include "core/squared_distances.h"
#include "core/weighted_sum.h"
#include "cpu/operations.h"
#include "cuda/leaf_table.h"

namespace fastagg {
namespace {

constexpr int64_t kSlack = 64;  // bytes around an array that nobody may touch
int failures = 0;

/// An array of its own allocation, `shift` bytes beyond an address aligned for vectors.
class Array {
 public:
  Array(int64_t bytes, int64_t shift) : bytes_(bytes), memory_(bytes + shift + 2 * kSlack, 0x5a) {
    begin_ = kSlack - static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory_.data()) % kSlack) + shift;
  }
  uint8_t* data() { return memory_.data() + begin_; }
  /// The same bytes, and nothing written around them.
  bool operator==(const Array& other) const {
    const auto around = [](const Array& array) {
      for (int64_t i = 0; i < static_cast<int64_t>(array.memory_.size()); ++i)
        if ((i < array.begin_ || i >= array.begin_ + array.bytes_) && array.memory_[i] != 0x5a) return false;
      return true;
    };
    return around(*this) && around(other) &&
           memcmp(memory_.data() + begin_, other.memory_.data() + other.begin_, bytes_) == 0;
  }

 private:
  int64_t bytes_, begin_;
  std::vector<uint8_t> memory_;
};

/// An encoded array with its companion, filled by chance.
struct Encoded {
  Array data, companion;
  Source source;

  Encoded(Code code, int64_t count, uint8_t block_shift, int64_t shift, std::mt19937& random)
      : data(encoded_bytes(code, count), shift * encoded_bytes(code, 1)),
        companion((code == Code::state128 ? 8 : 4) * count, shift * (code == Code::state128  ? 8
                                                                     : code == Code::state48 ? 2
                                                                                             : 4)),
        source{data.data(), companion.data(), code, block_shift} {
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    if (is_integer(code)) {
      for (int64_t i = 0; i < encoded_bytes(code, count); ++i) data.data()[i] = static_cast<uint8_t>(random());
    } else if (code == Code::state48) {
      for (int64_t i = 0; i < count; ++i) {
        const auto bits = bit_cast<uint64_t>(static_cast<double>(values[i]) * 1.1);
        const auto high = static_cast<uint32_t>(bits >> 32);
        const auto low = static_cast<uint16_t>(bits >> 16);
        memcpy(data.data() + 4 * i, &high, sizeof high);
        memcpy(companion.data() + 2 * i, &low, sizeof low);
      }
    } else if (code == Code::state128 || code == Code::float64) {  // more bits than float32 has
      for (int64_t i = 0; i < count; ++i) {
        const double high = values[i] * 1.1, low = values[count - 1 - i] * 0x1p-54;
        memcpy(data.data() + 8 * i, &high, sizeof high);
        if (code == Code::state128) memcpy(companion.data() + 8 * i, &low, sizeof low);
      }
    } else {
      const Source floats{values.data(), nullptr, Code::float32, 0};
      cpu::cast({floats, code, block_shift, Rounding::nearest, {}, count, data.data(), scales()});
    }
  }
  float* scales() { return reinterpret_cast<float*>(companion.data()); }
};

void expect(bool equal, const char* operation, Code from, Code to, int64_t count, int64_t shift) {
  if (equal) return;
  ++failures;
  std::printf("%s of %d elements from code %d to code %d, shifted by %d elements: different\n", operation,
              static_cast<int>(count), static_cast<int>(from), static_cast<int>(to), static_cast<int>(shift));
}

void compare_casts(Code from, Code to, Rounding rounding, int64_t count, uint8_t block_shift, int64_t shift) {
  std::mt19937 random(1);
  Encoded source(from, count, block_shift, shift, random);
  Array out(encoded_bytes(to, count), shift * encoded_bytes(to, 1)), scales(4 * ((count >> block_shift) + 1), 0);
  Array expected_out = out, expected_scales = scales;
  Cast cast{source.source, to,    block_shift, rounding,
            {7, 1, 2, 3},  count, out.data(),  reinterpret_cast<float*>(scales.data())};
  int32_t nonfinite = 0;
  const bool launched = cuda::cast(cast, &nonfinite, nullptr) == cudaSuccess;
  cast.out = expected_out.data(), cast.scales = reinterpret_cast<float*>(expected_scales.data());
  const bool finite = cpu::cast(cast);
  expect(launched && finite == (nonfinite == 0) && out == expected_out && scales == expected_scales, "cast", from, to,
         count, shift);
}

/// One client's code to every result's, as one launch.
void compare_sums(Code from, int clients, int64_t count, uint8_t block_shift, int64_t shift) {
  std::mt19937 random(2);
  std::vector<Encoded> encoded;
  std::vector<Source> sources;
  std::vector<double> weights;
  encoded.reserve(clients);
  for (int k = 0; k < clients; ++k) {
    encoded.emplace_back(k == clients / 2 ? Code::float32 : from, count, block_shift, shift, random);
    sources.push_back(encoded.back().source);
    weights.push_back(1 + static_cast<double>(random() % 100) + (count % 2) * 0.3);
  }
  std::vector<Array> outs, companions, expected_outs, expected_companions;
  std::vector<Leaf> leaves;
  for (int number = 0; number < kCodes; ++number) {
    const auto code = static_cast<Code>(number);
    if (has_scales(code)) continue;
    const int64_t size = code == Code::state128 ? 8 : 2;
    outs.emplace_back(encoded_bytes(code, count), shift * encoded_bytes(code, 1));
    companions.emplace_back(size * count, shift * size);
    leaves.push_back(
        {sources.data(), weights.data(), clients, Fold::mean, code, 100.0, 999, count, nullptr, nullptr, 0x1p-50});
  }
  expected_outs = outs, expected_companions = companions;
  const auto finite = std::make_unique<bool[]>(leaves.size());
  for (size_t i = 0; i < leaves.size(); ++i)
    leaves[i].out = expected_outs[i].data(), leaves[i].companion = expected_companions[i].data();
  cpu::weighted_sum(leaves.data(), static_cast<int64_t>(leaves.size()), finite.get());
  for (size_t i = 0; i < leaves.size(); ++i) leaves[i].out = outs[i].data(), leaves[i].companion = companions[i].data();
  const cuda::LeafTableBuilder builder(leaves.data(), static_cast<int64_t>(leaves.size()));
  std::vector<char> device(builder.bytes());
  cuda::LeafTable table;
  const std::vector<char> bytes = builder.bytes_for(device.data(), &table);
  std::copy(bytes.begin(), bytes.end(), device.begin());
  const bool launched = cuda::weighted_sum(table, nullptr) == cudaSuccess;
  for (size_t i = 0; i < leaves.size(); ++i)
    expect(launched && finite[i] == (table.nonfinite[i] == 0) && outs[i] == expected_outs[i] &&
               companions[i] == expected_companions[i],
           "weighted_sum", from, leaves[i].code, count, shift);
}

/// A window of clients of one code, sorted as they are or mixed, and the distances of all pairs.
void compare_rows(Code from, int clients, int64_t count, uint8_t block_shift, int64_t shift) {
  std::mt19937 random(5);
  std::vector<Encoded> encoded;
  std::vector<Source> sources;
  encoded.reserve(clients);
  for (int k = 0; k < clients; ++k) {
    encoded.emplace_back(k == clients / 2 ? Code::float32 : from, count, block_shift, shift, random);
    sources.push_back(encoded.back().source);
  }
  const std::vector<double> weights(clients, 1.0);
  std::vector<double> mixing(static_cast<size_t>(clients) * clients, 0.25 / (clients - 1));
  for (int k = 0; k < clients; ++k) mixing[k * (clients + 1)] = 0.75;
  const auto network = sorting_network(clients, 0, clients);
  const Code to = has_scales(from) ? Code::float32 : from;
  Array out(encoded_bytes(to, count), shift * encoded_bytes(to, 1)), expected_out = out;
  Leaf leaf{sources.data(), weights.data(), clients, Fold::mean, to, 1.0, 0, count, out.data(), nullptr};
  const cuda::LeafTableBuilder builder(&leaf, 1);
  std::vector<char> device(builder.bytes());
  cuda::LeafTable table;
  const std::vector<char> bytes = builder.bytes_for(device.data(), &table);
  std::copy(bytes.begin(), bytes.end(), device.begin());
  leaf.out = expected_out.data();
  bool finite = true;
  for (int window = 0; window < 4; ++window)
    for (const double* mixed : {static_cast<const double*>(nullptr), static_cast<const double*>(mixing.data())}) {
      const SortedMean op{static_cast<Window>(window),         2, clients, mixed, network.data(),
                          static_cast<int64_t>(network.size())};
      const bool launched = cuda::sorted_mean(op, table, nullptr) == cudaSuccess;
      cpu::sorted_mean(op, &leaf, 1, &finite);
      expect(launched && out == expected_out, "sorted_mean", from, to, count, shift);
    }
  const int64_t entries = int64_t{clients} * clients, parts = distance_parts(builder.tasks(), clients);
  std::vector<double> sums(parts * entries), distances(entries), expected(entries);
  const cuda::Distances op{clients, parts, sums.data(), distances.data()};
  const bool launched = cuda::squared_distances(op, table, nullptr) == cudaSuccess;
  cpu::squared_distances(&leaf, 1, clients, expected.data());
  expect(launched && distances == expected && finite == (table.nonfinite[0] == 0), "squared_distances", from, to, count,
         shift);
}

/// Three ranks' arrays of one code, encoded as another, with error feedback.
void compare_reductions(Code from, Code to, Rounding rounding, int64_t count, uint8_t block_shift, int64_t shift) {
  std::mt19937 random(3);
  std::vector<Encoded> encoded;
  std::vector<Source> sources;
  encoded.reserve(3);
  for (int rank = 0; rank < 3; ++rank) {
    encoded.emplace_back(from, count, block_shift, shift, random);
    sources.push_back(encoded.back().source);
  }
  Array out(encoded_bytes(to, count), shift * encoded_bytes(to, 1)), scales(4 * ((count >> block_shift) + 1), 0);
  Array expected_out = out, expected_scales = scales;
  std::vector<float> residual(count + shift, 0.01f), error(count + shift, 5), expected_error = error;
  const std::vector<Stretch> stretches{{0, 11}, {17, 4096}};
  const auto reduction = [&](Array& codes, Array& blocks, std::vector<float>& taken) {
    Cast result{sources[0],   to,    block_shift,  rounding,
                {7, 1, 2, 3}, count, codes.data(), reinterpret_cast<float*>(blocks.data())};
    result.stretches = stretches.data();
    result.stretch_count = static_cast<int64_t>(stretches.size());
    return Reduction{sources.data(), 3, 3, {residual.data() + shift, 0.5f, taken.data() + shift, 2, true}, result};
  };
  int32_t nonfinite = 0;
  std::vector<double> squares(cuda::kMaximumBlocks);
  const bool launched = cuda::reduce(reduction(out, scales, error), &nonfinite, squares.data(), nullptr) == cudaSuccess;
  double sum = 0, expected_sum = 0;
  for (const double part : squares) sum += part;
  const bool finite = cpu::reduce(reduction(expected_out, expected_scales, expected_error), 0, count, &expected_sum);
  expect(launched && finite == (nonfinite == 0) && std::abs(sum - expected_sum) <= 1e-12 * expected_sum &&
             out == expected_out && scales == expected_scales &&
             memcmp(error.data(), expected_error.data(), error.size() * sizeof(float)) == 0,
         "reduce", from, to, count, shift);
}

/// A step of one leaf, its moments in place.
void compare_steps(Rule rule, Code code, int64_t count, int64_t shift) {
  std::mt19937 random(4);
  const Code moment = code == Code::float64 ? Code::float64 : Code::float32;
  Encoded model(code, count, 0, shift, random), mean(code, count, 0, shift, random);
  Encoded first(moment, count, 0, shift, random), second(moment, count, 0, shift, random);
  const int64_t size = encoded_bytes(moment, 1);
  for (int64_t i = size - 1; i < size * count; i += size) second.data.data()[i] &= 0x7f;  // none is negative
  Array out(encoded_bytes(code, count), shift * encoded_bytes(code, 1));
  Array expected = out, expected_first = first.data, expected_second = second.data;
  const Optimizer optimizer{rule, 0.3, 0.9, 0.99, 1e-3};
  const auto leaf = [&](Array& m, Array& v, Array& result) {
    return ModelLeaf{model.data.data(), mean.data.data(), m.data(), v.data(), result.data(), code, count};
  };
  const ModelLeaf here = leaf(first.data, second.data, out);
  cuda::StepTable table{};
  const auto entries = cuda::step_leaves_of(&here, 1, &table.tasks);
  table.leaves = entries.data();
  table.count = 1;
  const bool launched = cuda::server_step(optimizer, table, nullptr) == cudaSuccess;
  const ModelLeaf there = leaf(expected_first, expected_second, expected);
  cpu::server_step(optimizer, &there, 1);
  expect(launched && out == expected && first.data == expected_first && second.data == expected_second, "server_step",
         code, static_cast<Code>(rule), count, shift);
}

/// All pairs of codes, sizes around a warp, a block of scales and a task, aligned and not.
void compare_all() {
  const auto is_castable = [](Code code) { return !is_integer(code) && !is_state(code); };
  for (int64_t shift = 0; shift < 2; ++shift) {
    for (int64_t count : {33, 1030}) {
      const uint8_t block_shift = count == 33 ? 5 : 8;
      for (int rule = 0; rule < kRules; ++rule)
        for (Code code : {Code::float64, Code::float32, Code::float16, Code::bfloat16})
          compare_steps(static_cast<Rule>(rule), code, count, shift);
      for (int from = 0; from < kCodes; ++from) {
        compare_sums(static_cast<Code>(from), from % 12 + 8, count, block_shift, shift);
        if (!is_state(static_cast<Code>(from)))
          compare_rows(static_cast<Code>(from), from % 12 + 8, count, block_shift, shift);
        for (int to = 0; to < kCodes; ++to)
          if (is_castable(static_cast<Code>(from)) && is_castable(static_cast<Code>(to)))
            for (Rounding rounding : {Rounding::nearest, Rounding::stochastic}) {
              compare_casts(static_cast<Code>(from), static_cast<Code>(to), rounding, count, block_shift, shift);
              if ((from == to || from == static_cast<int>(Code::float32)) && to != static_cast<int>(Code::float64))
                compare_reductions(static_cast<Code>(from), static_cast<Code>(to), rounding, count, block_shift, shift);
            }
      }
    }
  }
}

}  // namespace
}  // namespace fastagg

int main() {
  fastagg::compare_all();
  std::puts(fastagg::failures == 0 ? "the same bytes" : "different bytes");
  return fastagg::failures != 0;
}

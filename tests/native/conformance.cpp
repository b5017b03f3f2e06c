// Runs the operations with every instruction set that the processor has, on awkward sizes and addresses, and compares
// the bytes with the scalar loops'. Then several threads use the pool at once, and a forked child. It needs no Python:
// the sanitizers build it, and an emulator of another processor can run it.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/sorting_network.h"
#include "core/squared_distances.h"
#include "core/weighted_sum.h"
#include "cpu/dispatch.h"
#include "cpu/operations.h"
#include "cpu/thread_pool.h"

namespace {

using fastagg::Code;
using fastagg::Rounding;

constexpr int64_t kSizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 255, 257, 2047, 2049, 4095, 4097, 10001};
constexpr Code kInputs[] = {Code::float64,       Code::float32,   Code::float16,   Code::bfloat16,  Code::wire_fp8_e4m3,
                            Code::wire_fp8_e5m2, Code::wire_int8, Code::wire_int4, Code::wire_sign, Code::int8,
                            Code::uint16,        Code::int64,     Code::state48,   Code::state128};
constexpr Code kResults[] = {Code::float64, Code::float32, Code::float16, Code::bfloat16, Code::state48,
                             Code::int8,    Code::int32,   Code::uint64,  Code::state128};
constexpr Code kWires[] = {Code::float32,       Code::float16,   Code::bfloat16,  Code::float64,  Code::wire_fp8_e4m3,
                           Code::wire_fp8_e5m2, Code::wire_int8, Code::wire_int4, Code::wire_sign};

/// Times any float32 it is a float64, and has as many bits as such a weight can have.
constexpr double kLongestExact = 0x1fffffffp-28;

int failures = 0;
long comparisons = 0;

/// Bytes with room before the first element, so that it need not start a cache line.
struct Buffer {
  std::vector<uint8_t> bytes;
  int64_t offset;

  int64_t size;

  Buffer(int64_t bytes_of_data, int64_t element_offset)
      : bytes(bytes_of_data + 64 + element_offset), offset(element_offset), size(bytes_of_data) {}
  Buffer(const Buffer&) = delete;  // a copy would lie elsewhere in its block
  Buffer(Buffer&&) = default;
  uint8_t* data() { return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64 + offset; }
};

std::mt19937_64& random_bits() {
  static std::mt19937_64 generator(1);
  return generator;
}

/// A normal number of moderate size, now and then zero, subnormal or, if asked, not finite.
float random_float(bool special) {
  const uint64_t bits = random_bits()();
  switch (bits % 97) {
    case 0:
      return 0.0f;
    case 1:
      return -0.0f;
    case 2:
      return fastagg::bit_cast<float>(static_cast<int32_t>(bits >> 43));
    case 3:
      return special ? (bits & 128 ? INFINITY : NAN) : 1.0f;
    default:
      return static_cast<float>(static_cast<double>(static_cast<int64_t>(bits)) * 0x1p-62);
  }
}

/// Bytes of the second plane of sums.
int64_t companion_bytes(Code code, int64_t count) { return (code == Code::state128 ? 8 : 2) * count; }

/// An encoded source with its scales: floats through the scalar `cast`, integers as random bytes.
struct Encoded {
  Buffer data, scales;
  fastagg::Source source;

  Encoded(Code code, int64_t count, int64_t misalignment, bool special)
      : data(fastagg::encoded_bytes(code, count) + 8, misalignment * fastagg::encoded_bytes(code, 1)),
        scales(fastagg::is_state(code) ? companion_bytes(code, count) : 4 * (count / 32 + 1), 0),
        source{data.data(), scales.data(), code, 5} {
    if (fastagg::is_integer(code)) {
      for (int64_t i = 0; i < fastagg::encoded_bytes(code, count); ++i)
        data.data()[i] = static_cast<uint8_t>(random_bits()());
      return;
    }
    if (code == Code::state48) {  // floats fill the upper plane and a little of the lower one
      for (int64_t i = 0; i < count; ++i) {
        const auto bits = fastagg::bit_cast<uint64_t>(static_cast<double>(random_float(special)));
        reinterpret_cast<uint32_t*>(data.data())[i] = static_cast<uint32_t>(bits >> 32);
        reinterpret_cast<uint16_t*>(scales.data())[i] = static_cast<uint16_t>(bits >> 16);
      }
      return;
    }
    if (code == Code::state128) {
      for (int64_t i = 0; i < count; ++i) {
        const double high = random_float(special);
        reinterpret_cast<double*>(data.data())[i] = high;
        reinterpret_cast<double*>(scales.data())[i] = high - high == 0 ? 0x1p-50 * random_float(false) : 0;
      }
      return;
    }
    if (code == Code::float64) {  // more bits than float32 has, and the ends of the range
      for (int64_t i = 0; i < count; ++i) {
        const auto x = static_cast<double>(random_float(special)) * (1 + 0x1p-40 * random_float(false));
        reinterpret_cast<double*>(data.data())[i] = i % 53 == 7 ? x * 0x1p1022 : i % 53 == 11 ? x * 0x1p-1060 : x;
      }
      return;
    }
    std::vector<float> values(count);
    for (float& value : values) value = random_float(special);
    const fastagg::Source floats{values.data(), nullptr, Code::float32, 0};
    fastagg::scalar_kernels->cast(
        {floats, code, 5, Rounding::nearest, {}, count, data.data(), reinterpret_cast<float*>(scales.data())}, 0, count,
        false);
  }
};

void compare(Buffer& expected, Buffer& actual, const char* operation, const char* isa, Code from, Code to,
             int64_t count) {
  ++comparisons;
  if (memcmp(expected.data(), actual.data(), expected.size) == 0) return;
  ++failures;
  std::printf("FAILED: %s with %s, code %d to %d, %ld elements\n", operation, isa, static_cast<int>(from),
              static_cast<int>(to), static_cast<long>(count));
}

/// NaNs' payloads and signs are free: every NaN becomes one NaN before bytes are compared.
void canonicalise(Buffer& buffer, Code code, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (code == Code::float32) {
      float* x = reinterpret_cast<float*>(buffer.data()) + i;
      if (*x != *x) *x = NAN;
    } else if (code == Code::float64) {
      double* x = reinterpret_cast<double*>(buffer.data()) + i;
      if (*x != *x) *x = NAN;
    } else if (code == Code::float16 || code == Code::bfloat16) {
      uint16_t* x = reinterpret_cast<uint16_t*>(buffer.data()) + i;
      if ((*x & 0x7fff) > (code == Code::float16 ? 0x7c00 : 0x7f80)) *x = 0x7fff;
    } else if (code == Code::wire_fp8_e4m3 || code == Code::wire_fp8_e5m2) {
      uint8_t* x = reinterpret_cast<uint8_t*>(buffer.data()) + i;
      if ((*x & 0x7f) > (code == Code::wire_fp8_e4m3 ? 0x7e : 0x7c)) *x = 0x7f;
    }
  }
}

void check_weighted_sum(const fastagg::Kernels& kernels, Code from, Code to, int64_t count, int clients, bool special) {
  if (special && (fastagg::is_integer(to) || fastagg::is_state(to))) return;
  std::vector<Encoded> inputs;
  inputs.reserve(clients);
  std::vector<fastagg::Source> sources;
  std::vector<double> weights;
  for (int k = 0; k < clients; ++k) {
    inputs.emplace_back(from, count, k % 3, special);
    sources.push_back(inputs.back().source);
    weights.push_back(k % 4 == 3 && count % 4 < 2 ? 0.1 * k : k % 4 == 2 ? kLongestExact : 0.5 * k + 1);
  }
  const auto run = [&](const fastagg::Kernels& loops, Buffer& out, Buffer& companion, bool stream) {
    fastagg::Leaf leaf{sources.data(), weights.data(), clients,    fastagg::Fold::mean, to,     4.0,
                       1234,           count,          out.data(), companion.data(),    0x1p-60};
    const bool finite = loops.weighted_sum(leaf, 0, count, stream);
    canonicalise(out, to, count);
    return finite;
  };
  for (const auto& source : sources) {  // a leaf without a destination: whether the client is finite
    const fastagg::Leaf leaf{&source, weights.data(), 1, fastagg::Fold::mean, to, 1, 0, count, nullptr, nullptr};
    if (kernels.weighted_sum(leaf, 0, count, false) != fastagg::scalar_kernels->weighted_sum(leaf, 0, count, false))
      ++failures, std::printf("FAILED: the look for values that are not finite\n");
  }
  const int64_t bytes = fastagg::encoded_bytes(to, count), shift = (count % 3) * fastagg::encoded_bytes(to, 1);
  for (const bool stream : {false, true}) {
    Buffer expected(bytes, shift), actual(bytes, shift), expected_low(companion_bytes(to, count), 0),
        actual_low(companion_bytes(to, count), 0);
    const bool finite = run(*fastagg::scalar_kernels, expected, expected_low, false);
    if (run(kernels, actual, actual_low, stream) != finite) ++failures, std::printf("FAILED: finite flag\n");
    compare(expected, actual, "weighted_sum", kernels.name, from, to, count);
    compare(expected_low, actual_low, "weighted_sum (low)", kernels.name, from, to, count);
  }
}

void check_cast(const fastagg::Kernels& kernels, Code from, Code to, int64_t count, Rounding rounding, bool special) {
  if (fastagg::has_scales(from) && fastagg::has_scales(to)) return;
  Encoded input(from, count, count % 4, special);
  const auto run = [&](const fastagg::Kernels& loops, Buffer& out, Buffer& scales, bool stream) {
    const bool finite = loops.cast(
        {input.source, to, 6, rounding, {42, 1, 2, 3}, count, out.data(), reinterpret_cast<float*>(scales.data())}, 0,
        count, stream);
    canonicalise(out, to, count);
    return finite;
  };
  const int64_t bytes = fastagg::encoded_bytes(to, count), shift = (count % 3) * fastagg::encoded_bytes(to, 1);
  for (const bool stream : {false, true}) {
    Buffer expected(bytes, shift), actual(bytes, shift), expected_scales(4 * (count / 64 + 1), 0),
        actual_scales(4 * (count / 64 + 1), 0);
    const bool finite = run(*fastagg::scalar_kernels, expected, expected_scales, false);
    if (run(kernels, actual, actual_scales, stream) != finite) ++failures, std::printf("FAILED: finite flag\n");
    compare(expected, actual, "cast", kernels.name, from, to, count);
    compare(expected_scales, actual_scales, "cast (scales)", kernels.name, from, to, count);
  }
}

void check_reduce(const fastagg::Kernels& kernels, Code from, Code to, int64_t count, bool special) {
  const int ranks = 1 + static_cast<int>(count % 3);
  std::vector<Encoded> inputs;
  inputs.reserve(ranks);
  std::vector<fastagg::Source> sources;
  for (int rank = 0; rank < ranks; ++rank) {
    inputs.emplace_back(from, count, rank % 3, special);
    sources.push_back(inputs.back().source);
  }
  std::vector<float> residual(count, 0.25f);
  const auto run = [&](const fastagg::Kernels& loops, Buffer& out, Buffer& error, double& squares) {
    std::vector<float> scales(count / 64 + 1);
    fastagg::Cast result{};
    result.code = to;
    result.block_shift = 6;
    result.count = count;
    result.out = out.data();
    result.scales = scales.data();
    const fastagg::Feedback feedback{residual.data(), 0.5f, reinterpret_cast<float*>(error.data()), 2.0f, false};
    const bool finite =
        loops.reduce({sources.data(), ranks, static_cast<float>(ranks), feedback, result}, 0, count, &squares);
    canonicalise(out, to, count);
    canonicalise(error, Code::float32, count);
    if (to == Code::wire_sign && special) {  // has no NaN: one sign for those of the sums
      std::vector<float> sums(count);
      result.code = Code::float32, result.out = sums.data();
      fastagg::scalar_kernels->reduce(
          {sources.data(), ranks, static_cast<float>(ranks), {residual.data(), 0.5f, nullptr, 2.0f, false}, result}, 0,
          count, nullptr);
      for (int64_t i = 0; i < count; ++i)
        if (sums[i] != sums[i]) out.data()[i / 8] |= static_cast<unsigned char>(1 << i % 8);
    }
    return finite;
  };
  const int64_t bytes = fastagg::encoded_bytes(to, count);
  Buffer expected(bytes, 0), actual(bytes, 0), expected_error(4 * count, 0), actual_error(4 * count, 0);
  double expected_squares = 0, squares = 0;
  const bool finite = run(*fastagg::scalar_kernels, expected, expected_error, expected_squares);
  if (run(kernels, actual, actual_error, squares) != finite) ++failures, std::printf("FAILED: finite flag\n");
  if (squares != expected_squares && !(squares != squares && expected_squares != expected_squares))
    ++failures, std::printf("FAILED: squares with %s, code %d\n", kernels.name, static_cast<int>(to));
  compare(expected, actual, "reduce", kernels.name, from, to, count);
  compare(expected_error, actual_error, "reduce (error)", kernels.name, from, to, count);
}

/// Ranks' float64 values, in place of the first rank's.
void check_reduce_float64(const fastagg::Kernels& kernels, int64_t count, bool special) {
  const int ranks = 1 + static_cast<int>(count % 4);
  std::vector<Encoded> inputs;
  inputs.reserve(ranks);
  for (int rank = 0; rank < ranks; ++rank) inputs.emplace_back(Code::float64, count, rank % 3, special);
  const auto run = [&](const fastagg::Kernels& loops, Buffer& out, double& squares) {
    memcpy(out.data(), inputs[0].data.data(), out.size);
    std::vector<const double*> sources{reinterpret_cast<const double*>(out.data())};
    for (int rank = 1; rank < ranks; ++rank)
      sources.push_back(reinterpret_cast<const double*>(inputs[rank].data.data()));
    const bool finite = loops.reduce_float64(sources.data(), ranks, count, ranks, count % 2 ? 0.3 : 0x1p-16,
                                             reinterpret_cast<double*>(out.data()), &squares);
    canonicalise(out, Code::float64, count);
    return finite;
  };
  Buffer expected(8 * count, 0), actual(8 * count, 8);
  double expected_squares = 0, squares = 0;
  const bool finite = run(*fastagg::scalar_kernels, expected, expected_squares);
  if (run(kernels, actual, squares) != finite) ++failures, std::printf("FAILED: finite flag\n");
  if (squares != expected_squares && !(squares != squares && expected_squares != expected_squares))
    ++failures, std::printf("FAILED: squares of float64 with %s\n", kernels.name);
  compare(expected, actual, "reduce_float64", kernels.name, Code::float64, Code::float64, count);
}

void check_server_step(const fastagg::Kernels& kernels, fastagg::Rule rule, Code code, int64_t count, bool special) {
  const Code moment = code == Code::float64 ? Code::float64 : Code::float32;
  const int64_t size = fastagg::encoded_bytes(code, count), shift = (count % 3) * fastagg::encoded_bytes(code, 1);
  Encoded model(code, count, count % 4, special), mean(code, count, count % 2, special);
  Encoded first(moment, count, count % 3, false), second(moment, count, 1, false);
  for (int64_t i = 0; i < fastagg::encoded_bytes(moment, count); ++i)  // no second moment is negative
    if (i % fastagg::encoded_bytes(moment, 1) == fastagg::encoded_bytes(moment, 1) - 1) second.data.data()[i] &= 0x7f;
  const auto run = [&](const fastagg::Kernels& loops, Buffer& out, Buffer& m, Buffer& v, bool stream) {
    memcpy(m.data(), first.data.data(), m.size);
    memcpy(v.data(), second.data.data(), v.size);
    loops.server_step({rule, 0.3, 0.9, 0.99, 1e-3},
                      {model.data.data(), mean.data.data(), m.data(), v.data(), out.data(), code, count}, 0, count,
                      stream);
    canonicalise(out, code, count);
    canonicalise(m, moment, count);
    canonicalise(v, moment, count);
  };
  const int64_t moment_size = fastagg::encoded_bytes(moment, count);
  for (const bool stream : {false, true}) {
    Buffer expected(size, shift), actual(size, shift), expected_m(moment_size, 0), actual_m(moment_size, 0),
        expected_v(moment_size, 0), actual_v(moment_size, 0);
    run(*fastagg::scalar_kernels, expected, expected_m, expected_v, false);
    run(kernels, actual, actual_m, actual_v, stream);
    const auto number = static_cast<Code>(rule);  // what the report shows
    compare(expected, actual, "server_step", kernels.name, code, number, count);
    compare(expected_m, actual_m, "server_step (first moment)", kernels.name, code, number, count);
    compare(expected_v, actual_v, "server_step (second moment)", kernels.name, code, number, count);
  }
}

/// The network and the divisor of a window.
struct WindowOf {
  std::vector<fastagg::Comparator> network;
  fastagg::SortedMean op;
  double divisor;

  WindowOf(fastagg::Window window, int rows, int left_out, const double* mixing)
      : network(fastagg::sorting_network(rows, 0, rows)),
        op{window, left_out, rows, mixing, network.data(), static_cast<int64_t>(network.size())},
        divisor(window == fastagg::Window::middle    ? 2 - rows % 2
                : window == fastagg::Window::trimmed ? rows - 2 * left_out
                                                     : rows - left_out) {}
};

/// Clients of one code, half of the time beside float32 ones, as they are and mixed in pairs.
void check_rows(const fastagg::Kernels& kernels, Code from, Code to, int64_t count, int clients, bool special) {
  std::vector<Encoded> encoded;
  std::vector<fastagg::Source> sources;
  encoded.reserve(clients);
  for (int k = 0; k < clients; ++k) {
    encoded.emplace_back(k % 3 == 1 && count % 2 == 1 ? Code::float32 : from, count, k % 4, special);
    sources.push_back(encoded.back().source);
  }
  std::vector<double> mixing(static_cast<size_t>(clients) * clients);
  for (int k = 0; k < clients; ++k) mixing[k * clients + k] = 0.75, mixing[k * clients + (k + 1) % clients] += 0.25;
  std::vector<double> scratch(fastagg::kTileBytes / 8);  // of any tile of few rows
  const int64_t size = fastagg::encoded_bytes(to, count);
  for (int window = 0; window < 4; ++window)
    for (const bool mixed : {false, true}) {
      const WindowOf rule(static_cast<fastagg::Window>(window), clients, (clients - 1) / 3,
                          mixed && !special ? mixing.data() : nullptr);
      const auto run = [&](const fastagg::Kernels& loops, Buffer& out) {
        const fastagg::Leaf leaf{sources.data(), nullptr,     clients, fastagg::Fold::mean, to,
                                 rule.divisor,   uint16_t{0}, count,   out.data(),          nullptr};
        return loops.sorted_mean(rule.op, leaf, 0, count, scratch.data(), mixed);
      };
      Buffer expected(size, 0), actual(size, 0);
      const bool finite = run(*fastagg::scalar_kernels, expected);
      if (run(kernels, actual) != finite) ++failures, std::printf("FAILED: finite flag\n");
      canonicalise(expected, to, count), canonicalise(actual, to, count);
      compare(expected, actual, "sorted_mean", kernels.name, from, to, count);
    }
  Buffer expected(8 * clients * clients, 0), actual(8 * clients * clients, 0);
  const fastagg::Leaf leaf{sources.data(), nullptr, clients, fastagg::Fold::mean, to, 1, 0, count, nullptr, nullptr};
  fastagg::scalar_kernels->squared_distances(leaf, 0, count, scratch.data(),
                                             reinterpret_cast<double*>(expected.data()));
  kernels.squared_distances(leaf, 0, count, scratch.data(), reinterpret_cast<double*>(actual.data()));
  canonicalise(expected, Code::float64, clients * clients), canonicalise(actual, Code::float64, clients * clients);
  compare(expected, actual, "squared_distances", kernels.name, from, to, count);
}

void check_statistics(const fastagg::Kernels& kernels, Code from, Code to, int64_t count, int clients, bool special) {
  std::vector<Encoded> inputs;
  inputs.reserve(clients);
  std::vector<fastagg::Source> sources;
  for (int k = 0; k < clients; ++k) {
    inputs.emplace_back(from, count, k % 3, special && k % 2 == 0);
    sources.push_back(inputs.back().source);
  }
  const std::vector<double> weights(clients, 0.75);
  const fastagg::Measurement measurement{sources.data(), clients, fastagg::is_state(to) ? 0.25 : 1.0};
  const auto run = [&](const fastagg::Kernels& loops, Buffer& out, Buffer& companion, bool stream, Buffer& moments) {
    const fastagg::Leaf leaf{sources.data(), weights.data(), clients,    fastagg::Fold::mean, to, 3.0,
                             1234,           count,          out.data(), companion.data()};
    std::vector<fastagg::Moments> found(clients);
    const bool finite = loops.statistics(leaf, measurement, 0, count, stream, found.data());
    memcpy(moments.data(), found.data(), moments.size);
    canonicalise(out, to, count);
    canonicalise(moments, Code::float64, clients * fastagg::kMoments);
    return finite;
  };
  const int64_t bytes = fastagg::encoded_bytes(to, count), shift = (count % 3) * fastagg::encoded_bytes(to, 1);
  const int64_t moments_bytes = clients * static_cast<int64_t>(sizeof(fastagg::Moments));
  for (const bool stream : {false, true}) {
    Buffer expected(bytes, shift), actual(bytes, shift), expected_low(companion_bytes(to, count), 0),
        actual_low(companion_bytes(to, count), 0), expected_moments(moments_bytes, 0), actual_moments(moments_bytes, 0);
    const bool finite = run(*fastagg::scalar_kernels, expected, expected_low, false, expected_moments);
    if (run(kernels, actual, actual_low, stream, actual_moments) != finite)
      ++failures, std::printf("FAILED: finite flag\n");
    if (!(special && fastagg::is_state(to))) compare(expected, actual, "statistics", kernels.name, from, to, count);
    if (!special) compare(expected_low, actual_low, "statistics (low)", kernels.name, from, to, count);
    compare(expected_moments, actual_moments, "statistics (moments)", kernels.name, from, to, count);
  }
}

void check_isa(const std::string& name) {
  fastagg::force_isa(name);
  const fastagg::Kernels& kernels = fastagg::kernels();
  const long before = comparisons;
  for (const int64_t count : kSizes) {
    for (const Code from : kInputs)
      for (const Code to : kResults)
        for (const bool special : {false, true}) check_weighted_sum(kernels, from, to, count, 1 + count % 19, special);
    for (const Code from : kInputs)
      for (const Code to : kWires) {
        if (fastagg::is_integer(from) || fastagg::is_state(from)) continue;
        for (const bool special : {false, true})
          for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic})
            check_cast(kernels, from, to, count, rounding, special);
        for (const bool special : {false, true}) check_reduce(kernels, from, to, count, special);
      }
    for (const Code from : kInputs)
      if (!fastagg::is_state(from))
        for (const bool special : {false, true})
          check_rows(kernels, from, fastagg::has_scales(from) ? Code::float32 : from, count, 1 + count % 19, special);
    for (const Code from : kInputs)
      for (const Code to : {Code::float64, Code::float32, Code::bfloat16, Code::state48, Code::state128})
        for (const bool special : {false, true})
          if (!fastagg::is_integer(from) && !fastagg::is_state(from))
            check_statistics(kernels, from, to, count, 1 + count % 5, special);
    for (const bool special : {false, true}) check_reduce_float64(kernels, count, special);
    for (int rule = 0; rule < fastagg::kRules; ++rule)
      for (const Code code : {Code::float64, Code::float32, Code::float16, Code::bfloat16})
        for (const bool special : {false, true})
          check_server_step(kernels, static_cast<fastagg::Rule>(rule), code, count, special);
  }
  std::printf("%-7s %ld comparisons with the scalar loops\n", name.c_str(), comparisons - before);
}

/// Threads that want the pool at the same time, and a child that was forked after its use.
void check_threads() {
  constexpr int64_t count = 1 << 20;
  std::vector<float> x(count, 1.0f), y(count, 3.0f);
  const auto mean_is_right = [&] {
    const fastagg::Source sources[] = {{x.data(), nullptr, Code::float32, 0}, {y.data(), nullptr, Code::float32, 0}};
    const double weights[] = {0.5, 0.5};
    std::vector<float> out(count);
    const fastagg::Leaf leaf{sources, weights, 2, fastagg::Fold::mean, Code::float32, 1, 0, count, out.data(), nullptr};
    bool finite;
    fastagg::cpu::weighted_sum(&leaf, 1, &finite);
    for (const float mean : out)
      if (mean != 2.0f) return false;
    return finite;
  };
  for (const int threads : {1, 2, 3, 7, 2}) {
    fastagg::set_num_threads(threads);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
      callers.emplace_back([&] {
        for (int round = 0; round < 5; ++round)
          if (!mean_is_right()) __atomic_fetch_add(&failures, 1, __ATOMIC_RELAXED);
      });
    for (std::thread& caller : callers) caller.join();
  }
  const pid_t child = fork();
  if (child == 0) _exit(mean_is_right() ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  if (status != 0) ++failures, std::printf("FAILED: a forked child\n");
  std::printf("threads and fork done\n");
}

}  // namespace

/// With any argument, the threads alone.
int main(int arguments, char**) {
  if (arguments == 1)
    for (const std::string& name : fastagg::available_isas()) check_isa(name);
  check_threads();
  std::printf("%ld comparisons, %d failed\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}

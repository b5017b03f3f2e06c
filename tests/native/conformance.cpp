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
                            Code::uint16,        Code::int64,     Code::state48};
constexpr Code kResults[] = {Code::float64, Code::float32, Code::float16, Code::bfloat16,
                             Code::state48, Code::int8,    Code::int32,   Code::uint64};
constexpr Code kWires[] = {Code::float32,       Code::float16,   Code::bfloat16,  Code::float64,  Code::wire_fp8_e4m3,
                           Code::wire_fp8_e5m2, Code::wire_int8, Code::wire_int4, Code::wire_sign};

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

/// An encoded source with its scales: floats through the scalar `cast`, integers as random bytes.
struct Encoded {
  Buffer data, scales;
  fastagg::Source source;

  Encoded(Code code, int64_t count, int64_t misalignment, bool special)
      : data(fastagg::encoded_bytes(code, count) + 8, misalignment * fastagg::encoded_bytes(code, 1)),
        scales(code == Code::state48 ? 2 * count : 4 * (count / 32 + 1), 0),
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

/// NaNs' payloads are free: every NaN becomes one NaN before bytes are compared.
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
    }
  }
}

void check_weighted_sum(const fastagg::Kernels& kernels, Code from, Code to, int64_t count, int clients, bool special) {
  if (special && (fastagg::is_integer(to) || to == Code::state48)) return;
  std::vector<Encoded> inputs;
  inputs.reserve(clients);
  std::vector<fastagg::Source> sources;
  std::vector<double> weights;
  for (int k = 0; k < clients; ++k) {
    inputs.emplace_back(from, count, k % 3, special);
    sources.push_back(inputs.back().source);
    weights.push_back(k % 4 == 3 && count % 4 < 2 ? 0.1 * k : 0.5 * k + 1);
  }
  const auto run = [&](const fastagg::Kernels& loops, Buffer& out, Buffer& companion, bool stream) {
    fastagg::Leaf leaf{sources.data(), weights.data(), clients,    fastagg::Fold::mean, to, 4.0,
                       1234,           count,          out.data(), companion.data()};
    const bool finite = loops.weighted_sum(leaf, 0, count, stream);
    canonicalise(out, to, count);
    return finite;
  };
  const int64_t bytes = fastagg::encoded_bytes(to, count), shift = (count % 3) * fastagg::encoded_bytes(to, 1);
  for (const bool stream : {false, true}) {
    Buffer expected(bytes, shift), actual(bytes, shift), expected_low(2 * count, 0), actual_low(2 * count, 0);
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
        if (fastagg::is_integer(from) || from == Code::state48) continue;
        for (const bool special : {false, true})
          for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic})
            check_cast(kernels, from, to, count, rounding, special);
        for (const bool special : {false, true}) check_reduce(kernels, from, to, count, special);
      }
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

int main() {
  for (const std::string& name : fastagg::available_isas()) check_isa(name);
  check_threads();
  std::printf("%ld comparisons, %d failed\n", comparisons, failures);
  return failures == 0 ? 0 : 1;
}

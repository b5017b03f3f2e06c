// The loops of `reduce`, compiled once for each instruction set: sums that stay float32 are written at once; others
// stay in the first-level cache while they are encoded, and are decoded again where the error or the norm is wanted.
#pragma once
#include "cast.h"
#include "core/reduce.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// A rank's elements from index i on as float32; for a rank alone as `cast` does it, so that they are rounded once.
template <class Lanes, Code code>
FASTAGG_INLINE typename Lanes::F load_narrow(const Source& source, int64_t i, bool alone, Code result) {
  if constexpr (code == Code::float64) {
    typename Lanes::D wide[Lanes::halves];
    load_wide<Lanes, code>(source, i, wide);
    return alone ? narrow_for<Lanes>(result, wide) : Lanes::narrow(wide);
  } else {
    return load_scaled<Lanes, code>(source, i);
  }
}

/// out[i ...] = the quotients of op's elements begin + i ..., `vectors` at a time up to count; returns where it
/// stopped.
template <class Lanes, Code code, int vectors>
FASTAGG_INLINE int64_t add_vectors(const Reduction& op, float* out, int64_t begin, int64_t i, int64_t count,
                                   int32_t& largest) {
  using F = typename Lanes::F;
  const Feedback feedback = op.feedback;
  const bool alone = op.ranks == 1 && feedback.residual == nullptr;
  const float divisor = op.divisor, inverse = exact_inverse(divisor);
  typename Lanes::I magnitudes{};
  for (; i + vectors * Lanes::width <= count; i += vectors * Lanes::width) {
    F sums[vectors];
    for (F& sum : sums) sum = -F{};
    for (const Source *source = op.sources, *end = source + op.ranks; source != end; ++source)
      for (int v = 0; v < vectors; ++v)
        sums[v] = sums[v] + load_narrow<Lanes, code>(*source, begin + i + v * Lanes::width, alone, op.result.code);
    if (feedback.residual != nullptr)
      for (int v = 0; v < vectors; ++v)
        sums[v] =
            sums[v] + Lanes::load_float32(feedback.residual, begin + i + v * Lanes::width) * feedback.residual_factor;
    for (int v = 0; v < vectors; ++v) {
      sums[v] = inverse != 0 ? sums[v] * inverse : sums[v] / divisor;
      raise(magnitudes, sums[v]);
      store_bytes(out + i + v * Lanes::width, sums[v]);
    }
  }
  const int32_t here = maximum<Lanes>(magnitudes);
  largest = here > largest ? here : largest;
  return i;
}

/// The quotients of op's elements [begin, begin + count) to out; returns the largest magnitude.
template <class Lanes>
int32_t add_up(const Reduction& op, float* out, int64_t begin, int64_t count) {
  int32_t largest = 0;
  with_code(op.sources[0].code, [&](auto constant) {
    constexpr Code code = constant.value;
    if constexpr (!is_state(code) && !is_integer(code)) {
      const int64_t done = add_vectors<Lanes, code, 4>(op, out, begin, 0, count, largest);
      add_vectors<Lane, code, 1>(op, out, begin, done, count, largest);
    }
  });
  return largest;
}

/// Adds the squares of x to their strides.
template <class Lanes>
void add_squares(const float* x, int64_t count, double (&strides)[kSquareStrides]) {
  constexpr int vectors = kSquareStrides / Lanes::width, half = Lanes::width / Lanes::halves;
  using D = typename Lanes::D;
  D sums[vectors][Lanes::halves];
  for (int v = 0; v < vectors; ++v)
    for (int h = 0; h < Lanes::halves; ++h) sums[v][h] = load_bytes<D>(strides + v * Lanes::width + h * half);
  int64_t i = 0;
  for (; i + kSquareStrides <= count; i += kSquareStrides)
    for (int v = 0; v < vectors; ++v) {
      D wide[Lanes::halves];
      Lanes::widen(load_bytes<typename Lanes::F>(x + i + v * Lanes::width), wide);
      for (int h = 0; h < Lanes::halves; ++h) sums[v][h] = sums[v][h] + wide[h] * wide[h];
    }
  for (int v = 0; v < vectors; ++v)
    for (int h = 0; h < Lanes::halves; ++h) store_bytes(strides + v * Lanes::width + h * half, sums[v][h]);
  for (int stride = 0; i < count; ++i, ++stride) strides[stride] += static_cast<double>(x[i]) * x[i];
}

/// Writes what encoding has taken from the values.
inline void keep_error(const Feedback& feedback, const float* values, const float* decoded, int64_t begin,
                       int64_t count) {
  float* error = feedback.error + begin;
  if (feedback.raise) {
    for (int64_t i = 0; i < count; ++i) error[i] = error[i] + (values[i] - decoded[i]) * feedback.error_factor;
  } else {
    for (int64_t i = 0; i < count; ++i) error[i] = (values[i] - decoded[i]) * feedback.error_factor;
  }
}

/// Whether the quotients are the first rank's values.
inline bool is_its_own_sum(const Reduction& op) {
  return op.ranks == 1 && op.sources[0].code == Code::float32 && op.feedback.residual == nullptr && op.divisor == 1;
}

/// `reduce` of the elements [begin, end), `begin` a multiple of kChunk; true if the result is finite. Adds the result's
/// sum of squares to *squares, if there is one.
template <class Lanes>
bool reduce(const Reduction& op, int64_t begin, int64_t end, double* squares) {
  alignas(64) float values[kChunk], decoded[kChunk];
  double strides[kSquareStrides] = {};
  int32_t largest = 0;
  Cast back{};
  back.source = {op.result.out, op.result.scales, op.result.code, op.result.block_shift};
  back.code = Code::float32;
  const bool is_encoded = op.result.code != Code::float32, passes_through = is_encoded && is_its_own_sum(op);
  for (; begin < end; begin += kChunk) {
    const int64_t count = end - begin < kChunk ? end - begin : kChunk;
    float* out = is_encoded ? values : static_cast<float*>(op.result.out) + begin;
    const float* sums = passes_through ? static_cast<const float*>(op.sources[0].data) + begin : out;
    const float* result = is_encoded ? decoded : sums;
    int32_t here = 0;
    if (!passes_through) here = add_up<Lanes>(op, out, begin, count);
    if (is_encoded) here = encode_any<Lanes>(op.result, sums, 1, begin, count, false);
    largest = here > largest ? here : largest;
    if (squares == nullptr && op.feedback.error == nullptr) continue;
    if (is_encoded) decode_any<Lanes>(back, decoded, begin, 0, count, false);
    if (squares != nullptr) add_squares<Lanes>(result, count, strides);
    if (op.feedback.error != nullptr) keep_error(op.feedback, sums, result, begin, count);
  }
  if (squares != nullptr) *squares += sum_of_strides(strides);
  return largest < overflow_from(op.result.code);
}

}  // namespace
}  // namespace fastagg

// The loops of `reduce`, compiled once for each instruction set: a chunk of sums stays in the first-level cache while
// it is encoded, and decoded again where the error or the norm of the result is wanted.
#pragma once
#include "cast.h"
#include "core/reduce.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// A rank's elements from index i on as float32; for a rank alone as `cast` does it, so that they are rounded once.
template <class Lanes, Code code>
FASTAGG_INLINE typename Lanes::F load_narrow(const Reduction& op, int rank, int64_t i) {
  const Source& source = op.sources[rank];
  if constexpr (code == Code::float64) {
    typename Lanes::D wide[Lanes::halves];
    load_wide<Lanes, code>(source, i, wide);
    const bool alone = op.ranks == 1 && op.feedback.residual == nullptr;
    return alone ? narrow_for<Lanes>(op.result.code, wide) : Lanes::narrow(wide);
  } else {
    typename Lanes::F x = load<Lanes, code>(source.data, i);
    if constexpr (has_scales(code)) x = x * scale_at<code>(source, i);
    return x;
  }
}

/// values[i ...] = the quotients of op's elements begin + i ..., in whole vectors up to count; returns where it
/// stopped.
template <class Lanes, Code code>
FASTAGG_INLINE int64_t add_vectors(const Reduction& op, float inverse, float* values, int64_t begin, int64_t i,
                                   int64_t count) {
  using F = typename Lanes::F;
  for (; i + Lanes::width <= count; i += Lanes::width) {
    const int64_t at = begin + i;
    F sum = -F{};
    for (int rank = 0; rank < op.ranks; ++rank) {
      sum = sum + load_narrow<Lanes, code>(op, rank, at);
    }
    if (op.feedback.residual != nullptr)
      sum = sum + Lanes::load_float32(op.feedback.residual, at) * op.feedback.residual_factor;
    store_bytes(values + i, inverse != 0 ? sum * inverse : sum / op.divisor);
  }
  return i;
}

template <class Lanes>
void add_up(const Reduction& op, float* values, int64_t begin, int64_t count) {
  const float inverse = exact_inverse(op.divisor);
  with_code(op.sources[0].code, [&](auto constant) {
    constexpr Code code = constant.value;
    if constexpr (code != Code::state48 && !is_integer(code)) {
      const int64_t done = add_vectors<Lanes, code>(op, inverse, values, begin, 0, count);
      add_vectors<Lane, code>(op, inverse, values, begin, done, count);
    }
  });
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

/// `reduce` of the elements [begin, end), `begin` a multiple of kChunk; true if the result is finite. Adds the result's
/// sum of squares to *squares, if there is one.
template <class Lanes>
bool reduce(const Reduction& op, int64_t begin, int64_t end, bool stream, double* squares) {
  alignas(64) float values[kChunk], decoded[kChunk];
  double strides[kSquareStrides] = {};
  int32_t largest = 0;
  Cast back{};
  back.source = {op.result.out, op.result.scales, op.result.code, op.result.block_shift};
  back.code = Code::float32;
  for (; begin < end; begin += kChunk) {
    const int64_t count = end - begin < kChunk ? end - begin : kChunk;
    add_up<Lanes>(op, values, begin, count);
    const int32_t here = encode_any<Lanes>(op.result, values, 1, begin, count, stream);
    largest = here > largest ? here : largest;
    if (squares == nullptr && op.feedback.error == nullptr) continue;
    decode_any<Lanes>(back, decoded, begin, 0, count, false);
    if (squares != nullptr) add_squares<Lanes>(decoded, count, strides);
    if (op.feedback.error != nullptr) keep_error(op.feedback, values, decoded, begin, count);
  }
  if (squares != nullptr) *squares += sum_of_strides(strides);
  return largest < overflow_from(op.result.code);
}

}  // namespace
}  // namespace fastagg

// Block scales of the low-bit wires: powers of two (the mean magnitude for sign), so that decoding is exact.
#pragma once
#include "types.h"

namespace fastagg {

/// The largest integer or float that a wire's code can hold: significand * 2^exponent with 1 <= significand < 2.
struct Extreme {
  float significand;
  int exponent;
};

FASTAGG_INLINE Extreme extreme(Code wire) {
  switch (wire) {
    case Code::wire_fp8_e4m3:
      return {1.75f, 8};  // 448
    case Code::wire_fp8_e5m2:
      return {1.75f, 15};  // 57344
    case Code::wire_int8:
      return {127.0f / 64, 6};
    default:
      return {1.75f, 2};  // int4: 7
  }
}

/// Exponent of the smallest power of two s with largest <= extreme * s: a block's largest value never saturates.
FASTAGG_INLINE int scale_exponent(float largest, Code wire) {
  if (largest == 0) return 0;
  const int32_t bits = bit_cast<int32_t>(largest);
  int exponent = (bits >> 23) - 127;
  int32_t significand = (bits & 0x7fffff) | 0x3f800000;
  if (bits < 0x800000) {  // subnormal: normalise by an exact product
    const int32_t scaled = bit_cast<int32_t>(largest * 16777216.0f);
    exponent = (scaled >> 23) - 127 - 24;
    significand = (scaled & 0x7fffff) | 0x3f800000;
  }
  const Extreme top = extreme(wire);
  exponent += (bit_cast<float>(significand) > top.significand) - top.exponent;
  return exponent < -149 ? -149 : exponent;
}

/// The largest multiple of a scale's codes that the dtype of the values can hold: rounding up to its next power of two
/// would make a finite value infinite.
FASTAGG_INLINE float ceiling_of(Code wire, int exponent, Code source) {
  const int32_t top = source == Code::float16    ? 0x477fe000   // 65504
                      : source == Code::bfloat16 ? 0x7f7f0000   // 2^128 - 2^120
                                                 : 0x7f7fffff;  // 2^128 - 2^104
  int kept;                                                     // bits of the significand, the leading one left out
  if (wire == Code::wire_fp8_e4m3) kept = 3;
  else if (wire == Code::wire_fp8_e5m2) kept = 2;
  else kept = (top >> 23) - 127 - exponent;
  if (kept < 0 || kept >= 23) return bit_cast<float>(top);
  return bit_cast<float>(top & ~((1 << (23 - kept)) - 1));
}

/// 2^exponent for -149 <= exponent <= 127, subnormal results included.
FASTAGG_INLINE float scale_of(int exponent) {
  return exponent < -126 ? bit_cast<float>(1 << (exponent + 149)) : bit_cast<float>((exponent + 127) << 23);
}

/// x, or the ceiling with its sign if it is finite and beyond.
FASTAGG_INLINE float clamp_finite(float x, float ceiling) {
  const int32_t magnitude = bit_cast<int32_t>(x) & 0x7fffffff, top = bit_cast<int32_t>(ceiling);
  if (magnitude <= top || magnitude >= 0x7f800000) return x;
  return bit_cast<float>(top | (bit_cast<int32_t>(x) & INT32_MIN));
}

/// Two floats whose product with x is x / 2^exponent: one alone would overflow for the smallest scales.
struct Inverse { float first, second; };

FASTAGG_INLINE Inverse inverse_of(int exponent) {
  const int first = exponent < -126 ? 126 : -exponent;
  return {bit_cast<float>((first + 127) << 23), bit_cast<float>((-exponent - first + 127) << 23)};
}

/// Strided partial sums of |x| in a sign block: fixed, so that every backend adds in one order.
constexpr int kSignStrides = 16;

/// A sign block's scale: its mean magnitude; NaN marks a block that is not finite.
FASTAGG_INLINE float mean_magnitude(double sum, int64_t count) {
  const double mean = sum / static_cast<double>(count);
  return mean * 0.0 == 0 ? static_cast<float>(mean) : bit_cast<float>(0x7fc00000);
}

/// The same from a block's strided sums: a fixed tree.
FASTAGG_INLINE float sign_scale(double* sums, int64_t count) {
  for (int width = kSignStrides / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return mean_magnitude(sums[0], count);
}

}  // namespace fastagg

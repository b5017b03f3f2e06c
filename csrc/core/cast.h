// The arithmetic of `cast`: from any floating code to any other, through float32.
#pragma once
#include "philox.h"
#include "weighted_sum.h"

namespace fastagg {

/// The smallest magnitude, as float32 bits, that a code turns into infinity or NaN: halfway beyond its largest value.
constexpr FASTAGG_INLINE int32_t overflow_from(Code code) {
  if (code == Code::float16) return 0x477ff000;   // 65520
  if (code == Code::bfloat16) return 0x7f7f8000;  // 2^128 - 2^119
  return 0x7f800000;
}

/// The largest magnitude of a code, as float32 bits.
constexpr FASTAGG_INLINE int32_t largest_of(Code code) {
  if (code == Code::float16) return 0x477fe000;   // 65504
  if (code == Code::bfloat16) return 0x7f7f0000;  // 2^128 - 2^120
  return 0x7f7fffff;
}

/// A value beyond the largest as what nearest rounding makes of it, the largest or infinity: nothing there is left to
/// chance.
template <Code code, class F, class I>
FASTAGG_INLINE F settle_overflow(F x) {
  const I magnitude = bit_cast<I>(x) & 0x7fffffff;
  const I settled = magnitude < overflow_from(code) ? I{} + largest_of(code) : I{} + 0x7f800000;
  const auto beyond = (magnitude > largest_of(code)) & (magnitude < 0x7f800000);
  return bit_cast<F>(beyond ? settled | (bit_cast<I>(x) & INT32_MIN) : bit_cast<I>(x));
}

/// Encodes float32 as a 16-bit or 8-bit float.
template <Code code, Rounding rounding, class F, class I>
FASTAGG_INLINE I encode(F x, I random) {
  if constexpr (rounding == Rounding::stochastic) x = settle_overflow<code, F, I>(x);
  if constexpr (code == Code::float16) return encode_float<Float16, rounding, F, I>(x, random);
  if constexpr (code == Code::bfloat16) return encode_bfloat16<rounding, F, I>(x, random);
  if constexpr (code == Code::wire_fp8_e4m3) return encode_float<Float8E4M3, rounding, F, I>(x, random);
  if constexpr (code == Code::wire_fp8_e5m2) return encode_float<Float8E5M2, rounding, F, I>(x, random);
}

/// Doubles as the float32 that will be encoded as `code`: rounded to odd where they will be rounded once more.
template <class Lanes>
FASTAGG_INLINE typename Lanes::F narrow_for(Code code, typename Lanes::D (&x)[Lanes::halves]) {
  if (code == Code::float32) return Lanes::narrow(x);
  return code == Code::bfloat16 ? narrow_to_odd_for_bfloat16<Lanes>(x) : narrow_to_odd<Lanes>(x);
}

FASTAGG_INLINE float magnitude_of(float x) { return bit_cast<float>(bit_cast<int32_t>(x) & 0x7fffffff); }

}  // namespace fastagg

// Conversions between float32 and narrower floats. `F` is float or a vector of floats, `I` the int32 of the same shape:
// the same expressions serve scalars, SIMD lanes and CUDA threads.
#pragma once
#include "types.h"

namespace fastagg {

/// A narrow float: stored mantissa bits, exponent of its smallest normal, codes without their sign bit.
struct Float16 {
  static constexpr int mantissa = 10, minimum_exponent = -14, sign = 0x8000;
  static constexpr int largest = 0x7bff, infinity = 0x7c00, nan = 0x7e00;
};
struct Float8E5M2 {
  static constexpr int mantissa = 2, minimum_exponent = -14, sign = 0x80;
  static constexpr int largest = 0x7b, infinity = 0x7c, nan = 0x7e;
};
struct Float8E4M3 {  // the "fn" variant of OCP and torch: no infinity, overflow becomes NaN
  static constexpr int mantissa = 3, minimum_exponent = -6, sign = 0x80;
  static constexpr int largest = 0x7e, infinity = 0x7f, nan = 0x7f;
};

/// A scalar in every lane: minus zero leaves it alone, its sign included.
template <class To, class T>
FASTAGG_INLINE To broadcast(T x) {
  return x - To{};
}

/// A uniform number strictly between 0 and 1, the midpoint of one of 2^23 cells, from 32 random bits.
template <class F, class I>
FASTAGG_INLINE F uniform(I random) {
  const F one_to_two = bit_cast<F>(((random >> 9) & 0x007fffff) | 0x3f800000);
  return one_to_two - 0.99999994f;  // 1 - 2^-24
}

/// Non-negative t < 2^22 rounded to an integer: to nearest even, or up with a probability of t's fraction.
template <Rounding rounding, class F, class I>
FASTAGG_INLINE I round_to_integer(F t, I random) {
  const F shifted = t + 8388608.0f;  // 2^23: the sum's last bit is the unit
  const I nearest = bit_cast<I>(shifted) - 0x4b000000;
  if constexpr (rounding == Rounding::nearest) {
    return nearest;
  } else {
    const F whole = shifted - 8388608.0f;
    const I floor = nearest - (whole > t ? I{} + 1 : I{});
    const F below = whole - (whole > t ? F{} + 1.0f : F{});
    return floor + (uniform<F, I>(random) < t - below ? I{} + 1 : I{});
  }
}

/// float32 to a narrow float's code. Overflow becomes infinity, NaN stays NaN, subnormals are kept.
template <class Format, Rounding rounding, class F, class I>
FASTAGG_INLINE I encode_float(F x, I random) {
  constexpr int smallest = 127 + Format::minimum_exponent;
  const I bits = bit_cast<I>(x);
  const I magnitude = bits & 0x7fffffff;
  const I biased = magnitude >> 23;
  const I exponent = biased > smallest ? biased : I{} + smallest;
  // In units of the last place: below 2^(mantissa + 1), with the implicit bit of a normal number.
  const F units = bit_cast<F>(magnitude) * bit_cast<F>((254 + Format::mantissa - exponent) << 23);
  const I code = ((exponent - smallest) << Format::mantissa) + round_to_integer<rounding, F, I>(units, random);
  const I finite = code > Format::largest ? I{} + Format::infinity : code;
  const I special = magnitude > 0x7f800000 ? I{} + Format::nan : I{} + Format::infinity;
  const I sign = (bits >> (Format::sign == 0x80 ? 24 : 16)) & Format::sign;
  return (magnitude > 0x7f7fffff ? special : finite) | sign;
}

/// A narrow float's code to float32, exactly.
template <class Format, class F, class I>
FASTAGG_INLINE F decode_float(I code) {
  const I magnitude = code & (Format::sign - 1);
  const I widened = magnitude << (23 - Format::mantissa);
  // The exponent is rebased by a product, which normalises subnormals on the way.
  const I rebase = I{} + ((253 + Format::minimum_exponent) << 23);
  const I finite = bit_cast<I>(bit_cast<F>(widened) * bit_cast<F>(rebase));
  const I sign = (code & Format::sign) << (Format::sign == 0x80 ? 24 : 16);
  return bit_cast<F>((magnitude > Format::largest ? widened | 0x7f800000 : finite) | sign);
}

/// The bits of a float32 that is not NaN, rounded to those of a bfloat16: its upper half, to nearest even.
template <class I>
FASTAGG_INLINE I round_to_bfloat16(I bits) {
  return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
}

/// float32 to bfloat16. Infinity stays, for its lower half is zero.
template <Rounding rounding, class F, class I>
FASTAGG_INLINE I encode_bfloat16(F x, I random) {
  const I bits = bit_cast<I>(x);
  const I quiet = ((bits >> 16) & 0xffff) | 0x40;
  if constexpr (rounding == Rounding::nearest) return x == x ? round_to_bfloat16(bits) : quiet;
  const I rounded = ((bits + ((random >> 16) & 0xffff)) >> 16) & 0xffff;
  return x == x ? rounded : quiet;
}

template <class F, class I>
FASTAGG_INLINE F decode_bfloat16(I code) {
  return bit_cast<F>(code << 16);
}

/// x in units of a block's scale, given as two powers of two whose product is 1 / scale, rounded to an integer.
template <Rounding rounding, class F, class I>
FASTAGG_INLINE I encode_integer(F x, F inverse, F inverse_rest, I random) {
  const I sign = bit_cast<I>(x) >> 31;  // 0 or -1
  const F magnitude = bit_cast<F>(bit_cast<I>(x) & 0x7fffffff) * inverse * inverse_rest;
  return (round_to_integer<rounding, F, I>(magnitude, random) ^ sign) - sign;
}

}  // namespace fastagg

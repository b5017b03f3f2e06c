// The accumulator's number: a double rounded to 48 bits (sign, 10 bits of exponent, 37 of mantissa), kept as a plane of
// upper 32 and a plane of lower 16 bits. Range 2^-510 to 2^512, relative rounding 2^-38: ten thousand additions lose at
// most 3.7e-8, and two copies (the sums, and the sums with the next update) fit 12 bytes an element.
#pragma once
#include "types.h"

namespace fastagg {

/// A double to the upper 48 bits of the result, rounded to nearest even; the lower 16 are zero.
/// `D` is double or a vector of doubles, `L` the int64 of the same shape.
template <class D, class L>
FASTAGG_INLINE L encode_state48(D x) {
  const L sign = bit_cast<L>(x) & INT64_MIN;
  const L magnitude = bit_cast<L>(x) & INT64_MAX;
  // Scaled by 2^-512 the exponent's top bit is free: shift it out, then round at bit 16.
  const D scaled = bit_cast<D>(magnitude) * 0x1p-512;
  const L shifted = bit_cast<L>(scaled) << 1;
  const L rounded = (shifted + 0x7fff + ((shifted >> 16) & 1)) & ~INT64_C(0xffff);
  const L infinity = L{} + 0x7fe0000000000000;
  const L special = magnitude > 0x7ff0000000000000 ? infinity | 0x0010000000000000 : infinity;
  return sign | (bit_cast<D>(magnitude) < 0x1p512 ? rounded : special);
}

template <class D, class L>
FASTAGG_INLINE D decode_state48(L code) {
  const L sign = code & INT64_MIN;
  const L magnitude = code & INT64_MAX;
  const L finite = bit_cast<L>(bit_cast<D>(magnitude >> 1) * 0x1p512);
  const L special = ((magnitude >> 1) & 0x000fffffffffffff) | 0x7ff0000000000000;
  return bit_cast<D>(sign | (magnitude < 0x7fe0000000000000 ? finite : special));
}

}  // namespace fastagg

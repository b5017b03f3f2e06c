// The accumulator's number: a double rounded to 48 bits (sign, 10 bits of exponent, 37 of mantissa), kept as a plane of
// upper 32 and a plane of lower 16 bits. Range 2^-510 to 2^512, relative rounding 2^-38: ten thousand additions lose at
// most 3.7e-8, and two copies (the sums, and the sums with the next update) fit 12 bytes an element.
#pragma once
#include "types.h"

namespace fastagg {

/// Half of a non-negative integer. Shifted as unsigned: AVX2 has no signed shift of 64 bits.
template <class L>
FASTAGG_INLINE L half_of(L x) {
  if constexpr (sizeof(L) == sizeof(int64_t)) {
    return x >> 1;
  } else {
    typedef uint64_t Unsigned __attribute__((vector_size(sizeof(L))));
    return bit_cast<L>(bit_cast<Unsigned>(x) >> 1);
  }
}

/// A double to the upper 48 bits of the result, rounded to nearest, ties away from zero; the lower 16 bits are leftovers.
/// `D` is double or a vector of doubles, `L` the int64 of the same shape.
template <class D, class L>
FASTAGG_INLINE L encode_state48(D x) {
  constexpr int64_t overflow = 0x5ff0000000000000;  // 2^512
  // Scaled by 2^-512 the exponent's top bit is free: adding the magnitude once more shifts it out under the sign.
  const L scaled = bit_cast<L>(x * 0x1p-512);
  const L finite = scaled + (scaled & INT64_MAX) + 0x8000;
  const L special = (bit_cast<L>(x) - 0x0010000000000000) | 0x7fe0000000000000;
  return (bit_cast<L>(x) & INT64_MAX) < overflow ? finite : special;
}

template <class D, class L>
FASTAGG_INLINE D decode_state48(L code) {
  const L magnitude = code & INT64_MAX;
  const L scaled = code - half_of<L>(magnitude);
  const L special = scaled | 0x7ff0000000000000;
  return bit_cast<D>(magnitude < 0x7fe0000000000000 ? bit_cast<L>(bit_cast<D>(scaled) * 0x1p512) : special);
}

}  // namespace fastagg

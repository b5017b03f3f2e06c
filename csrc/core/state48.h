// The accumulator's number: the upper 48 bits of a double, kept as a plane of 32 and a plane of 16 bits. Two copies
// (the sums, and the sums with the next update) fit 12 bytes an element.
//
// 37 significant bits would let ten thousand equal updates add up ten thousand equal rounding errors, so sums are not
// rounded to nearest: they are truncated after an offset, which differs from update to update. The caller takes offsets
// from a sequence that is spread evenly over [0, 1) unit in the last place, and the errors cancel.
#pragma once
#include "types.h"

namespace fastagg {

/// A double to its 48 upper bits, in the upper bits of the result; the lower 16 are leftovers. `dither` is the offset
/// in units of the last bit cut off. `D` is double or a vector of doubles, `L` the int64 of the same shape.
template <class D, class L>
FASTAGG_INLINE L encode_state48(D x, uint16_t dither) {
  return bit_cast<L>(x) + dither;
}

template <class D, class L>
FASTAGG_INLINE D decode_state48(L code) {
  return bit_cast<D>(code);
}

}  // namespace fastagg

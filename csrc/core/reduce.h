// The arithmetic of `reduce`: (sum_r x_r + residual) / divisor in float32, in the order of the ranks; each operation is
// rounded once.
#pragma once
#include "cast.h"

namespace fastagg {

/// Strided partial sums of squares: fixed, so that every instruction set adds in one order.
constexpr int kSquareStrides = 16;

/// The inverse of a divisor that is a power of two, by which products are exact quotients; else 0.
FASTAGG_INLINE float exact_inverse(float divisor) {
  const int32_t bits = bit_cast<int32_t>(divisor);
  const bool is_power = (bits & 0x7fffff) == 0 && bits >= 0x00800000 && bits <= 0x7e800000;
  return is_power ? bit_cast<float>(0x7f000000 - bits) : 0.0f;
}

/// The partial sums of squares as one number: a fixed tree.
FASTAGG_INLINE double sum_of_strides(double* sums) {
  for (int width = kSquareStrides / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

}  // namespace fastagg

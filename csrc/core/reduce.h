// The arithmetic of `reduce`: (sum_r x_r + residual) / divisor in float32, in the order of the ranks; each operation is
// rounded once. That of `reduce_float64`: in pairs (pair.h), rounded once.
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

/// sum_r x_r * factor / divisor of float64 values, rounded once: `load(r, x)` gives those of rank r.
template <class Lanes>
struct Reduction64Of {
  using D = typename Lanes::D;
  int32_t ranks;
  double factor;
  Divisor divisor, raised;

  FASTAGG_INLINE Reduction64Of(int32_t ranks, double divisor, double factor)
      : ranks(ranks), factor(factor), divisor(divisor, 0), raised(divisor * kRaised, 0) {}

  template <class Load>
  FASTAGG_INLINE void results(const Load& load, D (&x)[Lanes::halves]) const {
    add_up(load, 1, factor * kRaised, raised, x);
    if (all_finite<Lanes>(x)) return;
    D huge[Lanes::halves];  // of smaller values: finite, where these are and the result is in range
    add_up(load, kLowered, factor, divisor, huge);
    for (int h = 0; h < Lanes::halves; ++h) x[h] = if_finite(x[h], huge[h] * kRaised);
  }

 private:
  template <class Load>
  FASTAGG_INLINE void add_up(const Load& load, double lower, double by, const Divisor& over,
                             D (&x)[Lanes::halves]) const {
    Pair<D> sum[Lanes::halves];
    for (auto& pair : sum) pair = empty_sum<D>();
    for (int32_t rank = 0; rank < ranks; ++rank) {
      load(rank, x);
      for (int h = 0; h < Lanes::halves; ++h) add_term(sum[h], x[h] * lower);
    }
    for (int h = 0; h < Lanes::halves; ++h) {
      Pair<D> scaled = empty_sum<D>();
      add_exact<Lanes>(scaled, broadcast<D>(by), sum[h]);
      x[h] = quotient<Lanes>(scaled, over);
    }
  }
};

/// The partial sums of squares as one number: a fixed tree.
FASTAGG_INLINE double sum_of_strides(double* sums) {
  for (int width = kSquareStrides / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

}  // namespace fastagg

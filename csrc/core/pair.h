// Sums in twice the precision of float64: a double, and a second one for what it is too much by. Terms are added to the
// first; what products and additions round away is added up in the second (Ogita, Rump and Oishi 2005, "Dot2"): n
// products are off by n^2 * 2^-104 of the sum of their magnitudes. The first is just the plain sum: infinity stays
// infinity, and the difference of both is a zero of the right sign.
#pragma once
#include "lane.h"

namespace fastagg {

/// Where sums of weighted values become a mean, weights are this much larger, so that what products of subnormals round
/// away does not vanish. Means whose sums leave float64's range for it are added up again, of values that are smaller.
constexpr double kRaised = 0x1p64, kLowered = 0x1p-64;

/// The sum high - excess.
template <class D>
struct Pair {
  D high, excess;
};

/// What addition leaves alone, zeros' signs included.
template <class D>
FASTAGG_INLINE Pair<D> empty_sum() {
  return {broadcast<D>(-0.0), D{}};
}

/// sum += term
template <class D>
FASTAGG_INLINE void add_term(Pair<D>& sum, D term) {
  const D total = sum.high + term, added = total - sum.high;
  sum.excess = sum.excess + (((total - added) - sum.high) + (added - term));
  sum.high = total;
}

/// sum += weight * x: what the product and the addition round away is found by one more product.
template <class Lanes, class D>
FASTAGG_INLINE void add_exact(Pair<D>& sum, D weight, D x) {
  const D total = sum.high + weight * x, added = total - sum.high;
  sum.excess = sum.excess + (((total - added) - sum.high) + Lanes::multiply_add(-weight, x, added));
  sum.high = total;
}

/// sum += weight * x
template <class Lanes, class D>
FASTAGG_INLINE void add_exact(Pair<D>& sum, D weight, Pair<D> x) {
  add_exact<Lanes>(sum, weight, x.high);
  sum.excess = sum.excess + weight * x.excess;
}

/// Whether no lane is infinite or NaN.
template <class Lanes>
FASTAGG_INLINE bool all_finite(const typename Lanes::D (&x)[Lanes::halves]) {
  auto mask = x[0] - x[0] != typename Lanes::D{};
  for (int h = 1; h < Lanes::halves; ++h) mask |= x[h] - x[h] != typename Lanes::D{};
  return !Lanes::any(mask);
}

/// x where it is finite, else `other`.
template <class D>
FASTAGG_INLINE D if_finite(D x, D other) {
  return x - x == D{} ? x : other;
}

/// What sums are divided by.
struct Divisor {
  FASTAGG_INLINE Divisor(double high, double rest) : high(high), rest(rest), inverse(1.0 / high) {}

  double high, rest, inverse;
};

/// sum / divisor, rounded once: an estimate, less what it is too much by. NaN where the sum is not finite.
template <class Lanes, class D>
FASTAGG_INLINE D quotient_of_finite(Pair<D> sum, const Divisor& divisor) {
  const D whole = sum.high - sum.excess, taken = whole - sum.high;
  const D excess = ((whole - taken) - sum.high) + (taken + sum.excess);
  const D estimate = whole * divisor.inverse;
  const D too_much = Lanes::multiply_add(estimate, broadcast<D>(divisor.high), -whole) +
                     Lanes::multiply_add(estimate, broadcast<D>(divisor.rest), excess);
  return Lanes::multiply_add(-too_much, broadcast<D>(divisor.inverse), estimate);
}

/// The same, also where the sum is infinite.
template <class Lanes, class D>
FASTAGG_INLINE D quotient(Pair<D> sum, const Divisor& divisor) {
  const D infinite = sum.high * divisor.inverse;
  return sum.high - sum.high == D{} ? quotient_of_finite<Lanes>(sum, divisor) : infinite;
}

}  // namespace fastagg

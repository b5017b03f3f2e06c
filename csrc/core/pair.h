// Sums in twice the precision of float64: a double, and a second one for what the first lacks. Terms are added to the
// first, and what each addition and product rounds away to the second (Ogita, Rump and Oishi 2005, "Dot2"): n products
// are off by n^2 * 2^-106 of the sum of their magnitudes. The first is just the plain sum: infinity stays infinity.
#pragma once
#include "lane.h"

namespace fastagg {

/// Where sums of weighted values become a mean, weights are this much larger, so that what products of subnormals round
/// away does not vanish. Means whose sums leave float64's range for it are added up again, of values that are smaller.
constexpr double kRaised = 0x1p64, kLowered = 0x1p-64;

template <class D>
struct Pair {
  D high, low;
};

/// What addition leaves alone, zeros' signs included.
template <class D>
FASTAGG_INLINE Pair<D> empty_sum() {
  return {broadcast<D>(-0.0), D{}};
}

/// sum += term + rest, the rest far smaller than the term.
template <class D>
FASTAGG_INLINE void add_term(Pair<D>& sum, D term, D rest) {
  const D total = sum.high + term, added = total - sum.high;
  sum.low = sum.low + (((sum.high - (total - added)) + (term - added)) + rest);
  sum.high = total;
}

/// sum += weight * x: what the product and the addition round away is found by one more product.
template <class Lanes, class D>
FASTAGG_INLINE void add_exact(Pair<D>& sum, D weight, D x) {
  const D total = sum.high + weight * x, added = total - sum.high;
  sum.low = sum.low + ((sum.high - (total - added)) + Lanes::multiply_add(weight, x, -added));
  sum.high = total;
}

/// sum += weight * x
template <class Lanes, class D>
FASTAGG_INLINE void add_exact(Pair<D>& sum, D weight, Pair<D> x) {
  add_exact<Lanes>(sum, weight, x.high);
  sum.low = sum.low + weight * x.low;
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
  FASTAGG_INLINE Divisor(double high, double low) : high(high), low(low), inverse(1.0 / high) {}

  double high, low, inverse;
};

/// `x` where a correction is neither zero, which would cost a zero's sign, nor NaN, as infinity's is; else `other`.
template <class D>
FASTAGG_INLINE D if_corrected(D correction, D x, D other) {
  return (correction > D{}) | (correction < D{}) ? x : other;
}

/// sum / divisor, rounded once: a quotient, corrected by the remainder that it leaves.
template <class Lanes, class D>
FASTAGG_INLINE D quotient(Pair<D> sum, const Divisor& divisor) {
  Pair<D> whole{sum.high, D{}};
  add_term(whole, sum.low, D{});
  const D first = if_corrected(sum.low, whole.high, sum.high);
  const D rest = if_corrected(sum.low, whole.low, D{});
  const D estimate = first * divisor.inverse;
  const D remainder =
      Lanes::multiply_add(-estimate, broadcast<D>(divisor.high), first) + (rest - estimate * divisor.low);
  return if_corrected(remainder, estimate + remainder * divisor.inverse, estimate);
}

/// The same of a sum times a factor.
template <class Lanes, class D>
FASTAGG_INLINE D scaled_quotient(Pair<D> sum, double factor, const Divisor& divisor) {
  Pair<D> scaled = empty_sum<D>();
  add_exact<Lanes>(scaled, broadcast<D>(factor), sum);
  return quotient<Lanes>(scaled, divisor);
}

}  // namespace fastagg

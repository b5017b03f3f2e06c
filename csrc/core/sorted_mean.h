// The arithmetic of `sorted_mean`: the mean of a window of a coordinate's sorted values. The median, the trimmed mean,
// and the mean of the values nearest to either are such means. Sums run in float64 from the smallest value up, those of
// float64 values in pairs (pair.h), so that the mean of equal values is that value.
#pragma once
#include "pair.h"
#include "rows.h"

namespace fastagg {

/// NaN becomes infinity, which sorts last.
template <class V>
FASTAGG_INLINE V sortable(V x) {
  return x == x ? x : broadcast<V>(INFINITY);
}

/// The rows of the middle one or two values.
FASTAGG_INLINE int32_t first_middle(int32_t rows) { return (rows - 1) / 2; }
FASTAGG_INLINE int32_t last_middle(int32_t rows) { return rows / 2 + 1; }

/// The sorted rows [first, last) that a window is made of.
FASTAGG_INLINE int32_t first_row(Window window, int32_t rows, int32_t left_out) {
  return window == Window::middle ? first_middle(rows) : window == Window::trimmed ? left_out : 0;
}
FASTAGG_INLINE int32_t last_row(Window window, int32_t rows, int32_t left_out) {
  return window == Window::middle ? last_middle(rows) : window == Window::trimmed ? rows - left_out : rows;
}

/// Sorts two values, none of them NaN.
template <class Lanes, class V>
FASTAGG_INLINE void compare_exchange(V& low, V& high) {
  const V smaller = Lanes::minimum(low, high);
  high = Lanes::maximum(low, high);
  low = smaller;
}

/// A sum of a column's values: of float64 ones a pair, of others a double.
template <class Lanes, Code code>
struct ColumnSum {
  static constexpr bool is_pair = code == Code::float64;
  using D = typename Lanes::D;
  std::conditional_t<is_pair, Pair<D>, D> sums[Lanes::halves];

  FASTAGG_INLINE explicit ColumnSum(D start) {
    for (auto& sum : sums) {
      if constexpr (is_pair) sum = {start, D{}};
      else sum = start;
    }
  }
  FASTAGG_INLINE void add(int h, D x) {
    if constexpr (is_pair) add_term(sums[h], x);
    else sums[h] = sums[h] + x;
  }
  /// The sum as it is stored, and how it becomes a center: divided by `count` if it is a pair, or if asked to.
  FASTAGG_INLINE D value(int h, int32_t count, bool divide) const {
    const auto divisor = static_cast<double>(count);
    if constexpr (is_pair) return quotient<Lanes>(sums[h], Divisor(divisor, 0));
    else return divide ? sums[h] / divisor : sums[h];
  }
};

/// The sorted values of as many coordinates as there are lanes: row r lies at values + r * stride. They are read times
/// a factor, which is 1 but for sums that leave float64's range.
template <class Lanes, Code code>
struct SortedColumn {
  using D = typename Lanes::D;
  const void* values;
  int64_t stride;
  double factor = 1;

  FASTAGG_INLINE void row(int64_t r, D (&x)[Lanes::halves]) const {
    load_wide<Lanes, code>(Source{values, nullptr, code, 0}, r * stride, x);
    if constexpr (code == Code::float64)
      for (int h = 0; h < Lanes::halves; ++h) x[h] = x[h] * factor;
  }

  /// The sum of the rows [first, last).
  FASTAGG_INLINE ColumnSum<Lanes, code> sum(int32_t first, int32_t last) const {
    ColumnSum<Lanes, code> total(broadcast<D>(-0.0));
    for (int32_t r = first; r < last; ++r) {
      D x[Lanes::halves];
      row(r, x);
      for (int h = 0; h < Lanes::halves; ++h) total.add(h, x[h]);
    }
    return total;
  }

  /// The sum of all rows but the `left_out` that are farthest from `center`; of two as far, the larger is left out.
  /// Those that stay are neighbours: their window moves up while that brings it nearer.
  FASTAGG_INLINE ColumnSum<Lanes, code> sum_near(const D (&center)[Lanes::halves], int32_t rows,
                                                 int32_t left_out) const {
    const int32_t kept = rows - left_out;
    ColumnSum<Lanes, code> total(D{});
    for (int32_t r = 0; r < rows; ++r) {
      D x[Lanes::halves], other[Lanes::halves];
      row(r, x);
      for (int h = 0; h < Lanes::halves; ++h) other[h] = x[h];
      if (r >= kept) row(r - kept, other);
      D part[Lanes::halves];
      for (int h = 0; h < Lanes::halves; ++h)
        part[h] = r < kept ? x[h] : center[h] - other[h] > x[h] - center[h] ? x[h] : D{};
      if (r < left_out) {
        row(r + kept, other);
        for (int h = 0; h < Lanes::halves; ++h) part[h] = center[h] - x[h] > other[h] - center[h] ? D{} : part[h];
      }
      for (int h = 0; h < Lanes::halves; ++h) total.add(h, part[h]);
    }
    return total;
  }

  /// The window's sum, or of float64 its mean.
  FASTAGG_INLINE void window(const SortedMean& op, D (&result)[Lanes::halves]) const {
    const bool by_median = op.window == Window::middle || op.window == Window::near_median;
    const int32_t first = by_median ? first_middle(op.rows) : op.left_out;
    const int32_t last = by_median ? last_middle(op.rows) : op.rows - op.left_out;
    const bool is_center = op.window == Window::near_median || op.window == Window::near_trimmed;
    const ColumnSum<Lanes, code> total = sum(first, last);
    for (int h = 0; h < Lanes::halves; ++h) result[h] = total.value(h, last - first, is_center);
    if (!is_center) return;
    const ColumnSum<Lanes, code> near = sum_near(result, op.rows, op.left_out);
    for (int h = 0; h < Lanes::halves; ++h) result[h] = near.value(h, op.rows - op.left_out, false);
  }
};

/// The sum of a column's window, which the leaf's divisor makes the mean; of float64 values the mean itself.
template <class Lanes, Code code>
FASTAGG_INLINE void sum_of_window(const SortedMean& op, SortedColumn<Lanes, code> column,
                                  typename Lanes::D (&sum)[Lanes::halves]) {
  using D = typename Lanes::D;
  column.window(op, sum);
  if constexpr (code == Code::float64) {
    if (all_finite<Lanes>(sum)) return;
    D huge[Lanes::halves];  // of smaller values: finite, where these are
    column.factor = kLowered;
    column.window(op, huge);
    for (int h = 0; h < Lanes::halves; ++h) sum[h] = if_finite(sum[h], huge[h] * kRaised);
  }
}

/// What the sums of a window are divided by: those of float64 values have been.
FASTAGG_INLINE Leaf leaf_of_windows(Leaf leaf, Code work) {
  if (work == Code::float64) leaf.divisor = 1;
  return leaf;
}

/// sum_k shares[k] * x_k of float64 values, the shares times `raise` and the values times `lower`, divided by the sum
/// of the shares, which is 1 but for their rounding.
template <class Lanes, class Load>
FASTAGG_INLINE void mix_pairs(const double* shares, int32_t clients, double raise, double lower, const Load& load,
                              typename Lanes::D (&mixed)[Lanes::halves]) {
  using D = typename Lanes::D;
  Pair<double> total = empty_sum<double>();
  Pair<D> sum[Lanes::halves];
  for (auto& pair : sum) pair = empty_sum<D>();
  for (int32_t k = 0; k < clients; ++k) {
    if (shares[k] == 0) continue;
    D x[Lanes::halves];
    load(k, x);
    add_term(total, shares[k] * raise);
    for (int h = 0; h < Lanes::halves; ++h) add_exact<Lanes>(sum[h], broadcast<D>(shares[k] * raise), x[h] * lower);
  }
  const Divisor divisor(total.high, -total.excess);
  for (int h = 0; h < Lanes::halves; ++h) mixed[h] = quotient<Lanes>(sum[h], divisor);
}

/// sum_k shares[k] * x_k, where `load(k, x)` gives the values of client k.
template <class Lanes, Code code, class Load>
FASTAGG_INLINE void mix(const double* shares, int32_t clients, const Load& load,
                        typename Lanes::D (&mixed)[Lanes::halves]) {
  using D = typename Lanes::D;
  if constexpr (code == Code::float64) {
    mix_pairs<Lanes>(shares, clients, kRaised, 1, load, mixed);
    D huge[Lanes::halves];
    if (all_finite<Lanes>(mixed)) return;
    mix_pairs<Lanes>(shares, clients, 1, kLowered, load, huge);
    for (int h = 0; h < Lanes::halves; ++h) mixed[h] = if_finite(mixed[h], huge[h] * kRaised);
  } else {
    for (D& sum : mixed) sum = broadcast<D>(-0.0);
    for (int32_t k = 0; k < clients; ++k) {
      if (shares[k] == 0) continue;
      D x[Lanes::halves];
      load(k, x);
      for (int h = 0; h < Lanes::halves; ++h) mixed[h] = add_product(mixed[h], broadcast<D>(shares[k]), x[h]);
    }
  }
}

}  // namespace fastagg

// The arithmetic of `sorted_mean`: the mean of a window of a coordinate's sorted values. The median, the trimmed mean,
// and the mean of the values nearest to either are such means. Sums run in float64 from the smallest value up.
#pragma once
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

/// The sorted values of as many coordinates as there are lanes: row r lies at values + r * stride.
template <class Lanes, Code code>
struct SortedColumn {
  using D = typename Lanes::D;
  const void* values;
  int64_t stride;

  FASTAGG_INLINE void row(int64_t r, D (&x)[Lanes::halves]) const {
    load_wide<Lanes, code>(Source{values, nullptr, code, 0}, r * stride, x);
  }

  /// The sum of the rows [first, last).
  FASTAGG_INLINE void sum(int32_t first, int32_t last, D (&total)[Lanes::halves]) const {
    row(first, total);
    for (int32_t r = first + 1; r < last; ++r) {
      D x[Lanes::halves];
      row(r, x);
      for (int h = 0; h < Lanes::halves; ++h) total[h] = total[h] + x[h];
    }
  }

  /// The sum of all rows but the `left_out` that are farthest from `center`; of two as far, the larger is left out.
  /// Those that stay are neighbours: their window moves up while that brings it nearer.
  FASTAGG_INLINE void sum_near(const D (&center)[Lanes::halves], int32_t rows, int32_t left_out,
                               D (&total)[Lanes::halves]) const {
    const int32_t kept = rows - left_out;
    for (int h = 0; h < Lanes::halves; ++h) total[h] = D{};
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
      for (int h = 0; h < Lanes::halves; ++h) total[h] = total[h] + part[h];
    }
  }
};

/// The sum of a column's window, which the leaf's divisor makes the mean.
template <class Lanes, Code code>
FASTAGG_INLINE void sum_of_window(const SortedMean& op, const SortedColumn<Lanes, code>& column,
                                  typename Lanes::D (&sum)[Lanes::halves]) {
  const bool by_median = op.window == Window::middle || op.window == Window::near_median;
  const int32_t first = by_median ? first_middle(op.rows) : op.left_out;
  const int32_t last = by_median ? last_middle(op.rows) : op.rows - op.left_out;
  column.sum(first, last, sum);
  if (op.window == Window::middle || op.window == Window::trimmed) return;
  typename Lanes::D center[Lanes::halves];
  for (int h = 0; h < Lanes::halves; ++h) center[h] = sum[h] / static_cast<double>(last - first);
  column.sum_near(center, op.rows, op.left_out, sum);
}

}  // namespace fastagg

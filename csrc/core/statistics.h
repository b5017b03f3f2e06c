// The arithmetic of `statistics`: moments of a client's values x, and of how they lie to a reference m.
//
// Within a chunk, sums of float32 values run in float32, in a few strides and over a few rows at a time, and are
// widened from there: the same bits on every instruction set, and errors of some 1e-8 of the sums. Where a chunk's mean
// is large beside its deviation, or its values are large beside the reference's, it is looked at again about its mean;
// where its squares leave float32's range or a value is not finite, in float64.
#pragma once
#include "types.h"

namespace fastagg {

/// A row's elements are added up side by side, however wide the lanes are.
constexpr int kRowBytes = 64;
/// Rows that are added up in the values' own type before the sums are widened.
constexpr int kRows = 64;
/// Sums side by side that are widened.
constexpr int kStrides = 4;

template <class T>
constexpr int row_of = kRowBytes / sizeof(T);

/// Sums below this may lack squares that have vanished.
template <class T>
constexpr double kLeastSquares = sizeof(T) == sizeof(float) ? 0x1p-90 : 0x1p-960;

/// What one pass over a chunk's values finds.
struct ChunkSums {
  double deviations, squares;  // of x - pivot
  double products, distances;  // x * m, (x - m)^2
  double minimum, maximum;
};

/// Moments of `count` finite values from sums about a pivot, and the sum of the reference's squares.
FASTAGG_INLINE Moments moments_of(const ChunkSums& sums, double pivot, int64_t count, double reference) {
  const auto n = static_cast<double>(count);
  const double shift = sums.deviations / n, squares = sums.squares - sums.deviations * shift;
  Moments moments;
  moments.finite = n;
  const bool is_constant = sums.minimum == sums.maximum;
  moments.mean = is_constant ? sums.minimum : pivot + shift;
  moments.deviations = is_constant || squares < 0 ? 0 : squares - squares == 0 ? squares : __builtin_inf();
  moments.minimum = sums.minimum;
  moments.maximum = sums.maximum;
  moments.products = sums.products;
  moments.distances = sums.distances;
  moments.reference = reference;
  return moments;
}

/// Whether so little is left of the squares about a pivot that their rounding errors would show.
FASTAGG_INLINE bool is_cancelled(const ChunkSums& sums, int64_t count) {
  return sums.minimum != sums.maximum &&
         sums.deviations * sums.deviations > 0.9375 * sums.squares * static_cast<double>(count);
}

/// Whether one of two sums of squares is so much larger that their rounding errors would show in x * m, which is half
/// of x^2 + m^2 - (x - m)^2.
FASTAGG_INLINE bool is_lopsided(double squares, double reference) {
  return squares > 0x1p10 * reference || reference > 0x1p10 * squares;
}

/// Whether sums in T stand: nothing was infinite or NaN, and no square has vanished.
template <class T>
FASTAGG_INLINE bool are_in_range(const ChunkSums& sums, const Moments& moments) {
  const double all = sums.deviations + sums.squares + sums.products + sums.distances + moments.reference;
  const auto vanished = [](double squares) { return squares < kLeastSquares<T> && squares != 0; };
  const bool deviates = sums.minimum != sums.maximum && sums.squares < kLeastSquares<T>;
  return all - all == 0 && !deviates && !vanished(sums.squares) && !vanished(sums.distances) &&
         !vanished(moments.deviations + moments.finite * moments.mean * moments.mean) && !vanished(moments.reference);
}

/// The moments in float64, of the values that are finite; products and distances where the reference is too.
template <class T>
FASTAGG_INLINE Moments moments_of_finite(const T* x, const T* m, int64_t count, double reference_squares) {
  const auto is_finite = [](double value) { return value - value == 0; };
  ChunkSums sums{0, 0, 0, 0, __builtin_inf(), -__builtin_inf()};
  double pivot = 0;
  int64_t finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = x[i], reference = m[i];
    if (!is_finite(value)) continue;
    if (finite++ == 0) pivot = value;
    sums.deviations += value - pivot;
    sums.squares += (value - pivot) * (value - pivot);
    sums.minimum = value < sums.minimum ? value : sums.minimum;
    sums.maximum = value > sums.maximum ? value : sums.maximum;
    if (!is_finite(reference)) continue;
    sums.products += value * reference;
    sums.distances += (value - reference) * (value - reference);
  }
  Moments moments;
  if (finite > 0) moments = moments_of(sums, pivot, finite, 0);
  moments.reference = reference_squares;
  moments.nonfinite = static_cast<double>(count - finite);
  return moments;
}

/// The sum of the squares in float64, of the values that are finite.
template <class T>
FASTAGG_INLINE double squares_of_finite(const T* x, int64_t count) {
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = x[i];
    if (value - value == 0) squares += value * value;
  }
  return squares;
}

/// The moments of two parts of a leaf together (Chan, Golub and LeVeque 1979).
FASTAGG_INLINE void merge(Moments& moments, const Moments& other) {
  moments.nonfinite += other.nonfinite;
  moments.products += other.products;
  moments.distances += other.distances;
  moments.reference += other.reference;
  if (other.finite == 0) return;
  const double finite = moments.finite + other.finite, shift = other.mean - moments.mean;
  const double share = other.finite / finite;
  if (moments.finite > 0) moments.deviations += shift * shift * moments.finite * share;
  moments.deviations += other.deviations;
  moments.mean = moments.finite > 0 ? moments.mean + shift * share : other.mean;
  moments.finite = finite;
  moments.minimum = other.minimum < moments.minimum ? other.minimum : moments.minimum;
  moments.maximum = other.maximum > moments.maximum ? other.maximum : moments.maximum;
}

}  // namespace fastagg

// The loops of `statistics`, compiled once for each instruction set. A chunk of the weighted sum is written where it
// stays in the cache, and compared with the clients' values while those are there too.
#pragma once
#include "core/statistics.h"
#include "weighted_sum.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// The vectors of a row of values of type T.
template <class Lanes, class T>
struct Row {
  using V = std::conditional_t<std::is_same_v<T, double>, typename Lanes::D, typename Lanes::F>;
  static constexpr int width = sizeof(V) / sizeof(T), vectors = kRowBytes / sizeof(V);

  V values[vectors];

  static FASTAGG_INLINE Row filled(T x) {
    Row row;
    for (V& value : row.values) value = broadcast<V>(x);
    return row;
  }
  FASTAGG_INLINE void store(T* out) const {
    for (int v = 0; v < vectors; ++v) store_bytes(out + v * width, values[v]);
  }
};

/// The strides of a row as kStrides: a fixed tree of halves.
template <class T, class Combine>
FASTAGG_INLINE void fold(T (&values)[row_of<T>], Combine&& combine) {
  for (int width = row_of<T> / 2; width >= kStrides; width /= 2)
    for (int i = 0; i < width; ++i) values[i] = combine(values[i], values[i + width]);
}

/// Four sums side by side, widened.
struct WideSums {
  double strides[kStrides] = {0, 0, 0, 0};

  template <class Lanes, class T>
  FASTAGG_INLINE void add(const Row<Lanes, T>& row) {
    T values[row_of<T>];
    row.store(values);
    fold(values, [](T x, T y) { return x + y; });
    for (int i = 0; i < kStrides; ++i) strides[i] += values[i];
  }
  FASTAGG_INLINE double total() const { return (strides[0] + strides[2]) + (strides[1] + strides[3]); }
};

/// A client's next chunk, to be asked for row by row while this one is looked at.
struct NextChunk {
  const char* data;
  int64_t row_bytes;

  /// Into the second-level cache: the first one has no room, and would make the loop wait.
  FASTAGG_INLINE void prefetch(int64_t row) const { __builtin_prefetch(data + row * row_bytes, 0, 2); }
};

/// Adds the sums of the rows of x against m about a pivot to `sums`; returns where it stopped. Unless it is direct, the
/// pivot is 0, and products are left out.
template <class Lanes, bool direct, class T>
FASTAGG_INLINE int64_t add_rows(const T* x, const T* m, T pivot, int64_t count, NextChunk next, ChunkSums& sums) {
  using Values = Row<Lanes, T>;
  using V = typename Values::V;
  constexpr int row = row_of<T>, width = Values::width;
  WideSums wide_deviations, wide_squares, wide_products, wide_distances;
  Values minima = Values::filled(x[0]), maxima = minima;
  int64_t i = 0;
  while (i + row <= count) {
    const int64_t end = i + kRows * row < count ? i + kRows * row : count;
    Values deviations{}, squares{}, products{}, distances{};
    for (; i + row <= end; i += row) {
      next.prefetch(i / row);
      for (int v = 0; v < Values::vectors; ++v) {
        const V value = load_bytes<V>(x + i + v * width), mean = load_bytes<V>(m + i + v * width);
        const V deviation = direct ? value - pivot : value, distance = value - mean;
        deviations.values[v] = deviations.values[v] + deviation;
        squares.values[v] = squares.values[v] + deviation * deviation;
        if (direct) products.values[v] = products.values[v] + value * mean;
        distances.values[v] = distances.values[v] + distance * distance;
        minima.values[v] = value < minima.values[v] ? value : minima.values[v];
        maxima.values[v] = value > maxima.values[v] ? value : maxima.values[v];
      }
    }
    wide_deviations.add(deviations);
    wide_squares.add(squares);
    if (direct) wide_products.add(products);
    wide_distances.add(distances);
  }
  T least[row], largest[row];
  minima.store(least);
  maxima.store(largest);
  fold(least, [](T a, T b) { return b < a ? b : a; });
  fold(largest, [](T a, T b) { return b > a ? b : a; });
  for (int s = 0; s < kStrides; ++s) {
    sums.minimum = least[s] < sums.minimum ? static_cast<double>(least[s]) : sums.minimum;
    sums.maximum = largest[s] > sums.maximum ? static_cast<double>(largest[s]) : sums.maximum;
  }
  sums.deviations = wide_deviations.total(), sums.squares = wide_squares.total();
  sums.products = wide_products.total(), sums.distances = wide_distances.total();
  return i;
}

/// The sums of x against m about a pivot; `direct` as for `add_rows`.
template <class Lanes, bool direct, class T>
ChunkSums sums_about(const T* x, const T* m, T pivot, int64_t count, NextChunk next) {
  ChunkSums sums{0, 0, 0, 0, x[0], x[0]};
  for (int64_t i = add_rows<Lanes, direct>(x, m, pivot, count, next, sums); i < count; ++i) {
    const double value = x[i], mean = m[i], deviation = direct ? value - pivot : value, distance = value - mean;
    sums.deviations += deviation;
    sums.squares += deviation * deviation;
    if (direct) sums.products += value * mean;
    sums.distances += distance * distance;
    sums.minimum = x[i] < sums.minimum ? static_cast<double>(x[i]) : sums.minimum;
    sums.maximum = x[i] > sums.maximum ? static_cast<double>(x[i]) : sums.maximum;
  }
  return sums;
}

/// A chunk of the mean.
template <class T>
struct Reference {
  const T* values;
  double squares;
};

/// The sum of the squares of the values that are finite.
template <class Lanes, class T>
double squares_of(const T* x, int64_t count) {
  using V = typename Row<Lanes, T>::V;
  constexpr int row = row_of<T>, width = Row<Lanes, T>::width;
  WideSums sums;
  int64_t i = 0;
  while (i + row <= count) {
    const int64_t end = i + kRows * row < count ? i + kRows * row : count;
    Row<Lanes, T> squares{};
    for (; i + row <= end; i += row)
      for (int v = 0; v < squares.vectors; ++v) {
        const V value = load_bytes<V>(x + i + v * width);
        squares.values[v] = squares.values[v] + value * value;
      }
    sums.add(squares);
  }
  double total = sums.total();
  for (; i < count; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return total >= kLeastSquares<T> && !not_finite(total) ? total : squares_of_finite(x, count);
}

/// The moments of a chunk from the cheapest sums that are good enough: in T about zero, in T about the mean, in
/// float64.
template <class Lanes, class T>
Moments chunk_moments(const T* x, const Reference<T>& reference, int64_t count, NextChunk next) {
  ChunkSums sums = sums_about<Lanes, false>(x, reference.values, T{}, count, next);
  sums.products = (sums.squares + reference.squares - sums.distances) / 2;
  Moments moments = moments_of(sums, 0, count, reference.squares);
  bool good = are_in_range<T>(sums, moments);
  if (good && (is_cancelled(sums, count) || is_lopsided(sums.squares, reference.squares))) {
    const T pivot = static_cast<T>(moments.mean);
    sums = sums_about<Lanes, true>(x, reference.values, pivot, count, next);
    moments = moments_of(sums, pivot, count, reference.squares);
    good = are_in_range<T>(sums, moments) && !is_cancelled(sums, count);
  }
  const bool is_reference = sums.distances == 0 && memcmp(x, reference.values, count * sizeof(T)) == 0;
  if (good && (sums.distances != 0 || is_reference)) return moments;
  return moments_of_finite(x, reference.values, count, reference.squares);
}

/// Elements [begin, begin + count) of a source, times a factor, as T: where they lie, or in `room`.
template <class Lanes, class T>
const T* values_of(const Source& source, double factor, int64_t begin, int64_t count, T* room) {
  constexpr bool is_wide = std::is_same_v<T, double>;
  if (source.code == (is_wide ? Code::float64 : Code::float32) && factor == 1)
    return static_cast<const T*>(source.data) + begin;
  with_code(source.code, [&](auto constant) {
    constexpr Code code = constant.value;
    if constexpr (!is_integer(code)) {
      walk<Lanes>(0, 0, count, [&](auto lanes, int64_t i, int64_t end) {
        using Own = decltype(lanes);
        for (; i + Own::width <= end; i += Own::width) {
          typename Own::D x[Own::halves];
          load_wide<Own, code>(source, begin + i, x);
          for (int h = 0; h < Own::halves; ++h) x[h] = x[h] * factor;
          if constexpr (is_wide) Own::template store_float64<false>(room, i, x);
          else Own::template store_float32<false>(room, i, Own::narrow(x));
        }
        return i;
      });
    }
  });
  return room;
}

/// Copies bytes to where a result lies, around the cache.
template <class Lanes>
void stream_bytes(uint8_t* out, const uint8_t* bytes, int64_t count) {
  constexpr int64_t vector = sizeof(typename Lanes::F);
  int64_t i = until_aligned(out, 0, 1, count);
  memcpy(out, bytes, i);
  for (; i + vector <= count; i += vector)
    Lanes::template store_float32<true>(out + i, 0, load_bytes<typename Lanes::F>(bytes + i));
  memcpy(out + i, bytes + i, count - i);
}

/// `statistics` with values of type T.
template <class Lanes, class T>
bool measure(Leaf leaf, const Measurement& measurement, int64_t begin, int64_t end, bool stream, Moments* moments) {
  alignas(64) uint8_t result[kSums * sizeof(double)];
  alignas(64) T room_of_reference[kSums], room[kSums];
  const bool staged = stream && !is_state(leaf.code);
  uint8_t* const out = static_cast<uint8_t*>(leaf.out);
  bool finite = true;
  for (; begin < end; begin += kSums) {
    const int64_t count = end - begin < kSums ? end - begin : kSums;
    if (staged) leaf.out = shifted(result, leaf.code, begin);
    finite &= weighted_sum<Lanes>(leaf, begin, begin + count, false);
    const Source written{leaf.out, leaf.companion, leaf.code, 0};
    const T* means = values_of<Lanes>(written, measurement.factor, begin, count, room_of_reference);
    const Reference<T> reference{means, squares_of<Lanes>(means, count)};
    for (int32_t k = 0; k < measurement.clients; ++k) {
      const Source& source = measurement.sources[k];
      const T* x = values_of<Lanes>(source, 1, begin, count, room);
      const NextChunk next{static_cast<const char*>(source.data) + encoded_bytes(source.code, begin + count),
                           encoded_bytes(source.code, row_of<T>)};
      merge(moments[k], chunk_moments<Lanes>(x, reference, count, next));
    }
    if (staged) stream_bytes<Lanes>(out + encoded_bytes(leaf.code, begin), result, encoded_bytes(leaf.code, count));
  }
  return finite;
}

/// `weighted_sum` of the elements [begin, end) of a leaf, and the moments of the measured clients' elements.
template <class Lanes>
bool statistics(const Leaf& leaf, const Measurement& measurement, int64_t begin, int64_t end, bool stream,
                Moments* moments) {
  bool wide = has_pairs(leaf.code);
  for (int32_t k = 0; k < measurement.clients; ++k) wide |= measurement.sources[k].code == Code::float64;
  return wide ? measure<Lanes, double>(leaf, measurement, begin, end, stream, moments)
              : measure<Lanes, float>(leaf, measurement, begin, end, stream, moments);
}

}  // namespace
}  // namespace fastagg

// Sorting networks: the same comparisons whatever the values, so that a vector's lanes are sorted together.
#pragma once
#include <array>
#include <vector>

#include "types.h"

namespace fastagg {

/// Batcher's merge exchange for any number of rows (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M).
template <class Visit>
constexpr void for_each_comparator(int32_t rows, Visit&& visit) {
  int32_t top = 1;
  while (2 * top < rows) top *= 2;
  for (int32_t p = top; p > 0; p /= 2) {
    int32_t distance = p, parity = 0;
    for (int32_t q = top;; q /= 2) {
      for (int32_t row = 0; row + distance < rows; ++row)
        if ((row & p) == parity) visit(Comparator{row, row + distance});
      if (q == p) break;
      distance = q - p, parity = p;
    }
  }
}

template <int32_t rows>
constexpr size_t count_of_comparators() {
  size_t count = 0;
  for_each_comparator(rows, [&](Comparator) { ++count; });
  return count;
}

/// The network of a number of rows that is known when this is compiled.
template <int32_t rows>
constexpr auto fixed_network() {
  std::array<Comparator, count_of_comparators<rows>()> network{};
  size_t next = 0;
  for_each_comparator(rows, [&](Comparator comparator) { network[next++] = comparator; });
  return network;
}

/// The network of any number of rows, without what cannot reach the rows [first, last).
inline std::vector<Comparator> sorting_network(int32_t rows, int32_t first, int32_t last) {
  std::vector<Comparator> network;
  for_each_comparator(rows, [&](Comparator comparator) { network.push_back(comparator); });
  std::vector<bool> wanted(rows);
  for (int32_t row = first; row < last; ++row) wanted[row] = true;
  std::vector<Comparator> needed;
  for (size_t i = network.size(); i-- > 0;) {
    const Comparator comparator = network[i];
    if (!wanted[comparator.low] && !wanted[comparator.high]) continue;
    wanted[comparator.low] = wanted[comparator.high] = true;
    needed.push_back(comparator);
  }
  return {needed.rbegin(), needed.rend()};
}

}  // namespace fastagg

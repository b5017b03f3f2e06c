// The arithmetic of `squared_distances`: sum_i (x_i - y_i)^2 of every pair of clients, in float64, from the differences
// themselves: |x|^2 + |y|^2 - 2 x.y would cancel where clients are near each other, which is the usual case.
#pragma once
#include "rows.h"

namespace fastagg {

/// Strided partial sums of a pair: fixed, so that every instruction set adds in one order.
constexpr int kPairStrides = 8;
/// Elements of a task; the tasks of all leaves are summed in parts, of neighbouring tasks each.
constexpr int64_t kDistanceTask = 1024;
/// A sum's parts depend on the elements and clients alone, so that threads and devices do not matter.
constexpr int64_t kMostParts = 1024, kPartsBytes = 64 << 20;

FASTAGG_INLINE int64_t distance_parts(int64_t tasks, int64_t clients) {
  const int64_t affordable = kPartsBytes / (8 * clients * clients) + 1;
  const int64_t parts = affordable < kMostParts ? affordable : kMostParts;
  return tasks < parts ? tasks : parts;
}

/// The partial sums of a pair as one number: a fixed tree.
FASTAGG_INLINE double sum_of_pair_strides(double (&sums)[kPairStrides]) {
  for (int width = kPairStrides / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

}  // namespace fastagg

// The loop of `squared_distances`, compiled once for each instruction set: a tile of all clients' values is decoded to
// float64 in the cache, and every pair of rows is walked there, four pairs at a time.
#pragma once
#include "core/squared_distances.h"
#include "rows.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

constexpr int kPairs = 4;

/// Adds the squared distances of row i from the rows `others` to `sums`.
template <class Lanes>
void add_distances(const double* row, const double* const (&others)[kPairs], int64_t count, double* (&sums)[kPairs]) {
  using D = typename Lanes::D;
  constexpr int half = Lanes::width / Lanes::halves, parts = kPairStrides / half;
  D totals[kPairs][parts] = {};
  for (int64_t c = 0; c < count; c += kPairStrides)
    for (int part = 0; part < parts; ++part) {
      const D x = load_bytes<D>(row + c + part * half);
      for (int pair = 0; pair < kPairs; ++pair) {
        const D difference = x - load_bytes<D>(others[pair] + c + part * half);
        totals[pair][part] = totals[pair][part] + difference * difference;
      }
    }
  for (int pair = 0; pair < kPairs; ++pair) {
    double strides[kPairStrides];
    for (int part = 0; part < parts; ++part) store_bytes(strides + part * half, totals[pair][part]);
    if (sums[pair] != nullptr) *sums[pair] += sum_of_pair_strides(strides);
  }
}

/// Adds the squared distances of all pairs of the elements [begin, end) of a leaf to the matrix `sums`, above its
/// diagonal; true if all values are finite. `scratch` is for a tile of float64.
template <class Lanes>
bool squared_distances(const Leaf& leaf, int64_t begin, int64_t end, double* scratch, double* sums) {
  const int32_t clients = leaf.clients;
  const int64_t columns = tile_columns(clients * static_cast<int64_t>(sizeof(double)));
  bool finite = true;
  for (; begin < end; begin += columns) {
    const int64_t count = end - begin < columns ? end - begin : columns;
    finite &= decode_rows<Lanes, Code::float64>(leaf, begin, count, scratch, columns);
    const int64_t whole = (count + kPairStrides - 1) / kPairStrides * kPairStrides;
    for (int32_t k = 0; k < clients; ++k)
      for (int64_t i = padded<Lanes>(count); i < whole; ++i) scratch[k * columns + i] = 0;
    for (int32_t i = 0; i < clients; ++i)
      for (int32_t first = i + 1; first < clients; first += kPairs) {
        const double* others[kPairs];
        double* pair_sums[kPairs];
        for (int pair = 0; pair < kPairs; ++pair) {
          const int32_t j = first + pair;
          others[pair] = scratch + (j < clients ? j : i) * columns;
          pair_sums[pair] = j < clients ? sums + int64_t{i} * clients + j : nullptr;
        }
        add_distances<Lanes>(scratch + i * columns, others, whole, pair_sums);
      }
  }
  return finite;
}

}  // namespace
}  // namespace fastagg

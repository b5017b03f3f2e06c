// Tiles of clients' values, a row a client: what `sorted_mean` and `squared_distances` work on.
#pragma once
#include "numbers.h"

namespace fastagg {

/// Columns of a tile are a multiple of this, so that vectors fit; a tile of many clients has no fewer.
constexpr int64_t kLeastColumns = 16, kMostColumns = 256;
/// Bytes of a tile of few clients: half of a first-level cache.
constexpr int64_t kTileBytes = 16 << 10;

/// Columns of a tile whose column has so many bytes.
FASTAGG_INLINE int64_t tile_columns(int64_t column_bytes) {
  const int64_t fitting = kTileBytes / column_bytes / kLeastColumns * kLeastColumns;
  return fitting < kLeastColumns ? kLeastColumns : fitting > kMostColumns ? kMostColumns : fitting;
}

/// Whether a client's values need float64: those that float32 does not hold.
constexpr FASTAGG_INLINE bool is_wide(Code code) { return code == Code::float64 || is_integer(code); }

FASTAGG_INLINE bool is_wide(const Leaf& leaf) {
  for (int32_t k = 0; k < leaf.clients; ++k)
    if (is_wide(leaf.sources[k].code)) return true;
  return false;
}

/// A client's element(s) from index i on, its block's scale applied.
template <class Lanes, Code code, Code work>
FASTAGG_INLINE Numbers<Lanes, work> decoded(const Source& source, int64_t i) {
  Numbers<Lanes, work> x;
  if constexpr (work == Code::float64) {
    load_wide<Lanes, code>(source, i, x.values);
  } else {
    x.values[0] = load_scaled<Lanes, code>(source, i);
  }
  return x;
}

/// Rows of a tile of `sorted_mean`: those that it sorts, and the clients' where these are mixed first.
FASTAGG_INLINE int64_t scratch_rows(const SortedMean& op, const Leaf& leaf) {
  return op.rows + (op.mixing == nullptr ? 0 : leaf.clients);
}

/// Bytes of a tile of so many rows.
FASTAGG_INLINE int64_t tile_bytes(int64_t rows, int64_t element_bytes) {
  return rows * element_bytes * tile_columns(rows * element_bytes);
}

}  // namespace fastagg

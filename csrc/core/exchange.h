// One all-reduce as every transport sees it, and who reduces which elements.
#pragma once
#include "types.h"

namespace fastagg {

/// One exchange; every rank must name the same but for `data`, the residual and the random key's rank.
struct Exchange {
  void* data;  // in place
  Code code;   // of the data
  int64_t count;
  Code wire;
  uint8_t block_shift;
  Rounding rounding;
  RandomKey key;
  const Stretch* stretches;  // as for `Cast`
  int64_t stretch_count;
  bool mean;
  float encoded_factor;   // a power of two that multiplies the values as they are encoded, and is divided out of sums
  double factor;          // multiplies the result once it is decoded: a loss scale's inverse
  const float* residual;  // added to this rank's values, times residual_factor; null: none
  float residual_factor;
  float* error;  // with a residual: receives what encoding took from this rank's values and from its slice's means
  bool norm;     // whether the sum of the result's squares is wanted
};

/// Elements of few ranks that are cheaper to reduce everywhere than to wait for twice.
constexpr int64_t kOneShotElements = 64 << 10;

/// Whether every rank reduces everything itself: with two it is no more work, with few elements waiting costs more.
FASTAGG_INLINE bool in_one_shot(int64_t count, int ranks) { return ranks <= 2 || count * ranks <= kOneShotElements; }

/// The slice of `count` elements that a rank owns: whole passes, of which the first slices may have one more.
struct Slice { int64_t begin, end; };

FASTAGG_INLINE Slice slice_of(int64_t count, int rank, int ranks) {
  const int64_t passes = (count + kChunk - 1) / kChunk, fewest = passes / ranks, larger = passes % ranks;
  const int64_t begin = (rank * fewest + (rank < larger ? rank : larger)) * kChunk;
  const int64_t end = begin + (fewest + (rank < larger ? 1 : 0)) * kChunk;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace fastagg

// The loop of `weighted_sum` for float64 results and for the accumulator's sums of them: like weighted_sum.h, but that
// every sum is a pair of doubles (core/pair.h).
#pragma once
#include "core/weighted_sum.h"
#include "stream.h"
#include "unaligned.h"
#include "walk.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// Pairs of a chunk: half of a first-level cache.
constexpr int64_t kPairSums = 1024;

/// A part of a leaf, and its sums so far.
struct PairChunk {
  const Leaf& leaf;
  int64_t begin, count;
  const double *high, *excess;
  bool fresh;  // nothing has been added yet

  template <class Lanes, int registers>
  FASTAGG_INLINE void load(Pair<typename Lanes::D> (&sum)[registers][Lanes::halves], int64_t i) const {
    using D = typename Lanes::D;
    constexpr int half = Lanes::width / Lanes::halves;
    for (int r = 0; r < registers; ++r)
      for (int h = 0; h < Lanes::halves; ++h) {
        const int64_t at = i + r * Lanes::width + h * half;
        sum[r][h] = fresh ? empty_sum<D>() : Pair<D>{load_bytes<D>(high + at), load_bytes<D>(excess + at)};
      }
  }
};

/// A destination of pairs: the chunk's own, for the next group.
struct KeepPairs {
  double *high, *excess;

  template <class Lanes, int registers>
  FASTAGG_INLINE void put(int64_t i, const Pair<typename Lanes::D> (&sum)[registers][Lanes::halves]) {
    constexpr int half = Lanes::width / Lanes::halves;
    for (int r = 0; r < registers; ++r)
      for (int h = 0; h < Lanes::halves; ++h) {
        const int64_t at = i + r * Lanes::width + h * half;
        store_bytes(high + at, sum[r][h].high);
        store_bytes(excess + at, sum[r][h].excess);
      }
  }
};

/// A destination of pairs: the leaf's means, or its sums; notes whether they are finite. With `stream`, vectors bypass
/// the cache.
template <Code code, bool stream>
struct StorePairs {
  const Leaf& leaf;
  Divisor divisor;
  int64_t begin;
  bool finite = true;

  explicit StorePairs(const PairChunk& chunk)
      : leaf(chunk.leaf),
        divisor(chunk.leaf.divisor * raise_of(code), chunk.leaf.divisor_rest * raise_of(code)),
        begin(chunk.begin) {}

  template <class Lanes, int registers>
  FASTAGG_INLINE void put(int64_t i, const Pair<typename Lanes::D> (&sum)[registers][Lanes::halves]) {
    using D = typename Lanes::D;
    constexpr bool bypass = stream && Lanes::width != 1;
    D x[registers][Lanes::halves];
    auto mask = not_finite(D{});
    for (int r = 0; r < registers; ++r)
      for (int h = 0; h < Lanes::halves; ++h) {
        x[r][h] = code == Code::float64 ? quotient_of_finite<Lanes>(sum[r][h], divisor) : sum[r][h].high;
        mask |= not_finite(x[r][h]);
      }
    if (Lanes::any(mask)) mend<Lanes, registers>(begin + i, x);
    for (int r = 0; r < registers; ++r) {
      const int64_t at = begin + i + r * Lanes::width;
      Lanes::template store_float64<bypass>(leaf.out, at, x[r]);
      if constexpr (code == Code::state128) {
        for (int h = 0; h < Lanes::halves; ++h) x[r][h] = sum[r][h].excess;
        Lanes::template store_float64<bypass>(leaf.companion, at, x[r]);
      }
    }
  }

 private:
  /// Looks at means from element i on again, one by one.
  template <class Lanes, int registers>
  __attribute__((noinline, cold)) void mend(int64_t i, typename Lanes::D (&x)[registers][Lanes::halves]) {
    double one_by_one[registers * Lanes::width];
    memcpy(one_by_one, x, sizeof one_by_one);
    for (double& mean : one_by_one) {
      if (code == Code::float64 && not_finite(mean)) mean = mean_of_huge<Lane>(leaf, i);
      finite &= !not_finite(mean);
      ++i;
    }
    memcpy(x, one_by_one, sizeof one_by_one);
  }
};

/// sum += weight_k * x_k for the clients of a group, while whole registers fit before `end`; returns where it stopped.
template <class Lanes, Code code, class Destination>
FASTAGG_INLINE int64_t add_pairs(const PairChunk& chunk, const Group& group, int64_t i, int64_t end,
                                 Destination& destination) {
  using D = typename Lanes::D;
  constexpr int registers = registers_of<Lanes>;
  const double raise = raise_of(chunk.leaf.code);
  for (; i + registers * Lanes::width <= end; i += registers * Lanes::width) {
    Pair<D> sum[registers][Lanes::halves];
    chunk.load<Lanes>(sum, i);
    for (int k = 0; k < group.clients; ++k)
      for (int r = 0; r < registers; ++r)
        add_elements<Lanes, code>(sum[r], broadcast<D>(group.weights[k] * raise), group.sources[k],
                                  chunk.begin + i + r * Lanes::width);
    destination.template put<Lanes, registers>(i, sum);
  }
  return i;
}

/// Elements of a chunk until streaming stores may begin.
inline int64_t head_of(const PairChunk& chunk) {
  return until_aligned(chunk.leaf.out, chunk.begin, sizeof(double), chunk.count);
}

/// Adds the last group, of float64 arrays, and stores the result; true if it is finite.
template <class Lanes, Code result, bool stream>
bool add_last_group(const PairChunk& chunk, const Group& group) {
  StorePairs<result, stream> means(chunk);
  walk<Lanes>(0, stream ? head_of(chunk) : 0, chunk.count, [&](auto lanes, int64_t i, int64_t end) {
    return add_pairs<decltype(lanes), Code::float64>(chunk, group, i, end, means);
  });
  return means.finite;
}

/// Stores the result from a chunk's sums; true if it is finite.
template <class Lanes, Code result, bool stream>
bool store_pairs(const PairChunk& chunk) {
  StorePairs<result, stream> means(chunk);
  walk<Lanes>(0, stream ? head_of(chunk) : 0, chunk.count, [&](auto lanes, int64_t i, int64_t end) {
    using Own = decltype(lanes);
    for (; i + Own::width <= end; i += Own::width) {
      Pair<typename Own::D> sum[1][Own::halves];
      chunk.load<Own>(sum, i);
      means.template put<Own, 1>(i, sum);
    }
    return i;
  });
  return means.finite;
}

/// Whether a leaf's first source is sums to which the others are added: they are read where they lie.
inline bool starts_with_sums(const Leaf& leaf) {
  return leaf.code == Code::state128 && leaf.sources[0].code == Code::state128 && leaf.weights[0] == 1;
}

/// The result of one chunk, whose sums are kept at `high` and `excess`; true if it is finite.
template <class Lanes, Code result, bool stream>
bool pair_sum_of(const Leaf& leaf, int64_t begin, int64_t count, double* high, double* excess) {
  PairChunk chunk{leaf, begin, count, high, excess, true};
  int first = 0;
  if (starts_with_sums(leaf)) {
    const Source& sums = leaf.sources[0];
    chunk.high = static_cast<const double*>(sums.data) + begin;
    chunk.excess = static_cast<const double*>(sums.companion) + begin;
    chunk.fresh = false;
    first = 1;
  }
  while (first < leaf.clients) {
    const Group group = group_from(leaf, first);
    first += group.clients;
    if (first == leaf.clients && group.sources[0].code == Code::float64)
      return add_last_group<Lanes, result, stream>(chunk, group);
    with_code(group.sources[0].code, [&](auto constant) {
      KeepPairs keep{high, excess};
      walk<Lanes>(0, 0, count, [&](auto lanes, int64_t i, int64_t end) {
        return add_pairs<decltype(lanes), constant.value>(chunk, group, i, end, keep);
      });
    });
    chunk.high = high, chunk.excess = excess, chunk.fresh = false;
  }
  return store_pairs<Lanes, result, stream>(chunk);
}

/// Whether a leaf's sums stay in registers: what is added is one group of float64 clients.
inline bool is_one_group(const Leaf& leaf) {
  const int first = starts_with_sums(leaf) ? 1 : 0;
  return first < leaf.clients && leaf.sources[first].code == Code::float64 &&
         group_from(leaf, first).clients == leaf.clients - first;
}

/// `weighted_sum` of the elements [begin, end) of a leaf whose sums are pairs; true if every result is finite.
template <class Lanes>
bool pair_sum(const Leaf& leaf, int64_t begin, int64_t end, bool stream) {
  alignas(64) double high[kPairSums], excess[kPairSums];
  bool finite = true;
  const bool is_state = leaf.code == Code::state128;
  stream = stream && !(is_state &&
                       reinterpret_cast<uintptr_t>(leaf.out) % 64 != reinterpret_cast<uintptr_t>(leaf.companion) % 64);
  const int64_t most = is_one_group(leaf) ? end - begin : kPairSums;
  for (; begin < end; begin += most) {
    const int64_t count = end - begin < most ? end - begin : most;
    if (is_state)
      finite &= stream ? pair_sum_of<Lanes, Code::state128, true>(leaf, begin, count, high, excess)
                       : pair_sum_of<Lanes, Code::state128, false>(leaf, begin, count, high, excess);
    else
      finite &= stream ? pair_sum_of<Lanes, Code::float64, true>(leaf, begin, count, high, excess)
                       : pair_sum_of<Lanes, Code::float64, false>(leaf, begin, count, high, excess);
  }
  return finite;
}

}  // namespace
}  // namespace fastagg

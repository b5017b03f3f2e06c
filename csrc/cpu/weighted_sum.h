// The loop of `weighted_sum`, compiled once for each instruction set. Groups of clients are added to a chunk's sums, so
// that every client is read once and few streams are open at a time. Between groups the sums stay in the first-level
// cache as float64; the last group's loop can store the means itself.
#pragma once
#include "core/rows.h"
#include "integer_weights.h"
#include "pair_sum.h"
#include "stream.h"
#include "unaligned.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// Sums of a chunk: half of a first-level cache, which the clients' streams share.
constexpr int64_t kSums = 2048;
/// A part of a leaf and its sums so far.
struct Chunk {
  const Leaf& leaf;
  int64_t begin, count;
  double* sums;
  bool fresh;  // nothing has been added yet
};

/// Sums from element i of a chunk on. Fresh ones are -0.0: what addition leaves alone, zeros' signs included.
template <class Lanes, int registers>
FASTAGG_INLINE void load_sums(typename Lanes::D (&sum)[registers][Lanes::halves], const Chunk& chunk, int64_t i) {
  using D = typename Lanes::D;
  constexpr int half = Lanes::width / Lanes::halves;
  for (int r = 0; r < registers; ++r)
    for (int h = 0; h < Lanes::halves; ++h)
      sum[r][h] = chunk.fresh ? broadcast<D>(-0.0) : load_bytes<D>(chunk.sums + i + r * Lanes::width + h * half);
}

/// A destination of sums: the chunk's own, for the next group.
struct KeepSums {
  double* sums;

  template <class Lanes, int registers>
  FASTAGG_INLINE void put(int64_t i, const typename Lanes::D (&sum)[registers][Lanes::halves]) {
    constexpr int half = Lanes::width / Lanes::halves;
    for (int r = 0; r < registers; ++r)
      for (int h = 0; h < Lanes::halves; ++h) store_bytes(sums + i + r * Lanes::width + h * half, sum[r][h]);
  }
};

/// A destination of sums: the leaf's means; notes whether they are finite. With `stream`, vectors bypass the cache.
template <Code code, bool stream>
struct StoreMeans {
  Result result;
  int64_t begin;
  bool finite = true;

  explicit StoreMeans(const Chunk& chunk)
      : result(chunk.leaf, chunk.leaf.out, chunk.leaf.companion), begin(chunk.begin) {}

  template <class Lanes, int registers>
  FASTAGG_INLINE void put(int64_t i, const typename Lanes::D (&sum)[registers][Lanes::halves]) {
    constexpr bool bypass = stream && Lanes::width != 1;
    auto mask = store_mean<Lanes, code, bypass>(result, begin + i, sum[0]);
    for (int r = 1; r < registers; ++r)
      mask |= store_mean<Lanes, code, bypass>(result, begin + i + r * Lanes::width, sum[r]);
    if (!Lanes::any(mask)) return;
    double one_by_one[registers * Lanes::width];
    KeepSums{one_by_one}.template put<Lanes, registers>(0, sum);
    store_again(i, one_by_one, registers * Lanes::width);
  }

 private:
  /// Stores sums from element i on as lanes of one.
  __attribute__((noinline, cold)) void store_again(int64_t i, const double* sums, int64_t count) {
    for (int64_t j = 0; j < count; ++j)
      if (store_mean<Lane, code, false>(result, begin + i + j, {sums[j]})) finite = false;
  }
};

/// Elements of a chunk until streaming stores may begin.
template <Code result>
FASTAGG_INLINE int64_t head_of(const Chunk& chunk) {
  const int64_t head = until_aligned(chunk.leaf.out, chunk.begin, sizeof(Element<result>), chunk.count);
  if (result != Code::state48 || head != 0) return head;
  return until_aligned(chunk.leaf.companion, chunk.begin, sizeof(uint16_t), chunk.count);
}

/// Whether float64 holds the group's weights times any float32: 24 bits times 29, and far from its bounds.
inline bool are_exact(const Group& group) {
  for (int k = 0; k < group.clients; ++k) {
    const double weight = group.weights[k];
    if ((bit_cast<int64_t>(weight) & 0xffffff) != 0 || !(0x1p-800 <= weight && weight <= 0x1p800)) return false;
  }
  return true;
}

/// sum += weight_k * x_k for the clients of a group, in float64, while whole registers fit before `end`; `exact`
/// products need no rounding of their own. Returns where it stopped.
template <class Lanes, Code code, bool exact = false, class Destination>
FASTAGG_INLINE int64_t add_products(const Chunk& chunk, const Group& group, int64_t i, int64_t end,
                                    Destination& destination) {
  using D = typename Lanes::D;
  constexpr int registers = registers_of<Lanes>;
  for (; i + registers * Lanes::width <= end; i += registers * Lanes::width) {
    D sum[registers][Lanes::halves];
    load_sums<Lanes>(sum, chunk, i);
    for (int k = 0; k < group.clients; ++k) {
      const Source& source = group.sources[k];
      const int64_t at = chunk.begin + i;
      const auto weight = broadcast<D>(group.weights[k]);
      for (int r = 0; r < registers; ++r) {
        D x[Lanes::halves];
        load_wide<Lanes, code>(source, at + r * Lanes::width, x);
        for (int h = 0; h < Lanes::halves; ++h)
          sum[r][h] = exact ? Lanes::add_exact_product(sum[r][h], weight, x[h]) : add_product(sum[r][h], weight, x[h]);
      }
    }
    destination.template put<Lanes, registers>(i, sum);
  }
  return i;
}

/// The same for a run: a group whose products are added up in float32 before they join the sum.
template <class Lanes, Code code, class Destination>
FASTAGG_INLINE int64_t add_run(const Chunk& chunk, const Group& group, int64_t i, int64_t end,
                               Destination& destination) {
  using Products = typename Lanes::template FloatProducts<code>;
  constexpr int registers = Products::width / Lanes::width, parts = Lanes::width == 1 ? 1 : 2;
  float weights[kLargestGroup];
  for (int k = 0; k < group.clients; ++k) weights[k] = static_cast<float>(group.weights[k]);
  for (; i + parts * Products::width <= end; i += parts * Products::width) {
    Products products[parts];
    for (int k = 0; k < group.clients; ++k)
      for (int p = 0; p < parts; ++p)
        products[p].add(group.sources[k].data, weights[k], chunk.begin + i + p * Products::width);
    for (int p = 0; p < parts; ++p) {
      typename Lanes::D sum[registers][Lanes::halves], x[registers][Lanes::halves];
      load_sums<Lanes>(sum, chunk, i + p * Products::width);
      products[p].widen(x);
      for (int r = 0; r < registers; ++r)
        for (int h = 0; h < Lanes::halves; ++h) sum[r][h] = sum[r][h] + x[r][h];
      destination.template put<Lanes, registers>(i + p * Products::width, sum);
    }
  }
  return i;
}

/// The same for scaled integers of one block, with their exact integer weights.
template <class Lanes, Code code, class Destination>
FASTAGG_INLINE int64_t add_integers(const Chunk& chunk, const Group& group, const IntegerWeights& weights, int64_t i,
                                    int64_t end, Destination& destination) {
  using D = typename Lanes::D;
  using Products = typename Lanes::IntegerProducts;
  constexpr int registers = Products::width / Lanes::width;
  for (; i + Products::width <= end; i += Products::width) {
    Products products;
    for (int k = 0; k < group.clients; k += 2) {
      const Source &one = group.sources[k], &other = group.sources[k + 1 < group.clients ? k + 1 : k];
      products.template add<code>(one.data, other.data, weights.pairs[k / 2], chunk.begin + i);
    }
    D sum[registers][Lanes::halves], x[registers][Lanes::halves];
    load_sums<Lanes>(sum, chunk, i);
    products.widen(x);
    for (int r = 0; r < registers; ++r)
      for (int h = 0; h < Lanes::halves; ++h) sum[r][h] = add_product(sum[r][h], broadcast<D>(weights.unit), x[r][h]);
    destination.template put<Lanes, registers>(i, sum);
  }
  return i;
}

/// The same where integer weights would not be exact: the group's sums are made in float64 first.
template <class Lanes, Code code, class Destination>
FASTAGG_INLINE void add_block_sums(const Chunk& chunk, const Group& group, int64_t i, int64_t end,
                                   Destination& destination) {
  double block_sums[kSums];
  const Chunk block{chunk.leaf, chunk.begin, chunk.count, block_sums, true};
  KeepSums keep{block_sums};
  walk<Lanes>(i, i, end, [&](auto lanes, int64_t from, int64_t to) {
    return add_products<decltype(lanes), code>(block, group, from, to, keep);
  });
  walk<Lanes>(i, i, end, [&](auto lanes, int64_t from, int64_t to) {
    using Own = decltype(lanes);
    for (; from + Own::width <= to; from += Own::width) {
      typename Own::D sum[1][Own::halves], added[1][Own::halves];
      load_sums<Own>(sum, chunk, from);
      load_sums<Own>(added, Chunk{chunk.leaf, chunk.begin, chunk.count, block_sums, false}, from);
      for (int h = 0; h < Own::halves; ++h) sum[0][h] = sum[0][h] + added[0][h];
      destination.template put<Own, 1>(from, sum);
    }
    return from;
  });
}

/// Adds a group of scaled integers to a chunk's sums, block by block.
template <class Lanes, Code code, class Destination>
FASTAGG_INLINE void add_scaled_integers(const Chunk& chunk, const Group& group, Destination& destination) {
  const int64_t block = int64_t{1} << group.smallest_block_shift();
  const ShortWeights short_weights(group);
  for (int64_t i = 0; i < chunk.count; i += block) {
    const int64_t end = i + block < chunk.count ? i + block : chunk.count;
    IntegerWeights weights;
    if (!short_weights.scaled<code>(group, chunk.begin + i, weights)) {
      add_block_sums<Lanes, code>(chunk, group, i, end, destination);
      continue;
    }
    walk<Lanes>(i, i, end, [&](auto lanes, int64_t from, int64_t to) {
      return add_integers<decltype(lanes), code>(chunk, group, weights, from, to, destination);
    });
  }
}

/// Adds a group of clients of one code to a chunk's sums; the elements before `head` in lanes of one.
template <class Lanes, Code code, class Destination>
void add_group(const Chunk& chunk, const Group& group, int64_t head, Destination& destination) {
  if constexpr (is_scaled_integer(code)) return add_scaled_integers<Lanes, code>(chunk, group, destination);
  const bool exact = code == Code::float32 && are_exact(group);
  walk<Lanes>(0, head, chunk.count, [&](auto lanes, int64_t from, int64_t to) {
    if constexpr (is_narrow_float(code))
      if (group.is_run) return add_run<decltype(lanes), code>(chunk, group, from, to, destination);
    if constexpr (code == Code::float32)
      if (exact) return add_products<decltype(lanes), code, true>(chunk, group, from, to, destination);
    return add_products<decltype(lanes), code>(chunk, group, from, to, destination);
  });
}

/// Stores the means of a chunk whose clients have all been added; true if every sum is finite.
template <class Lanes, Code code, bool stream>
bool store_means(const Chunk& chunk) {
  using Vectors = std::conditional_t<is_integer(code), Lane, Lanes>;
  StoreMeans<code, stream> means(chunk);
  walk<Vectors>(0, stream ? head_of<code>(chunk) : 0, chunk.count, [&](auto lanes, int64_t i, int64_t end) {
    using Own = decltype(lanes);
    for (; i + Own::width <= end; i += Own::width) {
      typename Own::D sum[1][Own::halves];
      load_sums<Own>(sum, chunk, i);
      means.template put<Own, 1>(i, sum);
    }
    return i;
  });
  return means.finite;
}

/// Adds the last group and stores the means; true if every sum is finite.
template <class Lanes, Code code, Code result, bool stream>
bool add_last_group(const Chunk& chunk, const Group& group) {
  StoreMeans<result, stream> means(chunk);
  add_group<Lanes, code>(chunk, group, stream ? head_of<result>(chunk) : 0, means);
  return means.finite;
}

/// Whether a loop over clients of this code can store the result itself: those that such clients usually have.
constexpr bool has_result(Code code, Code result) {
  if (is_integer(code)) return false;
  if (has_pairs(code) || has_pairs(result)) return false;
  return result == (has_scales(code) ? Code::float32 : code) || result == Code::state48;
}

/// The same if the leaf's result is one that the loop can store. Returns false if it is not, and nothing was done.
template <class Lanes, Code code, Code result>
bool add_and_store(const Chunk& chunk, const Group& group, bool stream, bool& finite) {
  if constexpr (has_result(code, result)) {
    if (chunk.leaf.code != result) return false;
    // Blocks with scales, and two planes, leave no choice of where vectors start.
    const bool fixed_start = has_scales(code) || result == Code::state48;
    stream = stream && !(fixed_start && head_of<result>(chunk) != 0);
    finite &= stream ? add_last_group<Lanes, code, result, true>(chunk, group)
                     : add_last_group<Lanes, code, result, false>(chunk, group);
    return true;
  }
  return false;
}

/// Stores the means of a chunk from its sums; true if every sum is finite.
template <class Lanes>
bool store_sums(const Chunk& chunk, bool stream) {
  bool finite = true;
  with_code(chunk.leaf.code, [&](auto constant) {
    constexpr Code code = constant.value;
    if constexpr (!has_scales(code) && code != Code::state128) {
      finite = stream && code != Code::state48 ? store_means<Lanes, code, true>(chunk)
                                               : store_means<Lanes, code, false>(chunk);
    }
  });
  return finite;
}

/// The means of one chunk; true if every sum is finite.
template <class Lanes>
bool store_chunk(Chunk chunk, bool stream) {
  const Leaf& leaf = chunk.leaf;
  bool finite = true, stored = false;
  for (int first = 0; first < leaf.clients; chunk.fresh = false) {
    const Group group = group_from(leaf, first);
    first += group.clients;
    with_code(group.sources[0].code, [&](auto constant) {
      constexpr Code code = constant.value, usual = has_scales(code) ? Code::float32 : code;
      if (first == leaf.clients)
        stored = add_and_store<Lanes, code, usual>(chunk, group, stream, finite) ||
                 add_and_store<Lanes, code, Code::state48>(chunk, group, stream, finite);
      KeepSums keep{chunk.sums};
      if (!stored) add_group<Lanes, code>(chunk, group, 0, keep);
    });
  }
  if (stored) return finite;
  return store_sums<Lanes>(chunk, stream);
}

/// out[i] = max_k x_k[i] for integers.
template <Code code>
void store_maximum(const Leaf& leaf, int64_t begin, int64_t end) {
  using T = Element<code>;
  T* out = static_cast<T*>(leaf.out);
  memmove(out + begin, static_cast<const T*>(leaf.sources[0].data) + begin, (end - begin) * sizeof(T));
  for (int k = 1; k < leaf.clients; ++k) {
    const T* x = static_cast<const T*>(leaf.sources[k].data);
    for (int64_t i = begin; i < end; ++i) out[i] = x[i] > out[i] ? x[i] : out[i];
  }
}

/// Whether a client's elements [begin, end), as `dequantize` gives them, are finite.
template <class Lanes>
bool all_finite(const Source& source, int64_t begin, int64_t end) {
  bool finite = true;
  with_code(source.code, [&](auto constant) {
    constexpr Code code = constant.value, work = code == Code::float64 ? code : Code::float32;
    if constexpr (!is_integer(code) && !is_state(code)) {
      walk<Lanes>(begin, begin, end, [&](auto lanes, int64_t i, int64_t to) {
        using Own = decltype(lanes);
        auto mask = not_finite(typename Numbers<Own, work>::Part{});
        for (; i + Own::width <= to; i += Own::width)
          for (const auto& part : decoded<Own, code, work>(source, i).values) mask |= not_finite(part);
        finite &= !Own::any(mask);
        return i;
      });
    }
  });
  return finite;
}

/// `weighted_sum` of the elements [begin, end) of a leaf, `begin` a multiple of kSums; true if every sum is finite.
/// With `stream`, the result bypasses the cache. Of a leaf without a destination: true if every client's are.
template <class Lanes>
bool weighted_sum(const Leaf& leaf, int64_t begin, int64_t end, bool stream) {
  if (leaf.fold == Fold::maximum) {
    with_code(leaf.code, [&](auto code) {
      if constexpr (is_integer(code.value)) store_maximum<code.value>(leaf, begin, end);
    });
    return true;
  }
  bool finite = true;
  if (leaf.out == nullptr) {
    for (int k = 0; k < leaf.clients; ++k) finite &= all_finite<Lanes>(leaf.sources[k], begin, end);
    return finite;
  }
  if (has_pairs(leaf.code)) return pair_sum<Lanes>(leaf, begin, end, stream);
  alignas(64) double sums[kSums];
  for (; begin < end; begin += kSums) {
    const int64_t count = end - begin < kSums ? end - begin : kSums;
    finite &= store_chunk<Lanes>({leaf, begin, count, sums, true}, stream);
  }
  return finite;
}

}  // namespace
}  // namespace fastagg

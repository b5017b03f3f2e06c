// The loop of `weighted_sum`, compiled once for each instruction set. A chunk's sums stay in the first-level cache as
// float64; groups of clients are added to them, so that every client is read once and few streams are open at a time.
#pragma once
#include "core/weighted_sum.h"
#include "stream.h"
#include "unaligned.h"

namespace fastagg {

/// Sums of a chunk: half of a first-level cache, which the clients' streams share.
constexpr int64_t kSums = 2048;
/// Vectors of sums that stay in registers while a group is added.
constexpr int kRegisters = 2;

/// Registers of sums from memory and back.
template <class Lanes, int registers>
FASTAGG_INLINE void load_sums(typename Lanes::D (&sum)[registers][Lanes::halves], const double* sums) {
  constexpr int half = Lanes::width / Lanes::halves;
  for (int r = 0; r < registers; ++r)
    for (int h = 0; h < Lanes::halves; ++h)
      sum[r][h] = load_bytes<typename Lanes::D>(sums + r * Lanes::width + h * half);
}

template <class Lanes, int registers>
FASTAGG_INLINE void store_sums(double* sums, const typename Lanes::D (&sum)[registers][Lanes::halves]) {
  constexpr int half = Lanes::width / Lanes::halves;
  for (int r = 0; r < registers; ++r)
    for (int h = 0; h < Lanes::halves; ++h) store_bytes(sums + r * Lanes::width + h * half, sum[r][h]);
}

/// Sets sums to -0.0: what addition leaves alone, zeros' signs included.
inline void clear(double* sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] = -0.0;
}

/// sums[i] += weight_k * x_k[begin + i] for the clients of a group, in float64, while whole registers fit before
/// `count`. Returns where it stopped.
template <class Lanes, Code code>
FASTAGG_INLINE int64_t add_products(double* sums, Group group, int64_t begin, int64_t i, int64_t count) {
  using D = typename Lanes::D;
  constexpr int halves = Lanes::halves, registers = Lanes::width == 1 ? 1 : kRegisters;
  for (; i + registers * Lanes::width <= count; i += registers * Lanes::width) {
    D sum[registers][halves];
    load_sums<Lanes>(sum, sums + i);
    for (int k = 0; k < group.clients; ++k) {
      const Source& source = group.sources[k];
      const auto weight = broadcast<D>(group.weights[k] * static_cast<double>(scale_at<code>(source, begin + i)));
      for (int r = 0; r < registers; ++r) {
        D x[halves];
        load_wide<Lanes, code>(source, begin + i + r * Lanes::width, x);
        for (int h = 0; h < halves; ++h) sum[r][h] = add_product(sum[r][h], weight, x[h]);
      }
    }
    store_sums<Lanes>(sums + i, sum);
  }
  return i;
}

/// The same for pairs of clients of a narrow code, whose products are added in float32 before they join the sum.
template <class Lanes, Code code>
FASTAGG_INLINE int64_t add_pairs(double* sums, Group group, int64_t begin, int64_t i, int64_t count) {
  using F = typename Lanes::F;
  using D = typename Lanes::D;
  constexpr int halves = Lanes::halves, registers = Lanes::width == 1 ? 1 : kRegisters;
  for (; i + registers * Lanes::width <= count; i += registers * Lanes::width) {
    D sum[registers][halves];
    load_sums<Lanes>(sum, sums + i);
    for (int k = 0; k < group.clients; k += 2) {
      const Source &one = group.sources[k], &other = group.sources[k + 1];
      const auto weight = broadcast<F>(static_cast<float>(group.weights[k]) * scale_at<code>(one, begin + i));
      const auto other_weight =
          broadcast<F>(static_cast<float>(group.weights[k + 1]) * scale_at<code>(other, begin + i));
      for (int r = 0; r < registers; ++r) {
        const int64_t at = begin + i + r * Lanes::width;
        D x[halves];
        Lanes::widen(sum_pair(weight, load<Lanes, code>(one.data, at), other_weight, load<Lanes, code>(other.data, at)),
                     x);
        for (int h = 0; h < halves; ++h) sum[r][h] = sum[r][h] + x[h];
      }
    }
    store_sums<Lanes>(sums + i, sum);
  }
  return i;
}

/// The same for scaled integers of one block, with their exact integer weights.
template <class Lanes, Code code>
FASTAGG_INLINE int64_t add_integers(double* sums, Group group, const IntegerWeights& weights, int64_t begin, int64_t i,
                                    int64_t count) {
  using D = typename Lanes::D;
  using Products = typename Lanes::IntegerProducts;
  for (; i + Products::width <= count; i += Products::width) {
    Products products;
    for (int k = 0; k < group.clients; k += 2) {
      const bool odd = k + 1 == group.clients;
      const Source &one = group.sources[k], &other = group.sources[odd ? k : k + 1];
      products.template add<code>(one.data, weights.values[k], other.data, odd ? 0 : weights.values[k + 1], begin + i);
    }
    D sum[Products::width / Lanes::width][Lanes::halves], x[Products::width / Lanes::width][Lanes::halves];
    load_sums<Lanes>(sum, sums + i);
    products.widen(x);
    for (int r = 0; r < Products::width / Lanes::width; ++r)
      for (int h = 0; h < Lanes::halves; ++h) sum[r][h] = add_product(sum[r][h], broadcast<D>(weights.unit), x[r][h]);
    store_sums<Lanes>(sums + i, sum);
  }
  return i;
}

/// Adds a group of scaled integers to a chunk's sums, block by block.
template <class Lanes, Code code>
void add_scaled_integers(double* sums, Group group, int64_t begin, int64_t count) {
  const int64_t block = int64_t{1} << group.smallest_block_shift();
  for (int64_t i = 0; i < count; i += block) {
    const int64_t end = i + block < count ? i + block : count;
    const IntegerWeights weights = integer_weights<code>(group, begin + i);
    if (weights.exact) {
      const int64_t done = add_integers<Lanes, code>(sums, group, weights, begin, i, end);
      add_integers<Lane, code>(sums, group, weights, begin, done, end);
      continue;
    }
    double group_sums[kSums];
    clear(group_sums, end - i);
    const int64_t done = add_products<Lanes, code>(group_sums, group, begin + i, 0, end - i);
    add_products<Lane, code>(group_sums, group, begin + i, done, end - i);
    for (int64_t j = i; j < end; ++j) sums[j] = sums[j] + group_sums[j - i];
  }
}

/// Adds a group of clients of one code to a chunk's sums: its vectors first, its tail as lanes of one.
template <class Lanes, Code code>
void add_group(double* sums, Group group, bool pairwise, int64_t begin, int64_t count) {
  if constexpr (is_scaled_integer(code)) return add_scaled_integers<Lanes, code>(sums, group, begin, count);
  if constexpr (is_narrow_float(code)) {
    if (pairwise) {
      const Group pairs{group.sources, group.weights, group.clients & ~1};
      const int64_t done = add_pairs<Lanes, code>(sums, pairs, begin, 0, count);
      add_pairs<Lane, code>(sums, pairs, begin, done, count);
      group = {group.sources + pairs.clients, group.weights + pairs.clients, group.clients & 1};
    }
  }
  const int64_t done = add_products<Lanes, code>(sums, group, begin, 0, count);
  add_products<Lane, code>(sums, group, begin, done, count);
}

/// Adds the clients of a leaf to a chunk's sums, in order, in groups of one code.
template <class Lanes>
void add_clients(const Leaf& leaf, double* sums, int64_t begin, int64_t count) {
  for (int first = 0; first < leaf.clients;) {
    const Group group = group_from(leaf, first);
    with_code(group.sources[0].code, [&](auto constant) {
      add_group<Lanes, decltype(constant)::value>(sums, group, pairs_fit(leaf.code), begin, count);
    });
    first += group.clients;
  }
}

/// Stores a chunk's means; true if every sum is finite. With `stream`, vectors start at the first aligned element.
template <class Lanes, Code code, bool stream>
bool store_means(const Leaf& leaf, double* sums, int64_t begin, int64_t count) {
  using Wide = std::conditional_t<is_integer(code), Lane, Lanes>;
  const Result result(leaf, leaf.out, leaf.companion);
  double check = 0;
  int64_t i = 0;
  const auto store_one = [&](int64_t one) {
    double x[1] = {sums[one]};
    check += finite_check(x[0]);
    store_mean<Lane, code, false>(result, begin + one, x);
  };
  const int64_t head = stream ? until_aligned(leaf.out, begin, sizeof(Element<code>), count) : 0;
  while (i < head) store_one(i++);
  typename Wide::D checks[Wide::halves] = {};
  for (; i + Wide::width <= count; i += Wide::width) {
    typename Wide::D x[1][Wide::halves];
    load_sums<Wide>(x, sums + i);
    for (int h = 0; h < Wide::halves; ++h) checks[h] += finite_check(x[0][h]);
    store_mean<Wide, code, stream>(result, begin + i, x[0]);
  }
  while (i < count) store_one(i++);
  double lanes[Wide::width];
  memcpy(&lanes, &checks, sizeof lanes);
  for (double lane : lanes) check += lane;
  return check == 0;
}

/// Whether a chunk's sums are finite, for a leaf without a destination.
inline bool all_finite(const double* sums, int64_t count) {
  double check = 0;
  for (int64_t i = 0; i < count; ++i) check += finite_check(sums[i]);
  return check == 0;
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

/// `weighted_sum` of the elements [begin, end) of a leaf, `begin` a multiple of kSums; true if every sum is finite.
/// With `stream`, the result bypasses the cache.
template <class Lanes>
bool weighted_sum(const Leaf& leaf, int64_t begin, int64_t end, bool stream) {
  bool finite = true;
  if (leaf.fold == Fold::maximum) {
    with_code(leaf.code, [&](auto code) {
      if constexpr (is_integer(code.value)) store_maximum<code.value>(leaf, begin, end);
    });
    return finite;
  }
  alignas(64) double sums[kSums];
  for (; begin < end; begin += kSums) {
    const int64_t count = end - begin < kSums ? end - begin : kSums;
    clear(sums, count);
    add_clients<Lanes>(leaf, sums, begin, count);
    if (leaf.out == nullptr) {
      finite &= all_finite(sums, count);
      continue;
    }
    with_code(leaf.code, [&](auto code) {
      if constexpr (!has_scales(code.value)) {
        finite &= stream ? store_means<Lanes, code.value, true>(leaf, sums, begin, count)
                         : store_means<Lanes, code.value, false>(leaf, sums, begin, count);
      }
    });
  }
  return finite;
}

}  // namespace fastagg

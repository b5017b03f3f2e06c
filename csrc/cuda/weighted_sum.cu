// `weighted_sum`: every leaf of a model in one launch, those whose sums are pairs (core/pair.h) in another. A thread
// keeps the float64 sums of a few elements in registers and walks the clients in order, as csrc/cpu/weighted_sum.h
// does: the same bits.
#include "core/weighted_sum.h"
#include "elements.cuh"
#include "launch.cuh"
#include "operations.h"

namespace fastagg::cuda {
namespace {

/// Clients whose loads are under way together, a power of two: those of a byte must be more to keep the memory busy.
template <Code code>
constexpr int kInFlight = sizeof(Element<code>) == 1 ? 8 : 4;
/// Blocks that a multiprocessor shall hold at least: with kBlocks, too few registers were left for the loads of float32
/// clients, of which then only two were under way, and 8-bit clients spilled. Pairs spilled with five, on sm_80.
template <Part part>
constexpr int kSumBlocks = part == Part::pairs ? 4 : 5;

/// Element j of those loaded, as `dequantize` gives it.
template <Code code, int n>
FASTAGG_INLINE double decoded_value(const Elements<code, n>& elements, float scale, int j) {
  if constexpr (has_scales(code)) return static_cast<double>(value_of<float>(elements, j) * scale);
  else return value_of<double>(elements, j);
}

/// sums += weight_k * x_k for neighbouring clients, from index i on, in the precision of the sums.
template <Code code, int clients, class T, int n>
FASTAGG_INLINE void add_clients(T (&sums)[n], const Source* sources, const double* client_weights, int64_t i) {
  Elements<code, n> x[clients];
  T weights[clients];
  for (int k = 0; k < clients; ++k) {
    const Source source = global(sources)[k];
    x[k] = load_elements<code, n>(source, i);
    weights[k] = static_cast<T>(global(client_weights)[k]) * static_cast<T>(load_scale<code>(source, i));
  }
  for (int k = 0; k < clients; ++k)
    for (int j = 0; j < n; ++j) sums[j] = add_product(sums[j], weights[k], value_of<T>(x[k], j));
}

/// Adds a group's clients from number k on, so many at a time, then half as many: one by one they would each wait for
/// the memory as long as all of them together.
template <Code code, int clients, class T, int n>
FASTAGG_INLINE void add_products(T (&sums)[n], const Group& group, int64_t i, int k = 0) {
  for (; k + clients <= group.clients; k += clients)
    add_clients<code, clients>(sums, group.sources + k, group.weights + k, i);
  if constexpr (clients > 1) add_products<code, clients / 2>(sums, group, i, k);
}

/// Adds a group's clients, one by one as `dequantize` decodes them if they are `odd`.
template <Code code, bool odd, class T, int n>
FASTAGG_INLINE void add_all(T (&sums)[n], const Group& group, int64_t i) {
  if constexpr (odd && has_scales(code)) {
    for (int k = 0; k < group.clients; ++k) {
      const Source source = global(group.sources)[k];
      const Elements<code, n> x = load_elements<code, n>(source, i);
      for (int j = 0; j < n; ++j)
        sums[j] = add_product(sums[j], group.weights[k], decoded_value<code>(x, load_scale<code>(source, i), j));
    }
  } else {
    add_products<code, kInFlight<code>>(sums, group, i);
  }
}

/// Adds a group's clients to sums of their own first, in float32 or float64.
template <Code code, bool odd, class T, int n>
FASTAGG_INLINE void add_together(double (&sums)[n], const Group& group, int64_t i) {
  T own[n];
  for (T& sum : own) sum = static_cast<T>(-0.0);
  add_all<code, odd>(own, group, i);
  for (int j = 0; j < n; ++j) sums[j] = sums[j] + static_cast<double>(own[j]);
}

/// Adds a group of clients of one code.
template <Code code, bool odd, int n>
FASTAGG_INLINE void add_group(double (&sums)[n], const Group& group, int64_t i) {
  if constexpr (is_scaled_integer(code)) return add_together<code, odd, double>(sums, group, i);
  if constexpr (is_narrow_float(code))
    if (group.is_run) return add_together<code, odd, float>(sums, group, i);
  add_all<code, odd>(sums, group, i);
}

/// Stores n means from i on; true if they are finite.
template <Code code, int n>
FASTAGG_INLINE bool store_means(const Leaf& leaf, const double (&sums)[n], int64_t i) {
  Elements<code, n> means;
  const Result result(leaf, means.entries.values, means.companion.values);
  bool finite = true;
  for (int j = 0; j < n; ++j) finite &= !store_mean<ThreadLane, code, false>(result, j, {sums[j]});
  store_elements<code, n>(leaf.out, leaf.companion, i, means);
  return finite;
}

/// The weighted means of n elements from i on; true if they are finite. `odd` as for `add_all`.
template <int n, bool odd = false>
FASTAGG_INLINE bool mean(const Leaf& leaf, int64_t i) {
  double sums[n];
  for (double& sum : sums) sum = -0.0;  // what addition leaves alone, zeros' signs included
  for (int first = 0; first < leaf.clients;) {
    const Group group = group_from(leaf, first);
    with_code(group.sources[0].code, [&](auto code) { add_group<decltype(code)::value, odd>(sums, group, i); });
    first += group.clients;
  }
  bool finite = true;
  with_code(leaf.code, [&](auto code) {
    constexpr Code result = decltype(code)::value;
    if constexpr (!has_scales(result) && !has_pairs(result)) finite = store_means<result>(leaf, sums, i);
  });
  return finite;
}

/// Whether a thread's share of the scales of the elements [begin, end) has one that a weight cannot take. Such are
/// rare.
FASTAGG_INLINE bool has_odd_scale(const Leaf& leaf, int64_t begin, int64_t end, int thread) {
  bool odd = false;
  for (int k = 0; k < leaf.clients; ++k) {
    const Source source = global(leaf.sources)[k];
    if (!has_scales(source.code) || source.code == Code::wire_sign) continue;
    const auto* scales = global(static_cast<const float*>(source.companion));
    for (int64_t block = (begin >> source.block_shift) + thread; block <= (end - 1) >> source.block_shift;
         block += kThreads)
      odd |= !may_join_weight(scales[block]);
  }
  return odd;
}

/// The mean of an element beside such a scale.
__host__ __device__ __attribute__((noinline)) bool odd_mean(const Leaf& leaf, int64_t i) {
  return mean<1, true>(leaf, i);
}

/// sums += weight_k * x_k for a group's clients from number k on, in pairs; so many at a time, as for `add_products`.
template <Code code, int clients, int n>
FASTAGG_INLINE void add_pairs(Pair<double> (&sums)[n], const Group& group, double raise, int64_t i, int k = 0) {
  for (; k + clients <= group.clients; k += clients) {
    Elements<code, n> x[clients];
    double weights[clients];
    float scales[clients];
    for (int c = 0; c < clients; ++c) {
      const Source source = global(group.sources)[k + c];
      x[c] = load_elements<code, n>(source, i);
      weights[c] = global(group.weights)[k + c] * raise;
      scales[c] = load_scale<code>(source, i);
    }
    for (int c = 0; c < clients; ++c)
      for (int j = 0; j < n; ++j) {
        if constexpr (code == Code::state128)
          add_exact<ThreadLane>(sums[j], weights[c], Pair<double>{x[c].entries.values[j], x[c].companion.values[j]});
        else add_exact<ThreadLane>(sums[j], weights[c], decoded_value<code>(x[c], scales[c], j));
      }
  }
  if constexpr (clients > 1) add_pairs<code, clients / 2>(sums, group, raise, i, k);
}

/// Such elements are few.
__host__ __device__ __attribute__((noinline)) double huge_mean(const Leaf& leaf, int64_t i) {
  return mean_of_huge<ThreadLane>(leaf, i);
}

/// Stores n means from i on; true if they are finite. `stored` is where the leaf lies: a call takes it without a copy.
template <int n>
FASTAGG_INLINE bool store_quotients(const Leaf& leaf, const Leaf& stored, const Pair<double> (&sums)[n], int64_t i) {
  const Divisor divisor(leaf.divisor * kRaised, leaf.divisor_rest * kRaised);
  Elements<Code::float64, n> means;
  bool finite = true;
  for (int j = 0; j < n; ++j) {
    double mean = quotient_of_finite<ThreadLane>(sums[j], divisor);
    if (not_finite(mean)) mean = huge_mean(stored, i + j);
    finite &= !not_finite(mean);
    means.entries.values[j] = mean;
  }
  store_elements<Code::float64, n>(leaf.out, nullptr, i, means);
  return finite;
}

/// Stores n sums from i on; true if they are finite.
template <int n>
FASTAGG_INLINE bool store_sums(const Leaf& leaf, const Pair<double> (&sums)[n], int64_t i) {
  Elements<Code::state128, n> pairs;
  bool finite = true;
  for (int j = 0; j < n; ++j) {
    finite &= !not_finite(sums[j].high);
    pairs.entries.values[j] = sums[j].high, pairs.companion.values[j] = sums[j].excess;
  }
  store_elements<Code::state128, n>(leaf.out, leaf.companion, i, pairs);
  return finite;
}

/// The weighted means or sums, in pairs, of n elements from i on; true if they are finite.
template <int n>
FASTAGG_INLINE bool pair_sum(const Leaf& leaf, const Leaf& stored, int64_t i) {
  Pair<double> sums[n];
  for (auto& sum : sums) sum = empty_sum<double>();
  for (int first = 0; first < leaf.clients;) {
    const Group group = group_from(leaf, first);
    with_code(group.sources[0].code,
              [&](auto code) { add_pairs<decltype(code)::value, 4>(sums, group, raise_of(leaf.code), i); });
    first += group.clients;
  }
  return leaf.code == Code::float64 ? store_quotients(leaf, stored, sums, i) : store_sums(leaf, sums, i);
}

/// Whether all clients' n elements from i on, as `dequantize` gives them, are finite.
template <int n>
FASTAGG_INLINE bool are_finite(const Leaf& leaf, int64_t i) {
  bool finite = true;
  for (int k = 0; k < leaf.clients; ++k) {
    const Source source = leaf.sources[k];
    with_code(source.code, [&](auto constant) {
      constexpr Code code = decltype(constant)::value;
      if constexpr (!is_integer(code) && !is_state(code)) {
        const Elements<code, n> x = load_elements<code, n>(source, i);
        const float scale = load_scale<code>(source, i);
        for (int j = 0; j < n; ++j) finite &= !not_finite(decoded_value<code>(x, scale, j));
      }
    });
  }
  return finite;
}

/// The maximum of the elements i of an integer code.
template <Code code>
FASTAGG_INLINE void maximum(const Leaf& leaf, int64_t i) {
  using T = Element<code>;
  T largest = static_cast<const T*>(leaf.sources[0].data)[i];
  for (int k = 1; k < leaf.clients; ++k) {
    const T x = static_cast<const T*>(leaf.sources[k].data)[i];
    largest = x > largest ? x : largest;
  }
  static_cast<T*>(leaf.out)[i] = largest;
}

/// A thread's elements [begin, end) of a leaf, as far as vectors of n reach; returns where they stop.
template <Part part, int n>
FASTAGG_INLINE int64_t walk(const Leaf& leaf, const Leaf& stored, int64_t begin, int64_t end, int thread,
                            bool& finite) {
  const int64_t stop = end - (end - begin) % n;
  for (int64_t i = begin + n * thread; i < stop; i += n * kThreads) {
    if constexpr (part == Part::sums) finite &= mean<n>(leaf, i);
    if constexpr (part == Part::pairs) finite &= pair_sum<n>(leaf, stored, i);
    if constexpr (part == Part::finite) finite &= are_finite<n>(leaf, i);
  }
  return stop;
}

/// A thread's share of the elements [begin, end) of a leaf, which may lie beside `odd` scales; true if every sum is
/// finite.
template <Part part>
FASTAGG_INLINE bool fold(const TableLeaf& entry, bool odd, const Leaf& stored, int64_t begin, int64_t end, int thread) {
  const Leaf& leaf = entry.leaf;
  bool finite = true;
  if constexpr (part == Part::sums) {
    if (leaf.fold == Fold::maximum) {
      for (int64_t i = begin + thread; i < end; i += kThreads)
        with_code(leaf.code, [&](auto code) {
          if constexpr (is_integer(decltype(code)::value)) maximum<decltype(code)::value>(leaf, i);
        });
      return finite;
    }
    if (odd) {
      for (int64_t i = begin + thread; i < end; i += kThreads) finite &= odd_mean(stored, i);
      return finite;
    }
  }
  if (entry.aligned) {
    // A warp's accesses touch whole lines: of 16 bytes a thread where the clients' elements have two or four.
    bool narrow = false;
    if constexpr (part == Part::sums) {
      narrow = leaf.clients > 0 && encoded_bytes(leaf.sources[0].code, 1) <= 2;
      if (narrow) begin = walk<part, 8>(leaf, stored, begin, end, thread, finite);
    }
    if (!narrow) begin = walk<part, 4>(leaf, stored, begin, end, thread, finite);
  }
  walk<part, 1>(leaf, stored, begin, end, thread, finite);
  return finite;
}

template <Part part>
__global__ void __launch_bounds__(kThreads, kSumBlocks<part>) weighted_sum_kernel(LeafTable table) {
  int64_t index = 0;
  for (int64_t task = blockIdx.x; task < table.tasks; task += gridDim.x) {
    index = leaf_of(table, index, task);
    const TableLeaf entry = table.leaves[index];
    if (part_of(entry.leaf) != part) continue;
    const int64_t begin = (task - entry.first_task) * kTask;
    const int64_t end = begin + kTask < entry.leaf.count ? begin + kTask : entry.leaf.count;
    const auto thread = static_cast<int>(threadIdx.x);
    bool odd = false;
    if constexpr (part == Part::sums)
      odd = entry.scaled && __syncthreads_or(has_odd_scale(entry.leaf, begin, end, thread)) != 0;
    if (!fold<part>(entry, odd, table.leaves[index].leaf, begin, end, thread)) atomicOr(&table.nonfinite[index], 1);
  }
}

/// Does the leaves of a part, if there are any.
template <Part part>
cudaError_t launch_part(const LeafTable& table, cudaStream_t stream) {
  if (!table.parts[static_cast<int>(part)]) return cudaSuccess;
  return launch_persistent(weighted_sum_kernel<part>, table.tasks, stream, table);
}

}  // namespace

cudaError_t weighted_sum(const LeafTable& table, cudaStream_t stream) noexcept {
  cudaError_t error = launch_part<Part::sums>(table, stream);
  if (error == cudaSuccess) error = launch_part<Part::pairs>(table, stream);
  if (error == cudaSuccess) error = launch_part<Part::finite>(table, stream);
  return error;
}

}  // namespace fastagg::cuda

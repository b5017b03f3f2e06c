// The arithmetic of `weighted_sum`: out = sum_k weight_k * x_k / divisor.
//
// The sum runs in float64, in client order, one rounding a product and one a sum: products of float32 values with
// counts are exact there. That of a float64 result runs in twice float64's precision (pair.h). Two shortcuts spare the
// float64 unit where narrow codes would wait for it:
// - For a result of 16 bits, runs of 16-bit clients are added up in float32 before they join the sum.
// - Scaled integers of a group of clients are added up before they join the sum: as integers where that is exact, else
//   in float64. Both are the same number.
#pragma once
#include "decode.h"
#include "pair.h"

namespace fastagg {

/// Clients whose streams are read together: with more, prefetching fell behind (100 clients: 8 took 44 ms, 16 took 53).
constexpr int kGroup = 8;
/// A last group may be so large: a few clients left over would cost the sums one more way through the cache.
constexpr int kLargestGroup = 12;
/// Clients of a run, and the least weight of one: products with smaller ones could vanish in float32.
constexpr int kRun = 8;
constexpr double kLeastRunWeight = 0x1p-60;

/// Neighbouring clients of one code.
struct Group {
  const Source* sources;
  const double* weights;
  int clients;
  bool is_run;  // added up in float32

  /// Elements that share their scales: the blocks of all clients are multiples of the smallest.
  FASTAGG_INLINE int smallest_block_shift() const {
    int shift = sources[0].block_shift;
    for (int k = 1; k < clients; ++k) shift = sources[k].block_shift < shift ? sources[k].block_shift : shift;
    return shift;
  }
};

/// The next clients from `first` on that share its code; a run of at most kRun where the result's own rounding is far
/// coarser than a float32 sum's.
FASTAGG_INLINE Group group_from(const Leaf& leaf, int first) {
  const Code code = leaf.sources[first].code;
  const bool may_run = is_narrow_float(code) && is_narrow_float(leaf.code);
  const bool is_run = may_run && leaf.weights[first] >= kLeastRunWeight;
  const int left = leaf.clients - first;
  const int most = is_run ? kRun : left <= kLargestGroup ? kLargestGroup : kGroup;
  int clients = 1;
  while (clients < most && clients < left && leaf.sources[first + clients].code == code &&
         (may_run && leaf.weights[first + clients] >= kLeastRunWeight) == is_run)
    ++clients;
  return {leaf.sources + first, leaf.weights + first, clients, is_run};
}

/// sum + weight * x, the product rounded before the sum (contraction is off in every build).
template <class T>
FASTAGG_INLINE T add_product(T sum, T weight, T x) {
  return sum + weight * x;
}

/// A double as the float32 whose further rounding to a narrower float equals one rounding: truncated, its last bit set
/// if anything was cut off ("round to odd").
template <class D, class L>
FASTAGG_INLINE D round_to_odd(D x) {
  constexpr int64_t tail = 0x1fffffff;
  const L bits = bit_cast<L>(x);
  return bit_cast<D>((bits | ((bits & tail) + tail)) & ~tail);
}

/// The same where |x| is below the normal numbers of float32, whose subnormals are the grid to be odd on.
template <class D, class L>
FASTAGG_INLINE D round_subnormal_to_odd(D x) {
  const D magnitude = bit_cast<D>(bit_cast<L>(x) & INT64_MAX);
  const D on_grid = magnitude + 0x1p-97;  // its last bit is 2^-149, the unit of float32's subnormals
  const D nearest = on_grid - 0x1p-97;
  const L even = (bit_cast<L>(on_grid) & 1) == 0 ? L{} + 1 : L{};
  const L step = nearest > magnitude ? -even : even;
  const D odd = bit_cast<D>(bit_cast<L>(on_grid) + step) - 0x1p-97;
  return bit_cast<D>(bit_cast<L>(nearest == magnitude ? magnitude : odd) | (bit_cast<L>(x) & INT64_MIN));
}

/// Whether x is infinite or NaN, in every lane.
template <class T>
FASTAGG_INLINE auto not_finite(T x) {
  return x - x != T{};
}

/// Which lanes are below float32's and bfloat16's normal numbers, but not zero.
template <class F, class I>
FASTAGG_INLINE auto is_subnormal(F x) {
  const F magnitude = bit_cast<F>(bit_cast<I>(x) & 0x7fffffff);
  return (magnitude < 0x1p-126f) & (magnitude > 0.0f);
}

/// Doubles as float32 that will be rounded once more, to a narrower float of at least float32's smallest normal.
template <class Lanes>
FASTAGG_INLINE typename Lanes::F narrow_to_odd(const typename Lanes::D (&x)[Lanes::halves]) {
  typename Lanes::D odd[Lanes::halves];
  for (int h = 0; h < Lanes::halves; ++h) odd[h] = round_to_odd<typename Lanes::D, typename Lanes::L>(x[h]);
  return Lanes::narrow(odd);
}

/// The same for bfloat16, which has subnormals: they are rare, and looked after only where there are some.
template <class Lanes>
FASTAGG_INLINE typename Lanes::F narrow_to_odd_for_bfloat16(const typename Lanes::D (&x)[Lanes::halves]) {
  const auto narrow = narrow_to_odd<Lanes>(x);
  const auto subnormal = is_subnormal<typename Lanes::F, typename Lanes::I>(narrow);
  if (!Lanes::any(subnormal)) return narrow;
  typename Lanes::D odd[Lanes::halves];
  for (int h = 0; h < Lanes::halves; ++h) odd[h] = round_subnormal_to_odd<typename Lanes::D, typename Lanes::L>(x[h]);
  return subnormal ? Lanes::narrow(odd) : narrow;
}

/// Rounds to the nearest even integer and saturates at the bounds of T.
template <class T>
FASTAGG_INLINE T to_integer(double x) {
  constexpr bool is_signed = static_cast<T>(-1) < static_cast<T>(0);
  constexpr int bits = 8 * sizeof(T) - is_signed;
  constexpr T largest = static_cast<T>(~uint64_t{0} >> (64 - bits));
  constexpr double limit = 2.0 * static_cast<double>(uint64_t{1} << (bits - 1));
  if (!(x == x)) return 0;  // a conversion of NaN is undefined
  const double magnitude = x < 0 ? -x : x;
  double whole = magnitude < 0x1p52 ? (magnitude + 0x1p52) - 0x1p52 : magnitude;
  if (x < 0) whole = -whole;
  if (whole >= limit) return largest;
  if (whole < (is_signed ? -limit : 0)) return is_signed ? static_cast<T>(-largest - 1) : T{0};
  return static_cast<T>(whole);
}

/// Where means go, and what the sums are divided by: by way of a reciprocal, whose error is float64's, but for
/// integers and float64.
struct Result {
  FASTAGG_INLINE Result(const Leaf& leaf, void* out, void* companion)
      : out(out), companion(companion), divisor(leaf.divisor, leaf.divisor_rest), dither(leaf.dither) {}

  void* out;
  void* companion;
  Divisor divisor;
  uint16_t dither;
};

/// Stores doubles as a result's code from index i on; returns which lanes are infinite or NaN.
template <class Lanes, Code code, bool stream>
FASTAGG_INLINE auto store_wide(const Result& result, int64_t i, const typename Lanes::D (&x)[Lanes::halves]) {
  if constexpr (code == Code::float64) Lanes::template store_float64<stream>(result.out, i, x);
  if constexpr (code == Code::state48)
    Lanes::template store_state48<stream>(result.out, result.companion, i, x, result.dither);
  auto mask = not_finite(x[0]);
  for (int h = 1; h < Lanes::halves; ++h) mask |= not_finite(x[h]);
  return mask;
}

/// Stores doubles as bfloat16, by one addition a lane; returns which lanes are infinite, NaN or subnormal: those need
/// the longer way of a lane of one.
template <class Lanes, bool stream>
FASTAGG_INLINE auto store_bfloat16(const Result& result, int64_t i, const typename Lanes::D (&x)[Lanes::halves]) {
  using F = typename Lanes::F;
  using I = typename Lanes::I;
  if constexpr (Lanes::width == 1) {
    const F mean = narrow_to_odd_for_bfloat16<Lanes>(x);
    Lanes::template store_uint16<stream>(result.out, i, encode_bfloat16<Rounding::nearest, F, I>(mean, I{}));
    return not_finite(mean);
  } else {
    const F mean = narrow_to_odd<Lanes>(x);
    Lanes::template store_uint16<stream>(result.out, i, round_to_bfloat16(bit_cast<I>(mean)));
    return not_finite(mean) | is_subnormal<F, I>(mean);
  }
}

/// Divides sums and stores the means as a result's code from index i on. Returns which lanes to store again, one by
/// one: those whose means are infinite or NaN, and a few others. From lanes of one: whether it is not finite.
template <class Lanes, Code code, bool stream>
FASTAGG_INLINE auto store_mean(const Result& result, int64_t i, const typename Lanes::D (&sum)[Lanes::halves]) {
  if constexpr (is_integer(code)) {  // a quotient that is a tie must stay one
    static_cast<Element<code>*>(result.out)[i] = to_integer<Element<code>>(sum[0] / result.divisor.high);
    return not_finite(sum[0]);
  } else {
    typename Lanes::D x[Lanes::halves];
    for (int h = 0; h < Lanes::halves; ++h) {
      if constexpr (code == Code::float64) x[h] = quotient<Lanes>(Pair<typename Lanes::D>{sum[h], {}}, result.divisor);
      else x[h] = sum[h] * result.divisor.inverse;
    }
    if constexpr (code == Code::float64 || code == Code::state48) return store_wide<Lanes, code, stream>(result, i, x);
    if constexpr (code == Code::bfloat16) return store_bfloat16<Lanes, stream>(result, i, x);
    if constexpr (code == Code::float32 || code == Code::float16) {
      const auto mean = code == Code::float32 ? Lanes::narrow(x) : narrow_to_odd<Lanes>(x);
      if constexpr (code == Code::float32) Lanes::template store_float32<stream>(result.out, i, mean);
      else Lanes::template store_float16<stream>(result.out, i, mean);
      return not_finite(mean);
    }
  }
}

/// Whether sums of a result are pairs.
constexpr FASTAGG_INLINE bool has_pairs(Code result) { return result == Code::float64 || result == Code::state128; }

/// By what weights are larger in the sums of such a result: sums that are kept are as the weights make them.
constexpr FASTAGG_INLINE double raise_of(Code result) { return result == Code::float64 ? kRaised : 1.0; }

/// sum += weight * x for a source's elements from index i on.
template <class Lanes, Code code, class D>
FASTAGG_INLINE void add_elements(Pair<D> (&sum)[Lanes::halves], D weight, const Source& source, int64_t i) {
  D x[Lanes::halves];
  load_wide<Lanes, code>(source, i, x);
  if constexpr (code == Code::state128) {
    D rest[Lanes::halves];
    Lanes::template load_wide<double>(source.companion, i, rest);
    for (int h = 0; h < Lanes::halves; ++h) add_exact<Lanes>(sum[h], weight, Pair<D>{x[h], rest[h]});
  } else {
    for (int h = 0; h < Lanes::halves; ++h) add_exact<Lanes>(sum[h], weight, x[h]);
  }
}

/// The mean of a float64 element whose sum left the range of float64: finite, where the clients' values are.
template <class Lanes>
FASTAGG_INLINE double mean_of_huge(const Leaf& leaf, int64_t i) {
  static_assert(Lanes::width == 1, "such elements are few");
  Pair<double> sum = empty_sum<double>();
  for (int k = 0; k < leaf.clients; ++k)
    with_code(leaf.sources[k].code, [&](auto constant) {
      Pair<double> x[1] = {empty_sum<double>()};
      add_elements<Lanes, decltype(constant)::value>(x, kLowered, leaf.sources[k], i);
      add_exact<Lanes>(sum, leaf.weights[k], x[0]);
    });
  return quotient<Lanes>(sum, Divisor(leaf.divisor, leaf.divisor_rest)) * kRaised;
}

}  // namespace fastagg

// The arithmetic of `weighted_sum`: out = sum_k weight_k * x_k / divisor.
//
// The sum runs in float64, in client order, one rounding a product and one a sum: products of float32 values with
// counts are exact there. Two shortcuts spare the float64 unit where narrow codes would wait for it:
// - For a result of 16 bits, 16-bit clients are paired: the float32 sum of two clients' products joins the float64 sum.
// - Scaled integers of a group of clients are added up before they join the sum: as integers where weights and scales
//   allow (`integer_weights`), else in float64. Both are the same number.
#pragma once
#include "decode.h"

namespace fastagg {

/// Clients whose streams are read together: more would outrun a processor's prefetchers. Even, so that no group cuts a
/// pair.
constexpr int kGroup = 8;

/// Neighbouring clients of one code.
struct Group {
  const Source* sources;
  const double* weights;
  int clients;

  /// Elements that share their scales: the blocks of all clients are multiples of the smallest.
  FASTAGG_INLINE int smallest_block_shift() const {
    int shift = sources[0].block_shift;
    for (int k = 1; k < clients; ++k) shift = sources[k].block_shift < shift ? sources[k].block_shift : shift;
    return shift;
  }
};

/// The clients from `first` on that share its code, at most kGroup.
FASTAGG_INLINE Group group_from(const Leaf& leaf, int first) {
  int clients = 1;
  while (clients < kGroup && first + clients < leaf.clients &&
         leaf.sources[first + clients].code == leaf.sources[first].code)
    ++clients;
  return {leaf.sources + first, leaf.weights + first, clients};
}

/// sum + weight * x, the product rounded before the sum (contraction is off in every build).
template <class T>
FASTAGG_INLINE T add_product(T sum, T weight, T x) {
  return sum + weight * x;
}

/// The float32 sum of two clients' products.
template <class F>
FASTAGG_INLINE F sum_pair(F weight, F x, F other_weight, F other) {
  return weight * x + other_weight * other;
}

/// Whether narrow clients are summed in pairs: the result's own rounding is far coarser than a float32 sum's.
constexpr FASTAGG_INLINE bool pairs_fit(Code result) { return result == Code::float16 || result == Code::bfloat16; }

/// The products of weights and scales of a group, for one block, as multiples of a power of two: 15 bits each, so that
/// a group's sum of products with int8 fits 32 bits.
struct IntegerWeights {
  int16_t values[kGroup];
  double unit;
  bool exact;  // the multiples are the products themselves
};

template <Code code>
FASTAGG_INLINE IntegerWeights integer_weights(const Group& group, int64_t i) {
  double products[kGroup], largest = 0;
  for (int k = 0; k < group.clients; ++k) {
    products[k] = group.weights[k] * static_cast<double>(scale_at<code>(group.sources[k], i));
    largest = products[k] > largest ? products[k] : largest;
  }
  const int64_t exponent = bit_cast<int64_t>(largest) >> 52;  // biased; weights and scales are positive
  if (exponent < 64 || exponent > 1983) return {{}, 0, false};
  IntegerWeights result{{}, bit_cast<double>((exponent - 14) << 52), true};
  const double inverse = bit_cast<double>((2046 + 14 - exponent) << 52);
  for (int k = 0; k < group.clients; ++k) {
    const double multiple = products[k] * inverse;  // below 2^15, unless NaN
    result.exact &= multiple >= 0 && multiple == (multiple + 0x1p52) - 0x1p52;
    result.values[k] = multiple >= 0 ? static_cast<int16_t>(multiple) : int16_t{0};
  }
  return result;
}

/// A double as the float32 whose further rounding to a narrower float equals one rounding: truncated, its last bit set
/// if anything was cut off ("round to odd").
template <class D, class L>
FASTAGG_INLINE D round_to_odd(D x) {
  constexpr int64_t tail = 0x1fffffff;
  const L bits = bit_cast<L>(x);
  const L sticky = (bits & tail) != 0 ? L{} + (tail + 1) : L{};
  return bit_cast<D>((bits & ~tail) | sticky);
}

/// The same for bfloat16, whose subnormals pass through float32's: those have a grid of their own to be odd on.
template <class D, class L>
FASTAGG_INLINE D round_to_odd_for_bfloat16(D x) {
  const D magnitude = bit_cast<D>(bit_cast<L>(x) & INT64_MAX);
  const D on_grid = magnitude + 0x1p-97;  // its last bit is 2^-149, the unit of float32's subnormals
  const D nearest = on_grid - 0x1p-97;
  const L even = (bit_cast<L>(on_grid) & 1) == 0 ? L{} + 1 : L{};
  const L step = nearest > magnitude ? -even : even;
  const D odd = bit_cast<D>(bit_cast<L>(on_grid) + step) - 0x1p-97;
  const L subnormal = bit_cast<L>(nearest == magnitude ? magnitude : odd) | (bit_cast<L>(x) & INT64_MIN);
  return magnitude < 0x1p-126 ? bit_cast<D>(subnormal) : round_to_odd<D, L>(x);
}

/// A double that will be rounded to `code` by way of float32, rounded to odd.
template <Code code, class D, class L>
FASTAGG_INLINE D round_to_odd_for(D x) {
  if constexpr (code == Code::bfloat16) return round_to_odd_for_bfloat16<D, L>(x);
  return round_to_odd<D, L>(x);
}

/// Zero if x is finite, else NaN.
template <class D>
FASTAGG_INLINE D finite_check(D x) {
  return x * 0.0;
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
/// integers.
struct Result {
  FASTAGG_INLINE Result(const Leaf& leaf, void* out, void* companion)
      : out(out), companion(companion), divisor(leaf.divisor), scale(1.0 / leaf.divisor), dither(leaf.dither) {}

  void* out;
  void* companion;
  double divisor, scale;
  uint16_t dither;
};

/// Stores means as a result's floating code from index i on.
template <class Lanes, Code code, bool stream>
FASTAGG_INLINE void store_scaled(const Result& result, int64_t i, typename Lanes::D (&x)[Lanes::halves]) {
  using F = typename Lanes::F;
  using I = typename Lanes::I;
  using L = typename Lanes::L;
  if constexpr (code == Code::float64) Lanes::template store_float64<stream>(result.out, i, x);
  if constexpr (code == Code::state48) Lanes::store_state48(result.out, result.companion, i, x, result.dither);
  if constexpr (code == Code::float32) Lanes::template store_float32<stream>(result.out, i, Lanes::narrow(x));
  if constexpr (is_narrow_float(code)) {
    for (auto& half : x) half = round_to_odd_for<code, typename Lanes::D, L>(half);
    const F mean = Lanes::narrow(x);
    if constexpr (code == Code::float16) {
      Lanes::template store_float16<stream>(result.out, i, mean);
    } else {
      Lanes::template store_uint16<stream>(result.out, i, encode_bfloat16<Rounding::nearest, F, I>(mean, I{}));
    }
  }
}

/// Divides sums and stores the means as a result's code from index i on.
template <class Lanes, Code code, bool stream>
FASTAGG_INLINE void store_mean(const Result& result, int64_t i, typename Lanes::D (&x)[Lanes::halves]) {
  if constexpr (is_integer(code)) {  // a quotient that is a tie must stay one
    static_cast<Element<code>*>(result.out)[i] = to_integer<Element<code>>(x[0] / result.divisor);
  } else {
    for (auto& half : x) half = half * result.scale;
    store_scaled<Lanes, code, stream>(result, i, x);
  }
}

}  // namespace fastagg

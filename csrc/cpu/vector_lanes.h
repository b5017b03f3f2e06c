// SIMD lanes from the compiler's vector types: what all instruction sets have in common. Each one names its conversions
// in lanes_<isa>.h (compilers split a generic conversion into pieces). Include only inside a target region.
#pragma once
#include "core/lane.h"
#include "unaligned.h"

namespace fastagg {

/// T as a vector of `bytes` bytes.
template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T, int bytes>
using Vector = typename VectorOf<T, bytes>::type;

/// `count` lanes. `Isa` gives the conversions between element sizes, and the stores:
///   extend_uint8, extend_int8, extend_uint16   `count` small integers in memory to I
///   extend_int8_to_16, add_products, widen_sums   for IntegerProducts
///   widen_interleaved                          two F, the first the even elements, to four D in their order
///   low, high, join                            the halves of an F
///   widen, narrow                              half an F to D, and back
///   multiply_add                               x * y + sum of D, rounded once
///   half_to_float                              `count` float16 in memory to F
///   any                                        whether a lane of an I is not zero
///   square_root, minimum, maximum              of an F and of a D
///   signs                                      the sign bits of an F, the first element's in bit 0
///   store<stream>, store_float16<stream>, store_uint16<stream>, store_uint8
///   load_planes, store_planes<stream>          the 32 and 16 upper bits of `count` int64
template <int count, class Isa>
struct VectorLanes {
  static constexpr int width = count, halves = 2, half = count / 2;
  using F = Vector<float, 4 * count>;
  using I = Vector<int32_t, 4 * count>;
  using D = Vector<double, 4 * count>;
  using L = Vector<int64_t, 4 * count>;
  using HalfF = Vector<float, 2 * count>;

  static FASTAGG_INLINE F load_float32(const void* data, int64_t i) { return load_bytes<F>(at<float>(data, i)); }
  static FASTAGG_INLINE F load_float16(const void* data, int64_t i) {
    return Isa::half_to_float(at<uint16_t>(data, i));
  }
  static FASTAGG_INLINE F load_bfloat16(const void* data, int64_t i) {
    return decode_bfloat16<F, I>(load_uint16(data, i));
  }
  static FASTAGG_INLINE I load_uint16(const void* data, int64_t i) { return Isa::extend_uint16(at<uint16_t>(data, i)); }
  static FASTAGG_INLINE I load_uint8(const void* data, int64_t i) { return Isa::extend_uint8(at<uint8_t>(data, i)); }
  static FASTAGG_INLINE I load_int8(const void* data, int64_t i) { return Isa::extend_int8(at<int8_t>(data, i)); }
  static FASTAGG_INLINE I load_int4(const void* data, int64_t i) {
    uint64_t packed = 0;
    memcpy(&packed, at<uint8_t>(data, i >> 1), count / 2);
    const I lane = indices();
    const I word = lane < 8 ? I{} + static_cast<int32_t>(packed) : I{} + static_cast<int32_t>(packed >> 32);
    return word << (28 - 4 * (lane & 7)) >> 28;
  }
  static FASTAGG_INLINE I load_sign(const void* data, int64_t i) {
    uint32_t packed = 0;
    memcpy(&packed, at<uint8_t>(data, i >> 3), count < 8 ? 1 : count / 8);
    packed >>= i & 7;
    return (I{} + static_cast<int32_t>(packed)) << (31 - indices()) & INT32_MIN;
  }
  template <class T>
  static FASTAGG_INLINE void load_wide(const void* data, int64_t i, D (&x)[halves]) {
    for (int h = 0; h < halves; ++h) {
      const T* elements = at<T>(data, i + h * half);
      if constexpr (std::is_same_v<T, double>) {
        x[h] = load_bytes<D>(elements);
      } else if constexpr (std::is_same_v<T, float>) {
        x[h] = Isa::widen(load_bytes<HalfF>(elements));
      } else {
        x[h] = __builtin_convertvector((load_bytes<Vector<T, sizeof(T) * half>>(elements)), D);
      }
    }
  }
  static FASTAGG_INLINE void load_state48(const void* high, const void* low, int64_t i, D (&x)[halves]) {
    L codes[halves];
    Isa::load_planes(at<uint32_t>(high, i), at<uint16_t>(low, i), codes);
    for (int h = 0; h < halves; ++h) x[h] = decode_state48<D, L>(codes[h]);
  }

  /// Whether any lane of a comparison is true.
  template <class V>  // of any type: what comparisons give is a compiler's own choice
  static FASTAGG_INLINE bool any(V lanes) {
    return Isa::any(bit_cast<I>(lanes));
  }
  static FASTAGG_INLINE uint32_t signs(F x) { return Isa::signs(x); }
  static FASTAGG_INLINE F square_root(F x) { return Isa::square_root(x); }
  static FASTAGG_INLINE D square_root(D x) { return Isa::square_root(x); }
  /// The smaller and the larger of two values, the second of two zeros.
  template <class V>
  static FASTAGG_INLINE V minimum(V x, V y) {
    return Isa::minimum(x, y);
  }
  template <class V>
  static FASTAGG_INLINE V maximum(V x, V y) {
    return Isa::maximum(x, y);
  }
  static FASTAGG_INLINE F convert(I x) { return __builtin_convertvector(x, F); }
  static FASTAGG_INLINE D multiply_add(D x, D y, D sum) { return Isa::multiply_add(x, y, sum); }
  static FASTAGG_INLINE D add_exact_product(D sum, D weight, D x) { return Isa::multiply_add(weight, x, sum); }
  static FASTAGG_INLINE void widen(F x, D (&wide)[halves]) {
    wide[0] = Isa::widen(Isa::low(x));
    wide[1] = Isa::widen(Isa::high(x));
  }
  static FASTAGG_INLINE F narrow(const D (&wide)[halves]) {
    return Isa::join(Isa::narrow(wide[0]), Isa::narrow(wide[1]));
  }

  /// Sums of clients' 16-bit floats times weights, in float32, for two vectors' elements.
  template <Code code>
  struct FloatProducts {
    static constexpr int width = 2 * count;
    F sums[2] = {-F{}, -F{}};

    FASTAGG_INLINE void add(const void* data, float weight, int64_t i) {
      if constexpr (code == Code::float16) {
        for (int r = 0; r < 2; ++r) sums[r] = sums[r] + weight * load_float16(data, i + r * count);
      } else {  // two neighbours lie in one lane
        const I pairs = load_bytes<I>(at<uint16_t>(data, i));
        sums[0] = sums[0] + weight * bit_cast<F>(pairs << 16);
        sums[1] = sums[1] + weight * bit_cast<F>(pairs & INT32_C(-0x10000));
      }
    }
    FASTAGG_INLINE void widen(D (&x)[2][halves]) const {
      if constexpr (code == Code::float16) {
        for (int r = 0; r < 2; ++r) VectorLanes::widen(sums[r], x[r]);
      } else {
        Isa::widen_interleaved(sums[0], sums[1], x);
      }
    }
  };

  /// Sums of two clients' integers times their 15-bit weights, which share a word, for two vectors' elements.
  struct IntegerProducts {
    static constexpr int width = 2 * count;
    I sums[2] = {};  // in an order of the instruction set's own

    template <Code code>
    FASTAGG_INLINE void add(const void* one, const void* other, int32_t weights, int64_t i) {
      Isa::add_products(sums, (typename Isa::Words)load_words<code>(one, i),
                        (typename Isa::Words)load_words<code>(other, i), weights);
    }
    FASTAGG_INLINE void widen(D (&x)[2][halves]) const { Isa::widen_sums(sums, x); }
  };

  template <bool stream>
  static FASTAGG_INLINE void store_float32(void* out, int64_t i, F x) {
    Isa::template store<stream>(at<float>(out, i), x);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float64(void* out, int64_t i, const D (&x)[halves]) {
    for (int h = 0; h < halves; ++h) Isa::template store<stream>(at<double>(out, i + h * half), x[h]);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, int64_t i, F x) {
    Isa::template store_float16<stream>(at<uint16_t>(out, i), x);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, int64_t i, I code) {
    Isa::template store_uint16<stream>(at<uint16_t>(out, i), code);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint8(void* out, int64_t i, I code) {
    Isa::store_uint8(at<uint8_t>(out, i), code);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_state48(void* high, void* low, int64_t i, const D (&x)[halves], uint16_t dither) {
    const L codes[halves] = {encode_state48<D, L>(x[0], dither), encode_state48<D, L>(x[1], dither)};
    Isa::template store_planes<stream>(at<uint32_t>(high, i), at<uint16_t>(low, i), codes);
  }

 private:
  using Words = Vector<int16_t, 4 * count>;

  template <Code code>
  static FASTAGG_INLINE Words load_words(const void* data, int64_t i) {
    if constexpr (code == Code::wire_int8) return bit_cast<Words>(Isa::extend_int8_to_16(at<int8_t>(data, i)));
    const I bytes = load_uint8(data, i / 2);  // each becomes the two words of its lane
    return bit_cast<Words>((bytes << 28 >> 28 & 0xffff) | (bytes << 24 >> 28 << 16));
  }
  template <class T>
  static FASTAGG_INLINE const T* at(const void* data, int64_t i) {
    return static_cast<const T*>(data) + i;
  }
  template <class T>
  static FASTAGG_INLINE T* at(void* data, int64_t i) {
    return static_cast<T*>(data) + i;
  }
  /// Lane numbers 0, 1, 2, ...
  static FASTAGG_INLINE I indices() {
    I lane{};
    for (int i = 0; i < count; ++i) lane[i] = i;
    return lane;
  }
};

}  // namespace fastagg

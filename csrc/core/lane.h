// The lane of width one: what CUDA threads, the scalar backend and every loop's tail compute with. The SIMD lanes in
// csrc/cpu/ offer the same names for more elements at once.
#pragma once
#include <math.h>

#include "convert.h"
#include "state48.h"

namespace fastagg {

struct Lane {
  static constexpr int width = 1;   // elements in F and I
  static constexpr int halves = 1;  // Ds that hold as many elements as an F
  using F = float;
  using I = int32_t;
  using D = double;
  using L = int64_t;

  // Loads of the element(s) from index i on. Codes narrower than 32 bits are widened to I.
  static FASTAGG_INLINE F load_float32(const void* data, int64_t i) { return static_cast<const float*>(data)[i]; }
  static FASTAGG_INLINE F load_float16(const void* data, int64_t i) {
    return decode_float<Float16, F, I>(load_uint16(data, i));
  }
  static FASTAGG_INLINE F load_bfloat16(const void* data, int64_t i) {
    return decode_bfloat16<F, I>(load_uint16(data, i));
  }
  static FASTAGG_INLINE I load_uint16(const void* data, int64_t i) { return static_cast<const uint16_t*>(data)[i]; }
  static FASTAGG_INLINE I load_uint8(const void* data, int64_t i) { return static_cast<const uint8_t*>(data)[i]; }
  static FASTAGG_INLINE I load_int8(const void* data, int64_t i) { return static_cast<const int8_t*>(data)[i]; }
  static FASTAGG_INLINE I load_int4(const void* data, int64_t i) {
    const int byte = static_cast<const uint8_t*>(data)[i / 2];
    return static_cast<I>(static_cast<uint32_t>(byte) << (i % 2 ? 24 : 28)) >> 28;
  }
  /// The sign in bit 31, the other bits zero.
  static FASTAGG_INLINE I load_sign(const void* data, int64_t i) {
    const uint32_t byte = static_cast<const uint8_t*>(data)[i / 8];
    return static_cast<I>(byte << (31 - i % 8) & 0x80000000u);
  }
  template <class T>
  static FASTAGG_INLINE void load_wide(const void* data, int64_t i, D (&x)[halves]) {
    x[0] = static_cast<double>(static_cast<const T*>(data)[i]);
  }
  static FASTAGG_INLINE void load_state48(const void* high, const void* low, int64_t i, D (&x)[halves]) {
    const uint64_t code =
        uint64_t{static_cast<const uint32_t*>(high)[i]} << 32 | uint64_t{static_cast<const uint16_t*>(low)[i]} << 16;
    x[0] = decode_state48<D, L>(static_cast<L>(code));
  }

  static FASTAGG_INLINE bool any(bool lane) { return lane; }
  /// The sign bits, the first element's in bit 0.
  static FASTAGG_INLINE uint32_t signs(F x) { return bit_cast<uint32_t>(x) >> 31; }
  static FASTAGG_INLINE F square_root(F x) { return ::sqrtf(x); }
  static FASTAGG_INLINE D square_root(D x) { return ::sqrt(x); }
  /// The smaller and the larger of two values, the second of two zeros.
  template <class V>
  static FASTAGG_INLINE V minimum(V x, V y) {
    return x < y ? x : y;
  }
  template <class V>
  static FASTAGG_INLINE V maximum(V x, V y) {
    return x > y ? x : y;
  }
  static FASTAGG_INLINE F convert(I x) { return static_cast<float>(x); }
  /// x * y + sum, rounded once.
  static FASTAGG_INLINE D multiply_add(D x, D y, D sum) { return ::fma(x, y, sum); }
  /// sum + weight * x, whose product needs no rounding: however it is computed.
  static FASTAGG_INLINE D add_exact_product(D sum, D weight, D x) { return sum + weight * x; }
  static FASTAGG_INLINE void widen(F x, D (&wide)[halves]) { wide[0] = x; }
  static FASTAGG_INLINE F narrow(const D (&wide)[halves]) { return static_cast<float>(wide[0]); }

  /// Sums of clients' 16-bit floats times weights, in float32.
  template <Code code>
  struct FloatProducts {
    static constexpr int width = 1;
    F sum = -0.0f;

    FASTAGG_INLINE void add(const void* data, float weight, int64_t i) {
      sum = sum + weight * (code == Code::float16 ? load_float16(data, i) : load_bfloat16(data, i));
    }
    FASTAGG_INLINE void widen(D (&x)[1][halves]) const { x[0][0] = sum; }
  };

  /// Sums of two clients' integers times 15-bit weights, which share a word.
  struct IntegerProducts {
    static constexpr int width = 1;
    I sum = 0;

    template <Code code>
    FASTAGG_INLINE void add(const void* one, const void* other, I weights, int64_t i) {
      sum += (weights & 0xffff) * load_integer<code>(one, i) + (weights >> 16) * load_integer<code>(other, i);
    }
    FASTAGG_INLINE void widen(D (&x)[1][halves]) const { x[0][0] = sum; }
  };
  template <Code code>
  static FASTAGG_INLINE I load_integer(const void* data, int64_t i) {
    return code == Code::wire_int4 ? load_int4(data, i) : load_int8(data, i);
  }

  // Stores; `stream` asks for a store that leaves the cache alone.
  template <bool stream>
  static FASTAGG_INLINE void store_float32(void* out, int64_t i, F x) {
    static_cast<float*>(out)[i] = x;
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float64(void* out, int64_t i, const D (&x)[halves]) {
    static_cast<double*>(out)[i] = x[0];
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, int64_t i, F x) {
    store_uint16<stream>(out, i, encode_float<Float16, Rounding::nearest, F, I>(x, 0));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, int64_t i, I code) {
    static_cast<uint16_t*>(out)[i] = static_cast<uint16_t>(code);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint8(void* out, int64_t i, I code) {
    static_cast<uint8_t*>(out)[i] = static_cast<uint8_t>(code);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_state48(void* high, void* low, int64_t i, const D (&x)[halves], uint16_t dither) {
    const uint64_t code = static_cast<uint64_t>(encode_state48<D, L>(x[0], dither));
    static_cast<uint32_t*>(high)[i] = static_cast<uint32_t>(code >> 32);
    static_cast<uint16_t*>(low)[i] = static_cast<uint16_t>(code >> 16);
  }
};

}  // namespace fastagg

// NEON on aarch64: four lanes. It has no streaming stores worth the name; `stream` stores as usual.
#pragma once
#include "vector_lanes.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

struct Neon {
  using F = Vector<float, 16>;
  using I = Vector<int32_t, 16>;
  using D = Vector<double, 16>;
  using Words = int16x8_t;
  using L = Vector<int64_t, 16>;
  using HalfF = Vector<float, 8>;

  static FASTAGG_INLINE I extend_uint8(const void* data) { return extend<I, uint8_t, 4>(data); }
  static FASTAGG_INLINE I extend_int8(const void* data) { return extend<I, int8_t, 4>(data); }
  static FASTAGG_INLINE I extend_uint16(const void* data) { return extend<I, uint16_t, 4>(data); }
  static FASTAGG_INLINE int16x8_t extend_int8_to_16(const void* data) { return vmovl_s8(load_bytes<int8x8_t>(data)); }
  static FASTAGG_INLINE void add_products(I (&sums)[2], int16x8_t x, int16x8_t y, int32_t pair) {
    const auto weight = static_cast<int16_t>(pair), other_weight = static_cast<int16_t>(pair >> 16);
    sums[0] += (I)vmlal_n_s16(vmull_n_s16(vget_low_s16(x), weight), vget_low_s16(y), other_weight);
    sums[1] += (I)vmlal_n_s16(vmull_n_s16(vget_high_s16(x), weight), vget_high_s16(y), other_weight);
  }
  static FASTAGG_INLINE void widen_sums(const I (&sums)[2], D (&x)[2][2]) {
    for (int r = 0; r < 2; ++r) {
      x[r][0] = (D)vcvtq_f64_s64(vmovl_s32(vget_low_s32((int32x4_t)sums[r])));
      x[r][1] = (D)vcvtq_f64_s64(vmovl_s32(vget_high_s32((int32x4_t)sums[r])));
    }
  }
  static FASTAGG_INLINE HalfF low(F x) { return bit_cast<HalfF>(vget_low_f32(bit_cast<float32x4_t>(x))); }
  static FASTAGG_INLINE HalfF high(F x) { return bit_cast<HalfF>(vget_high_f32(bit_cast<float32x4_t>(x))); }
  static FASTAGG_INLINE F join(HalfF low, HalfF high) {
    return bit_cast<F>(vcombine_f32(bit_cast<float32x2_t>(low), bit_cast<float32x2_t>(high)));
  }
  static FASTAGG_INLINE D widen(HalfF x) { return bit_cast<D>(vcvt_f64_f32(bit_cast<float32x2_t>(x))); }
  static FASTAGG_INLINE void widen_interleaved(F even, F odd, D (&x)[2][2]) {
    const float32x4x2_t whole = vzipq_f32(bit_cast<float32x4_t>(even), bit_cast<float32x4_t>(odd));
    for (int r = 0; r < 2; ++r)
      x[r][0] = widen(low(bit_cast<F>(whole.val[r]))), x[r][1] = widen(high(bit_cast<F>(whole.val[r])));
  }
  static FASTAGG_INLINE D multiply_add(D x, D y, D sum) {
    return bit_cast<D>(vfmaq_f64(bit_cast<float64x2_t>(sum), bit_cast<float64x2_t>(x), bit_cast<float64x2_t>(y)));
  }
  static FASTAGG_INLINE HalfF narrow(D x) { return bit_cast<HalfF>(vcvt_f32_f64(bit_cast<float64x2_t>(x))); }
  static FASTAGG_INLINE F square_root(F x) { return bit_cast<F>(vsqrtq_f32(bit_cast<float32x4_t>(x))); }
  static FASTAGG_INLINE D square_root(D x) { return bit_cast<D>(vsqrtq_f64(bit_cast<float64x2_t>(x))); }
  // Its own minimum tells zeros apart, which others do not.
  template <class V>
  static FASTAGG_INLINE V minimum(V x, V y) {
    return x < y ? x : y;
  }
  template <class V>
  static FASTAGG_INLINE V maximum(V x, V y) {
    return x > y ? x : y;
  }
  static FASTAGG_INLINE uint32_t signs(F x) {
    constexpr int32x4_t places = {0, 1, 2, 3};
    return vaddvq_u32(vshlq_u32(vshrq_n_u32(bit_cast<uint32x4_t>(x), 31), places));
  }
  static FASTAGG_INLINE bool any(I lanes) { return vmaxvq_u32((uint32x4_t)lanes) != 0; }
  static FASTAGG_INLINE F half_to_float(const void* data) {
    return bit_cast<F>(vcvt_f32_f16(vreinterpret_f16_u16(load_bytes<uint16x4_t>(data))));
  }

  template <bool stream, class Vector16>
  static FASTAGG_INLINE void store(void* out, Vector16 x) {
    store_bytes(out, x);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, F x) {
    store<stream>(out, vreinterpret_u16_f16(vcvt_f16_f32(bit_cast<float32x4_t>(x))));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, I code) {
    store<false>(out, __builtin_convertvector(code, Vector<uint16_t, 8>));
  }
  static FASTAGG_INLINE void store_uint8(void* out, I code) {
    store<false>(out, __builtin_convertvector(code, Vector<uint8_t, 4>));
  }
  static FASTAGG_INLINE void load_planes(const void* high, const void* low, L (&codes)[2]) {
    for (int h = 0; h < 2; ++h) {
      const L upper = extend<L, uint32_t, 2>(static_cast<const uint32_t*>(high) + 2 * h);
      const L lower = extend<L, uint16_t, 2>(static_cast<const uint16_t*>(low) + 2 * h);
      codes[h] = upper << 32 | lower << 16;
    }
  }
  template <bool stream>
  static FASTAGG_INLINE void store_planes(void* high, void* low, const L (&codes)[2]) {
    for (int h = 0; h < 2; ++h) {
      const auto upper = __builtin_convertvector(codes[h] >> 32, Vector<int32_t, 8>);
      const auto lower = __builtin_convertvector(codes[h] >> 16, Vector<int16_t, 4>);
      store_bytes(static_cast<uint32_t*>(high) + 2 * h, upper);
      store_bytes(static_cast<uint16_t*>(low) + 2 * h, lower);
    }
  }

 private:
  template <class To, class T, int elements>
  static FASTAGG_INLINE To extend(const void* data) {
    return __builtin_convertvector((load_bytes<Vector<T, sizeof(T) * elements>>(data)), To);
  }
};

using Lanes = VectorLanes<4, Neon>;

}  // namespace
}  // namespace fastagg

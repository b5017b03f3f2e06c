// AVX-512 (F, BW, DQ, VL): sixteen lanes.
#pragma once
#include "vector_lanes.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

struct Avx512 {
  using F = __m512;
  using I = Vector<int32_t, 64>;
  using D = __m512d;
  using Words = __m512i;
  using L = Vector<int64_t, 64>;

  static FASTAGG_INLINE I extend_uint8(const void* data) { return (I)_mm512_cvtepu8_epi32(load_bytes<__m128i>(data)); }
  static FASTAGG_INLINE I extend_int8(const void* data) { return (I)_mm512_cvtepi8_epi32(load_bytes<__m128i>(data)); }
  static FASTAGG_INLINE I extend_uint16(const void* data) {
    return (I)_mm512_cvtepu16_epi32(load_bytes<__m256i>(data));
  }
  static FASTAGG_INLINE __m512i extend_int8_to_16(const void* data) {
    return _mm512_cvtepi8_epi16(load_bytes<__m256i>(data));
  }
  static FASTAGG_INLINE void add_products(I (&sums)[2], __m512i x, __m512i y, int32_t pair) {
    const __m512i weights = _mm512_set1_epi32(pair);
    sums[0] += (I)_mm512_madd_epi16(_mm512_unpacklo_epi16(x, y), weights);
    sums[1] += (I)_mm512_madd_epi16(_mm512_unpackhi_epi16(x, y), weights);
  }
  static FASTAGG_INLINE void widen_sums(const I (&sums)[2], D (&x)[2][2]) {
    // Unpacking left each sum with every other four elements.
    const __m512i order[2] = {_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                              _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)};
    for (int r = 0; r < 2; ++r) {
      const __m512i elements = _mm512_permutex2var_epi64((__m512i)sums[0], order[r], (__m512i)sums[1]);
      x[r][0] = _mm512_cvtepi32_pd(_mm512_castsi512_si256(elements));
      x[r][1] = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(elements, 1));
    }
  }
  static FASTAGG_INLINE __m256 low(F x) { return _mm512_castps512_ps256(x); }
  static FASTAGG_INLINE __m256 high(F x) { return _mm512_extractf32x8_ps(x, 1); }
  static FASTAGG_INLINE F join(__m256 low, __m256 high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  static FASTAGG_INLINE D widen(__m256 x) { return _mm512_cvtps_pd(x); }
  static FASTAGG_INLINE void widen_interleaved(F even, F odd, D (&x)[2][2]) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(8));
    const F whole[2] = {_mm512_permutex2var_ps(even, first, odd), _mm512_permutex2var_ps(even, second, odd)};
    for (int r = 0; r < 2; ++r) x[r][0] = widen(low(whole[r])), x[r][1] = widen(high(whole[r]));
  }
  static FASTAGG_INLINE D multiply_add(D x, D y, D sum) { return _mm512_fmadd_pd(x, y, sum); }
  static FASTAGG_INLINE __m256 narrow(D x) { return _mm512_cvtpd_ps(x); }
  static FASTAGG_INLINE F square_root(F x) { return _mm512_sqrt_ps(x); }
  static FASTAGG_INLINE D square_root(D x) { return _mm512_sqrt_pd(x); }
  static FASTAGG_INLINE F minimum(F x, F y) { return _mm512_min_ps(x, y); }
  static FASTAGG_INLINE F maximum(F x, F y) { return _mm512_max_ps(x, y); }
  static FASTAGG_INLINE D minimum(D x, D y) { return _mm512_min_pd(x, y); }
  static FASTAGG_INLINE D maximum(D x, D y) { return _mm512_max_pd(x, y); }
  static FASTAGG_INLINE uint32_t signs(F x) {
    return _mm512_cmplt_epi32_mask(bit_cast<__m512i>(x), _mm512_setzero_si512());
  }
  static FASTAGG_INLINE bool any(I lanes) { return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0; }
  static FASTAGG_INLINE F half_to_float(const void* data) { return _mm512_cvtph_ps(load_bytes<__m256i>(data)); }

  template <bool stream, class Vector64>
  static FASTAGG_INLINE void store(void* out, Vector64 x) {
    if constexpr (stream) {
      _mm512_stream_si512(static_cast<__m512i*>(out), bit_cast<__m512i>(x));
    } else {
      store_bytes(out, x);
    }
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, F x) {
    store_32_bytes<stream>(out, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, I code) {
    store_32_bytes<stream>(out, _mm512_cvtepi32_epi16((__m512i)code));
  }
  static FASTAGG_INLINE void store_uint8(void* out, I code) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm512_cvtepi32_epi8((__m512i)code));
  }
  static FASTAGG_INLINE void load_planes(const void* high, const void* low, L (&codes)[2]) {
    for (int h = 0; h < 2; ++h) {
      const auto upper = load_bytes<__m256i>(static_cast<const uint32_t*>(high) + 8 * h);
      const auto lower = load_bytes<__m128i>(static_cast<const uint16_t*>(low) + 8 * h);
      codes[h] = (L)_mm512_cvtepu32_epi64(upper) << 32 | (L)_mm512_cvtepu16_epi64(lower) << 16;
    }
  }
  template <bool stream>
  static FASTAGG_INLINE void store_planes(void* high, void* low, const L (&codes)[2]) {
    const auto upper = [&](int h) { return _mm512_cvtepi64_epi32((__m512i)(codes[h] >> 32)); };
    const auto lower = [&](int h) { return _mm512_cvtepi64_epi16((__m512i)(codes[h] >> 16)); };
    store<stream>(high, _mm512_inserti64x4(_mm512_castsi256_si512(upper(0)), upper(1), 1));
    store_32_bytes<stream>(low, _mm256_set_m128i(lower(1), lower(0)));
  }

 private:
  template <bool stream>
  static FASTAGG_INLINE void store_32_bytes(void* out, __m256i x) {
    if constexpr (stream) {
      _mm256_stream_si256(static_cast<__m256i*>(out), x);
    } else {
      store_bytes(out, x);
    }
  }
};

using Lanes = VectorLanes<16, Avx512>;

}  // namespace
}  // namespace fastagg

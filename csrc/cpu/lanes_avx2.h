// AVX2, F16C and FMA: eight lanes.
#pragma once
#include "vector_lanes.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

struct Avx2 {
  using F = __m256;
  using I = Vector<int32_t, 32>;
  using D = __m256d;
  using Words = __m256i;
  using L = Vector<int64_t, 32>;

  static FASTAGG_INLINE I extend_uint8(const void* data) { return (I)_mm256_cvtepu8_epi32(_mm_loadu_si64(data)); }
  static FASTAGG_INLINE I extend_int8(const void* data) { return (I)_mm256_cvtepi8_epi32(_mm_loadu_si64(data)); }
  static FASTAGG_INLINE I extend_uint16(const void* data) {
    return (I)_mm256_cvtepu16_epi32(load_bytes<__m128i>(data));
  }
  static FASTAGG_INLINE __m256i extend_int8_to_16(const void* data) {
    return _mm256_cvtepi8_epi16(load_bytes<__m128i>(data));
  }
  static FASTAGG_INLINE void add_products(I (&sums)[2], __m256i x, __m256i y, int32_t pair) {
    const __m256i weights = _mm256_set1_epi32(pair);
    sums[0] += (I)_mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), weights);
    sums[1] += (I)_mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), weights);
  }
  static FASTAGG_INLINE void widen_sums(const I (&sums)[2], D (&x)[2][2]) {
    for (int h = 0; h < 2; ++h) {  // unpacking left each sum with every other four elements
      x[0][h] = _mm256_cvtepi32_pd(_mm256_castsi256_si128((__m256i)sums[h]));
      x[1][h] = _mm256_cvtepi32_pd(_mm256_extracti128_si256((__m256i)sums[h], 1));
    }
  }
  static FASTAGG_INLINE __m128 low(F x) { return _mm256_castps256_ps128(x); }
  static FASTAGG_INLINE __m128 high(F x) { return _mm256_extractf128_ps(x, 1); }
  static FASTAGG_INLINE F join(__m128 low, __m128 high) { return _mm256_set_m128(high, low); }
  static FASTAGG_INLINE D widen(__m128 x) { return _mm256_cvtps_pd(x); }
  static FASTAGG_INLINE void widen_interleaved(F even, F odd, D (&x)[2][2]) {
    const F first = _mm256_unpacklo_ps(even, odd), second = _mm256_unpackhi_ps(even, odd);  // within 128 bits
    x[0][0] = widen(low(first)), x[0][1] = widen(low(second));
    x[1][0] = widen(high(first)), x[1][1] = widen(high(second));
  }
  static FASTAGG_INLINE D multiply_add(D x, D y, D sum) { return _mm256_fmadd_pd(x, y, sum); }
  static FASTAGG_INLINE __m128 narrow(D x) { return _mm256_cvtpd_ps(x); }
  static FASTAGG_INLINE F square_root(F x) { return _mm256_sqrt_ps(x); }
  static FASTAGG_INLINE D square_root(D x) { return _mm256_sqrt_pd(x); }
  static FASTAGG_INLINE F minimum(F x, F y) { return _mm256_min_ps(x, y); }
  static FASTAGG_INLINE F maximum(F x, F y) { return _mm256_max_ps(x, y); }
  static FASTAGG_INLINE D minimum(D x, D y) { return _mm256_min_pd(x, y); }
  static FASTAGG_INLINE D maximum(D x, D y) { return _mm256_max_pd(x, y); }
  static FASTAGG_INLINE uint32_t signs(F x) { return static_cast<uint32_t>(_mm256_movemask_ps((__m256)x)); }
  static FASTAGG_INLINE bool any(I lanes) { return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes); }
  static FASTAGG_INLINE F half_to_float(const void* data) { return _mm256_cvtph_ps(load_bytes<__m128i>(data)); }

  template <bool stream, class Vector32>
  static FASTAGG_INLINE void store(void* out, Vector32 x) {
    if constexpr (stream) {
      _mm256_stream_si256(static_cast<__m256i*>(out), bit_cast<__m256i>(x));
    } else {
      store_bytes(out, x);
    }
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, F x) {
    store_16_bytes<stream>(out, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, I code) {
    const __m128i low = _mm256_castsi256_si128((__m256i)code), high = _mm256_extracti128_si256((__m256i)code, 1);
    store_16_bytes<stream>(out, _mm_packus_epi32(low, high));
  }
  static FASTAGG_INLINE void store_uint8(void* out, I code) {
    const __m128i low = _mm256_castsi256_si128((__m256i)code), high = _mm256_extracti128_si256((__m256i)code, 1);
    const __m128i byte = _mm_set1_epi32(0xff);
    const __m128i words = _mm_packus_epi32(_mm_and_si128(low, byte), _mm_and_si128(high, byte));
    _mm_storeu_si64(out, _mm_packus_epi16(words, words));
  }
  // 64-bit permutations undo what the unpacks and shuffles, which work in halves of 128 bits, do to the order.
  static FASTAGG_INLINE void load_planes(const void* high, const void* low, L (&codes)[2]) {
    const __m256i upper = _mm256_permute4x64_epi64(load_bytes<__m256i>(high), 0xd8);
    const __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bytes<__m128i>(low)), 16);
    const __m256i lower = _mm256_permute4x64_epi64(words, 0xd8);
    codes[0] = (L)_mm256_unpacklo_epi32(lower, upper);
    codes[1] = (L)_mm256_unpackhi_epi32(lower, upper);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_planes(void* high, void* low, const L (&codes)[2]) {
    const __m256 first = (__m256)codes[0], second = (__m256)codes[1];
    const __m256i upper = (__m256i)_mm256_shuffle_ps(first, second, 0xdd);
    const __m256i lower = (__m256i)_mm256_shuffle_ps(first, second, 0x88);
    store<stream>(high, _mm256_permute4x64_epi64(upper, 0xd8));
    store_uint16<stream>(low, (I)_mm256_srli_epi32(_mm256_permute4x64_epi64(lower, 0xd8), 16));
  }

 private:
  template <bool stream>
  static FASTAGG_INLINE void store_16_bytes(void* out, __m128i x) {
    if constexpr (stream) {
      _mm_stream_si128(static_cast<__m128i*>(out), x);
    } else {
      store_bytes(out, x);
    }
  }
};

using Lanes = VectorLanes<8, Avx2>;

}  // namespace
}  // namespace fastagg

// AVX-512 (F, BW, DQ, VL): sixteen lanes. The masked forms are chosen where GCC's plain ones read an undefined register.
#pragma once
#include "vector_lanes.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

struct Avx512 {
  using F = __m512;
  using I = Vector<int32_t, 64>;
  using D = __m512d;
  using L = Vector<int64_t, 64>;
  static constexpr __mmask8 all8 = 0xff;
  static constexpr __mmask16 all16 = 0xffff;

  static FASTAGG_INLINE I extend_uint8(const void* data) {
    return (I)_mm512_maskz_cvtepu8_epi32(all16, load_bytes<__m128i>(data));
  }
  static FASTAGG_INLINE I extend_int8(const void* data) {
    return (I)_mm512_maskz_cvtepi8_epi32(all16, load_bytes<__m128i>(data));
  }
  static FASTAGG_INLINE I extend_uint16(const void* data) {
    return (I)_mm512_maskz_cvtepu16_epi32(all16, load_bytes<__m256i>(data));
  }
  static FASTAGG_INLINE L extend_uint16_to_64(const void* data) {
    return (L)_mm512_maskz_cvtepu16_epi64(all8, load_bytes<__m128i>(data));
  }
  static FASTAGG_INLINE L extend_uint32_to_64(const void* data) {
    return (L)_mm512_maskz_cvtepu32_epi64(all8, load_bytes<__m256i>(data));
  }
  static FASTAGG_INLINE D widen(__m256 x) { return _mm512_maskz_cvtps_pd(all8, x); }
  static FASTAGG_INLINE __m256 narrow(D x) { return _mm512_maskz_cvtpd_ps(all8, x); }
  static FASTAGG_INLINE F half_to_float(const void* data) {
    return _mm512_maskz_cvtph_ps(all16, load_bytes<__m256i>(data));
  }

  template <bool stream, class Vector64>
  static FASTAGG_INLINE void store(void* out, Vector64 x) {
    if constexpr (stream) {
      _mm512_stream_si512(static_cast<__m512i*>(out), bit_cast<__m512i>(x));
    } else {
      memcpy(out, &x, sizeof x);
    }
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, F x) {
    store_32_bytes<stream>(out, _mm512_maskz_cvtps_ph(all16, x, _MM_FROUND_TO_NEAREST_INT));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, I code) {
    store_32_bytes<stream>(out, _mm512_maskz_cvtepi32_epi16(all16, (__m512i)code));
  }
  static FASTAGG_INLINE void store_uint8(void* out, I code) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm512_maskz_cvtepi32_epi8(all16, (__m512i)code));
  }
  static FASTAGG_INLINE void store_lower_32(void* out, L x) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm512_maskz_cvtepi64_epi32(all8, (__m512i)x));
  }
  static FASTAGG_INLINE void store_lower_16(void* out, L x) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm512_maskz_cvtepi64_epi16(all8, (__m512i)x));
  }

 private:
  template <bool stream>
  static FASTAGG_INLINE void store_32_bytes(void* out, __m256i x) {
    if constexpr (stream) {
      _mm256_stream_si256(static_cast<__m256i*>(out), x);
    } else {
      memcpy(out, &x, sizeof x);
    }
  }
};

using Lanes = VectorLanes<16, Avx512>;

}  // namespace
}  // namespace fastagg

// AVX-512 (F, BW, DQ, VL): sixteen lanes.
#pragma once
#include "vector_lanes.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

struct Lanes : VectorLanes<16> {
  static FASTAGG_INLINE F load_float16(const void* data, int64_t i) {
    return bit_cast<F>(_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(at<uint16_t>(data, i))));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float32(void* out, int64_t i, F x) {
    store_64_bytes<stream>(at<float>(out, i), bit_cast<__m512i>(x));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float64(void* out, int64_t i, const D (&x)[halves]) {
    store_64_bytes<stream>(at<double>(out, i), bit_cast<__m512i>(x[0]));
    store_64_bytes<stream>(at<double>(out, i + half), bit_cast<__m512i>(x[1]));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, int64_t i, F x) {
    store_32_bytes<stream>(at<uint16_t>(out, i), _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, int64_t i, I code) {
    store_32_bytes<stream>(at<uint16_t>(out, i), _mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(code)));
  }

 private:
  template <bool stream>
  static FASTAGG_INLINE void store_64_bytes(void* out, __m512i x) {
    if constexpr (stream) {
      _mm512_stream_si512(static_cast<__m512i*>(out), x);
    } else {
      memcpy(out, &x, sizeof x);
    }
  }
  template <bool stream>
  static FASTAGG_INLINE void store_32_bytes(void* out, __m256i x) {
    if constexpr (stream) {
      _mm256_stream_si256(static_cast<__m256i*>(out), x);
    } else {
      memcpy(out, &x, sizeof x);
    }
  }
};

}  // namespace
}  // namespace fastagg

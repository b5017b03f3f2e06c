// AVX2 and F16C: eight lanes.
#pragma once
#include "vector_lanes.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

struct Lanes : VectorLanes<8> {
  static FASTAGG_INLINE F load_float16(const void* data, int64_t i) {
    return bit_cast<F>(_mm256_cvtph_ps(load_bytes<__m128i>(at<uint16_t>(data, i))));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float32(void* out, int64_t i, F x) {
    store_32_bytes<stream>(at<float>(out, i), bit_cast<__m256i>(x));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float64(void* out, int64_t i, const D (&x)[halves]) {
    store_32_bytes<stream>(at<double>(out, i), bit_cast<__m256i>(x[0]));
    store_32_bytes<stream>(at<double>(out, i + half), bit_cast<__m256i>(x[1]));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, int64_t i, F x) {
    store_16_bytes<stream>(at<uint16_t>(out, i), _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, int64_t i, I code) {
    const __m256i codes = bit_cast<__m256i>(code);
    const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
    store_16_bytes<stream>(at<uint16_t>(out, i), _mm_packus_epi32(low, high));
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
  template <bool stream>
  static FASTAGG_INLINE void store_16_bytes(void* out, __m128i x) {
    if constexpr (stream) {
      _mm_stream_si128(static_cast<__m128i*>(out), x);
    } else {
      memcpy(out, &x, sizeof x);
    }
  }
};

}  // namespace
}  // namespace fastagg

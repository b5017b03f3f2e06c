// The lane of a CUDA thread: core/lane.h with the hardware's half-precision conversions, and without its conversions of
// integers to float64.
#pragma once
#include <cuda_fp16.h>

#include <type_traits>

#include "core/lane.h"

namespace fastagg::cuda {

/// An integer of 8 bits as float64. Conversions run at a quarter of the rate of additions, and so narrow elements would
/// wait for them: made unsigned, x is the low word of 2^52 + x, from which one subtraction leaves x.
template <class T>
FASTAGG_INLINE double widen_integer(T x) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 1, "wider elements are few enough for the conversions");
  constexpr uint32_t moved = std::is_signed_v<T> ? 128 : 0;
  const uint64_t low = static_cast<uint8_t>(x) ^ moved;
  return bit_cast<double>(uint64_t{0x43300000} << 32 | low) - (0x1p52 + moved);
}

struct ThreadLane : Lane {
  static FASTAGG_INLINE F load_float16(const void* data, int64_t i) {
    return __half2float(__ushort_as_half(static_cast<const uint16_t*>(data)[i]));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, int64_t i, F x) {
    static_cast<uint16_t*>(out)[i] = __half_as_ushort(__float2half_rn(x));
  }
  template <class T>
  static FASTAGG_INLINE void load_wide(const void* data, int64_t i, D (&x)[halves]) {
    if constexpr (sizeof(T) == 1) x[0] = widen_integer(static_cast<const T*>(data)[i]);
    else Lane::load_wide<T>(data, i, x);
  }
};

}  // namespace fastagg::cuda

// The lane of a CUDA thread: core/lane.h with the hardware's half-precision conversions.
#pragma once
#include <cuda_fp16.h>

#include "core/lane.h"

namespace fastagg::cuda {

struct ThreadLane : Lane {
  static FASTAGG_INLINE F load_float16(const void* data, int64_t i) {
    return __half2float(__ushort_as_half(static_cast<const uint16_t*>(data)[i]));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, int64_t i, F x) {
    static_cast<uint16_t*>(out)[i] = __half_as_ushort(__float2half_rn(x));
  }
};

}  // namespace fastagg::cuda

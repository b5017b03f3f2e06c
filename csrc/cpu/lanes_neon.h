// NEON on aarch64: four lanes. It has no streaming stores worth the name; `stream` stores as usual.
#pragma once
#include "vector_lanes.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

struct Lanes : VectorLanes<4> {
  static FASTAGG_INLINE F load_float16(const void* data, int64_t i) {
    return bit_cast<F>(vcvt_f32_f16(vreinterpret_f16_u16(load_bytes<uint16x4_t>(at<uint16_t>(data, i)))));
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float32(void* out, int64_t i, F x) {
    memcpy(at<float>(out, i), &x, sizeof x);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float64(void* out, int64_t i, const D (&x)[halves]) {
    memcpy(at<double>(out, i), &x, sizeof x);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_float16(void* out, int64_t i, F x) {
    const uint16x4_t codes = vreinterpret_u16_f16(vcvt_f16_f32(bit_cast<float32x4_t>(x)));
    memcpy(at<uint16_t>(out, i), &codes, sizeof codes);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_uint16(void* out, int64_t i, I code) {
    store_as<uint16_t>(out, i, code);
  }
};

}  // namespace
}  // namespace fastagg

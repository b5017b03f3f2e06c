// The elements of a floating array from one index on, in the arithmetic's own type.
#pragma once
#include "cast.h"

namespace fastagg {

/// Numbers of the elements from one index on: float64 in as many parts as the lanes hold them in, else float32.
template <class Lanes, Code code>
struct Numbers {
  static constexpr bool is_wide = code == Code::float64;
  static constexpr int parts = is_wide ? Lanes::halves : 1;
  using Scalar = std::conditional_t<is_wide, double, float>;
  using Part = std::conditional_t<is_wide, typename Lanes::D, typename Lanes::F>;
  Part values[parts];

  FASTAGG_INLINE void load(const void* data, int64_t i) {
    if constexpr (is_wide) Lanes::template load_wide<double>(data, i, values);
    else values[0] = fastagg::load<Lanes, code>(data, i);
  }

  template <bool stream>
  FASTAGG_INLINE void store(void* out, int64_t i) const {
    using F = typename Lanes::F;
    using I = typename Lanes::I;
    if constexpr (code == Code::float64) Lanes::template store_float64<stream>(out, i, values);
    if constexpr (code == Code::float32) Lanes::template store_float32<stream>(out, i, values[0]);
    if constexpr (code == Code::float16) Lanes::template store_float16<stream>(out, i, values[0]);
    if constexpr (code == Code::bfloat16)
      Lanes::template store_uint16<stream>(out, i, encode_bfloat16<Rounding::nearest, F, I>(values[0], I{}));
  }
};

}  // namespace fastagg

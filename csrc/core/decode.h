// From an element's code to a number, for every code: written once for all lanes.
#pragma once
#include "block.h"
#include "lane.h"

namespace fastagg {

/// Integers with a scale: clients' values are summed as integers where that is exact.
constexpr FASTAGG_INLINE bool is_scaled_integer(Code code) {
  return code == Code::wire_int8 || code == Code::wire_int4;
}

/// Floats of 16 bits.
constexpr FASTAGG_INLINE bool is_narrow_float(Code code) { return code == Code::float16 || code == Code::bfloat16; }

/// The elements from index i on as float32, before their block's scale.
template <class Lanes, Code code>
FASTAGG_INLINE typename Lanes::F load(const void* data, int64_t i) {
  using F = typename Lanes::F;
  using I = typename Lanes::I;
  if constexpr (code == Code::float32) return Lanes::load_float32(data, i);
  if constexpr (code == Code::float16) return Lanes::load_float16(data, i);
  if constexpr (code == Code::bfloat16) return Lanes::load_bfloat16(data, i);
  if constexpr (code == Code::wire_fp8_e4m3) return decode_float<Float8E4M3, F, I>(Lanes::load_uint8(data, i));
  if constexpr (code == Code::wire_fp8_e5m2) return decode_float<Float8E5M2, F, I>(Lanes::load_uint8(data, i));
  if constexpr (code == Code::wire_int8) return Lanes::convert(Lanes::load_int8(data, i));
  if constexpr (code == Code::wire_int4) return Lanes::convert(Lanes::load_int4(data, i));
  if constexpr (code == Code::wire_sign) return bit_cast<F>(Lanes::load_sign(data, i) | 0x3f800000);
}

/// The scale of the block that holds element i; 1 for codes without scales.
template <Code code>
FASTAGG_INLINE float scale_at(const Source& source, int64_t i) {
  if constexpr (has_scales(code)) return static_cast<const float*>(source.companion)[i >> source.block_shift];
  return 1.0f;
}

/// Whether a scale may multiply a weight in the place of codes: their products need no rounding, and none is infinite.
template <Code code>
FASTAGG_INLINE bool may_join_weight(float scale) {
  return code == Code::wire_sign ||
         ((bit_cast<int32_t>(scale) & 0x7fffff) == 0 && 0x1p-100f <= scale && scale <= 0x1p110f);
}

/// The elements from index i on, which are within one block, as what `dequantize` gives: float32, where codes times a
/// scale may be infinite.
template <class Lanes, Code code>
FASTAGG_INLINE typename Lanes::F load_scaled(const Source& source, int64_t i) {
  if constexpr (has_scales(code)) return load<Lanes, code>(source.data, i) * scale_at<code>(source, i);
  return load<Lanes, code>(source.data, i);
}

/// The same as doubles, and the codes that only doubles hold; of sums in pairs the first halves.
template <class Lanes, Code code>
FASTAGG_INLINE void load_wide(const Source& source, int64_t i, typename Lanes::D (&x)[Lanes::halves]) {
  const void* data = source.data;
  if constexpr (code == Code::float64 || code == Code::state128) return Lanes::template load_wide<double>(data, i, x);
  if constexpr (code == Code::float32) return Lanes::template load_wide<float>(data, i, x);
  if constexpr (code == Code::state48) return Lanes::load_state48(data, source.companion, i, x);
  if constexpr (is_integer(code)) return Lanes::template load_wide<Element<code>>(data, i, x);
  if constexpr (has_scales(code) || is_narrow_float(code)) Lanes::widen(load_scaled<Lanes, code>(source, i), x);
}

/// A code as a type, for `with_code`.
template <Code code>
struct Constant {
  static constexpr Code value = code;
};

template <class Function, size_t... codes>
FASTAGG_INLINE void with_code(Code code, Function&& function, std::index_sequence<codes...>) {
  ((static_cast<size_t>(code) == codes ? function(Constant<static_cast<Code>(codes)>{}) : void()), ...);
}

/// Calls `function` with the code as a compile-time constant.
template <class Function>
FASTAGG_INLINE void with_code(Code code, Function&& function) {
  with_code(code, function, std::make_index_sequence<kCodes>{});
}

}  // namespace fastagg

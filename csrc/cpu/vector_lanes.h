// SIMD lanes from the compiler's vector types: what all instruction sets have in common. Each one adds its half-precision
// conversions and streaming stores in lanes_<isa>.h. Include only inside a target region.
#pragma once
#include "core/lane.h"

namespace fastagg {

/// Each type as a vector of `bytes` bytes.
template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T, int bytes>
using Vector = typename VectorOf<T, bytes>::type;

template <class To>
FASTAGG_INLINE To load_bytes(const void* data) {
  To to;
  memcpy(&to, data, sizeof to);
  return to;
}

template <int count>
struct VectorLanes {
  static constexpr int width = count, halves = 2, half = count / 2;
  using F = Vector<float, 4 * count>;
  using I = Vector<int32_t, 4 * count>;
  using D = Vector<double, 4 * count>;
  using L = Vector<int64_t, 4 * count>;
  using HalfF = Vector<float, 2 * count>;

  template <class T>
  static FASTAGG_INLINE const T* at(const void* data, int64_t i) {
    return static_cast<const T*>(data) + i;
  }
  template <class T>
  static FASTAGG_INLINE T* at(void* data, int64_t i) {
    return static_cast<T*>(data) + i;
  }

  /// Lane numbers 0, 1, 2, ...
  static FASTAGG_INLINE I indices() {
    I lane{};
    for (int i = 0; i < count; ++i) lane[i] = i;
    return lane;
  }
  static FASTAGG_INLINE HalfF low(F x) {
    HalfF half_of_x;
    memcpy(&half_of_x, &x, sizeof half_of_x);
    return half_of_x;
  }
  static FASTAGG_INLINE HalfF high(F x) {
    HalfF half_of_x;
    memcpy(&half_of_x, reinterpret_cast<const char*>(&x) + sizeof half_of_x, sizeof half_of_x);
    return half_of_x;
  }

  static FASTAGG_INLINE F load_float32(const void* data, int64_t i) { return load_bytes<F>(at<float>(data, i)); }
  static FASTAGG_INLINE I load_uint16(const void* data, int64_t i) { return load_as<uint16_t, I>(data, i); }
  static FASTAGG_INLINE I load_uint8(const void* data, int64_t i) { return load_as<uint8_t, I>(data, i); }
  static FASTAGG_INLINE I load_int8(const void* data, int64_t i) { return load_as<int8_t, I>(data, i); }
  static FASTAGG_INLINE I load_int4(const void* data, int64_t i) {
    uint64_t packed = 0;
    memcpy(&packed, at<uint8_t>(data, i / 2), count / 2);
    const I lane = indices();
    const I word = lane < 8 ? I{} + static_cast<int32_t>(packed) : I{} + static_cast<int32_t>(packed >> 32);
    return word << (28 - 4 * (lane & 7)) >> 28;
  }
  static FASTAGG_INLINE I load_sign(const void* data, int64_t i) {
    uint32_t packed = 0;
    memcpy(&packed, at<uint8_t>(data, i / 8), count < 8 ? 1 : count / 8);
    packed >>= i % 8;
    return (I{} + static_cast<int32_t>(packed)) << (31 - indices()) & INT32_MIN;
  }
  template <class T>
  static FASTAGG_INLINE void load_wide(const void* data, int64_t i, D (&x)[halves]) {
    if constexpr (sizeof(T) == 8 && static_cast<T>(0.5) != 0) {
      x[0] = load_bytes<D>(at<double>(data, i));
      x[1] = load_bytes<D>(at<double>(data, i + half));
    } else {
      x[0] = load_as<T, D, half>(data, i);
      x[1] = load_as<T, D, half>(data, i + half);
    }
  }
  static FASTAGG_INLINE void load_state48(const void* high, const void* low, int64_t i, D (&x)[halves]) {
    for (int h = 0; h < halves; ++h) {
      const L upper = load_as<uint32_t, L, half>(high, i + h * half);
      const L lower = load_as<uint16_t, L, half>(low, i + h * half);
      x[h] = decode_state48<D, L>(upper << 32 | lower << 16);
    }
  }

  static FASTAGG_INLINE F convert(I x) { return __builtin_convertvector(x, F); }
  static FASTAGG_INLINE void widen(F x, D (&wide)[halves]) {
    wide[0] = __builtin_convertvector(low(x), D);
    wide[1] = __builtin_convertvector(high(x), D);
  }
  static FASTAGG_INLINE F narrow(const D (&wide)[halves]) {
    const HalfF parts[halves] = {__builtin_convertvector(wide[0], HalfF), __builtin_convertvector(wide[1], HalfF)};
    return load_bytes<F>(parts);
  }

  template <bool stream>
  static FASTAGG_INLINE void store_uint8(void* out, int64_t i, I code) {
    store_as<uint8_t>(out, i, code);
  }
  template <bool stream>
  static FASTAGG_INLINE void store_state48(void* high, void* low, int64_t i, const D (&x)[halves]) {
    for (int h = 0; h < halves; ++h) {
      const L code = encode_state48<D, L>(x[h]);
      const auto upper = __builtin_convertvector(code >> 32, Vector<int32_t, 2 * count>);
      const auto lower = __builtin_convertvector(code >> 16, Vector<int16_t, count>);
      memcpy(at<uint32_t>(high, i + h * half), &upper, sizeof upper);
      memcpy(at<uint16_t>(low, i + h * half), &lower, sizeof lower);
    }
  }

 protected:
  template <class T, class To, int elements = count>
  static FASTAGG_INLINE To load_as(const void* data, int64_t i) {
    return __builtin_convertvector((load_bytes<Vector<T, sizeof(T) * elements>>(at<T>(data, i))), To);
  }
  template <class T>
  static FASTAGG_INLINE void store_as(void* out, int64_t i, I code) {
    const auto narrow_code = __builtin_convertvector(code, Vector<T, sizeof(T) * count>);
    memcpy(at<T>(out, i), &narrow_code, sizeof narrow_code);
  }
};

}  // namespace fastagg

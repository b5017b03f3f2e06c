// Neighbouring elements in registers: loaded, decoded and stored together, in accesses of up to 16 bytes.
#pragma once
#include "core/decode.h"
#include "lane.cuh"

namespace fastagg::cuda {

template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Vector {
  T values[n];
};

/// The pointer, known to the compiler to be one to global memory: those read from tables could point anywhere, and cost
/// generic accesses.
template <class T>
FASTAGG_INLINE T* global(T* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

/// Elements of a code that share an array's entry.
constexpr FASTAGG_INLINE int elements_per_entry(Code code) {
  return code == Code::wire_int4 ? 2 : code == Code::wire_sign ? 8 : 1;
}

/// n neighbouring elements of a code; those of less than a byte are its lowest bits.
template <Code code, int n>
struct Elements {
  static constexpr int per_entry = elements_per_entry(code), count = n < per_entry ? 1 : n / per_entry;
  using Entries = Vector<Element<code>, count>;
  using Companion = Vector<CompanionElement<code>, is_state(code) ? n : 1>;
  Entries entries;
  Companion companion;
};

/// Elements [i, i + n) of a source that is aligned for vectors of n, i a multiple of n.
template <Code code, int n>
FASTAGG_INLINE Elements<code, n> load_elements(const Source& source, int64_t i) {
  using Whole = Elements<code, n>;
  Whole elements{};
  const auto* from = global(static_cast<const Element<code>*>(source.data)) + i / Whole::per_entry;
  elements.entries = *reinterpret_cast<const typename Whole::Entries*>(from);
  if constexpr (n < Whole::per_entry) elements.entries.values[0] >>= i % Whole::per_entry * (8 / Whole::per_entry);
  if constexpr (is_state(code))
    elements.companion = global(reinterpret_cast<const typename Whole::Companion*>(source.companion))[i / n];
  return elements;
}

/// The scale of the block that holds element i; 1 for codes without scales.
template <Code code>
FASTAGG_INLINE float load_scale(const Source& source, int64_t i) {
  if constexpr (has_scales(code)) return global(static_cast<const float*>(source.companion))[i >> source.block_shift];
  return 1.0f;
}

/// Stores elements [i, i + n) of a code of whole bytes.
template <Code code, int n>
FASTAGG_INLINE void store_elements(void* out, void* companion, int64_t i, const Elements<code, n>& elements) {
  using Whole = Elements<code, n>;
  global(reinterpret_cast<typename Whole::Entries*>(out))[i / n] = elements.entries;
  if constexpr (is_state(code))
    global(reinterpret_cast<typename Whole::Companion*>(companion))[i / n] = elements.companion;
}

/// Element j of those loaded, before its block's scale: as float32 or as float64.
template <class T, Code code, int n>
FASTAGG_INLINE T value_of(const Elements<code, n>& elements, int j) {
  if constexpr (std::is_same_v<T, float>) {
    return load<ThreadLane, code>(elements.entries.values, j);
  } else if constexpr (code == Code::wire_int8) {
    return widen_integer(static_cast<int8_t>(elements.entries.values[j]));
  } else if constexpr (code == Code::wire_int4) {
    return widen_integer(static_cast<int8_t>(ThreadLane::load_int4(elements.entries.values, j)));
  } else if constexpr (has_scales(code)) {
    return static_cast<double>(load<ThreadLane, code>(elements.entries.values, j));
  } else {
    double x[1];
    load_wide<ThreadLane, code>(Source{elements.entries.values, elements.companion.values, code, 0}, j, x);
    return x[0];
  }
}

}  // namespace fastagg::cuda

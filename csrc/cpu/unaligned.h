// Loads and stores of vectors at any address. A memcpy would do, but GCC copies it in halves through the stack.
#pragma once
#include "core/types.h"

namespace fastagg {

template <class T>
struct __attribute__((packed, may_alias)) Unaligned {
  T value;
};

template <class T>
FASTAGG_INLINE T load_bytes(const void* data) {
  return static_cast<const Unaligned<T>*>(data)->value;
}

template <class T>
FASTAGG_INLINE void store_bytes(void* out, T value) {
  static_cast<Unaligned<T>*>(out)->value = value;
}

}  // namespace fastagg

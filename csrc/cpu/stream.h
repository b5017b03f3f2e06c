// Streaming stores: where they may begin, and how they end.
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "core/types.h"

namespace fastagg {

/// Elements of `size` bytes until `out + i` starts a cache line, at most `count`.
FASTAGG_INLINE int64_t until_aligned(const void* out, int64_t i, int64_t size, int64_t count) {
  const int64_t past = static_cast<int64_t>((reinterpret_cast<uintptr_t>(out) + i * size) % 64);
  const int64_t elements = past == 0 ? 0 : (64 - past) / size;
  return elements < count ? elements : count;
}

/// Makes a thread's streaming stores visible before whatever it stores next.
FASTAGG_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace fastagg

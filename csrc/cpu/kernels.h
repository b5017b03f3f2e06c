// The table of loops, one of each for every instruction set.
#pragma once
#include "core/types.h"

namespace fastagg {

struct Kernels {
  const char* name;
  bool (*weighted_sum)(const Leaf& leaf, int64_t begin, int64_t end, bool stream);
  bool (*cast)(const Cast& cast, int64_t begin, int64_t end, bool stream);
  bool (*reduce)(const Reduction& reduction, int64_t begin, int64_t end, double* squares);
};

// Null where the build's architecture lacks them.
extern const Kernels* const scalar_kernels;
extern const Kernels* const avx2_kernels;
extern const Kernels* const avx512_kernels;
extern const Kernels* const neon_kernels;

}  // namespace fastagg

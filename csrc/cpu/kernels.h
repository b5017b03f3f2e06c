// The table of loops, one of each for every instruction set.
#pragma once
#include "core/types.h"

namespace fastagg {

struct Kernels {
  const char* name;
  bool (*weighted_sum)(const Leaf& leaf, int64_t begin, int64_t end, bool stream);
  bool (*cast)(const Cast& cast, int64_t begin, int64_t end, bool stream);
  bool (*reduce)(const Reduction& reduction, int64_t begin, int64_t end, double* squares);
  bool (*reduce_float64)(const double* const* sources, int32_t ranks, int64_t count, double divisor, double factor,
                         double* out, double* squares);
  void (*server_step)(const Optimizer& optimizer, const ModelLeaf& leaf, int64_t begin, int64_t end, bool stream);
  bool (*sorted_mean)(const SortedMean& op, const Leaf& leaf, int64_t begin, int64_t end, void* scratch, bool stream);
  bool (*squared_distances)(const Leaf& leaf, int64_t begin, int64_t end, double* scratch, double* sums);
  bool (*statistics)(const Leaf& leaf, const Measurement& measurement, int64_t begin, int64_t end, bool stream,
                     Moments* moments);
};

// Null where the build's architecture lacks them.
extern const Kernels* const scalar_kernels;
extern const Kernels* const avx2_kernels;
extern const Kernels* const avx512_kernels;
extern const Kernels* const neon_kernels;

}  // namespace fastagg

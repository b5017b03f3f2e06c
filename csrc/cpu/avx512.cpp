// The loops for AVX-512. Standard headers come before the target region: nothing of theirs may use the instruction set.
#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>

#if !defined(__clang__)
// GCC 12 takes the undefined register that its own intrinsics pass on for a mistake of ours (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "target_region.h"

FASTAGG_BEGIN_TARGET("avx2,f16c,fma,avx512f,avx512bw,avx512dq,avx512vl")
#include "cast.h"
#include "kernels.h"
#include "lanes_avx512.h"
#include "reduce.h"
#include "reduce_float64.h"
#include "server_step.h"
#include "sorted_mean.h"
#include "squared_distances.h"
#include "statistics.h"
#include "weighted_sum.h"

namespace fastagg {
namespace {
constexpr Kernels kernels{"avx512",
                          &weighted_sum<Lanes>,
                          &cast<Lanes>,
                          &reduce<Lanes>,
                          &reduce_float64<Lanes>,
                          &server_step<Lanes>,
                          &sorted_mean<Lanes>,
                          &squared_distances<Lanes>,
                          &statistics<Lanes>};
}  // namespace
const Kernels* const avx512_kernels = &kernels;
}  // namespace fastagg
FASTAGG_END_TARGET
#else
#include "kernels.h"

namespace fastagg {
const Kernels* const avx512_kernels = nullptr;
}  // namespace fastagg
#endif

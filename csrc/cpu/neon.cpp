// The loops for NEON, which every aarch64 processor has: no target region is needed.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "cast.h"
#include "lanes_neon.h"
#include "reduce.h"
#include "reduce_float64.h"
#include "server_step.h"
#include "sorted_mean.h"
#include "squared_distances.h"
#include "statistics.h"
#include "weighted_sum.h"

namespace fastagg {
namespace {
constexpr Kernels kernels{"neon",
                          &weighted_sum<Lanes>,
                          &cast<Lanes>,
                          &reduce<Lanes>,
                          &reduce_float64<Lanes>,
                          &server_step<Lanes>,
                          &sorted_mean<Lanes>,
                          &squared_distances<Lanes>,
                          &statistics<Lanes>};
}  // namespace
const Kernels* const neon_kernels = &kernels;
}  // namespace fastagg
#else
namespace fastagg {
const Kernels* const neon_kernels = nullptr;
}  // namespace fastagg
#endif

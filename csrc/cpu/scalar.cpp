// The loops for any processor: lanes of one.
#include "cast.h"
#include "kernels.h"
#include "reduce.h"
#include "reduce_float64.h"
#include "server_step.h"
#include "sorted_mean.h"
#include "squared_distances.h"
#include "statistics.h"
#include "weighted_sum.h"

namespace fastagg {
namespace {
struct Lanes : Lane {};
constexpr Kernels kernels{"scalar",
                          &weighted_sum<Lanes>,
                          &cast<Lanes>,
                          &reduce<Lanes>,
                          &reduce_float64<Lanes>,
                          &server_step<Lanes>,
                          &sorted_mean<Lanes>,
                          &squared_distances<Lanes>,
                          &statistics<Lanes>};
}  // namespace
const Kernels* const scalar_kernels = &kernels;
}  // namespace fastagg

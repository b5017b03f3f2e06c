// The loops for any processor: lanes of one.
#include "cast.h"
#include "kernels.h"
#include "reduce.h"
#include "weighted_sum.h"

namespace fastagg {
namespace {
struct Lanes : Lane {};
constexpr Kernels kernels{"scalar", &weighted_sum<Lanes>, &cast<Lanes>, &reduce<Lanes>};
}  // namespace
const Kernels* const scalar_kernels = &kernels;
}  // namespace fastagg

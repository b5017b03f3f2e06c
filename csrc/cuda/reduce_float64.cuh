// Adding up float64 arrays, which travel as they are: sum / divisor * factor, as csrc/cpu/operations.cpp does.
#pragma once
#include "core/weighted_sum.h"
#include "encode.cuh"

namespace fastagg::cuda {

/// What a thread has found in its results.
struct Found {
  int32_t largest = 0;  // infinity, once one was not finite
  double squares = 0;
};

/// Adds up the elements [begin, end) of arrays: `sources` as for SumWork.
template <class Sources>
__device__ inline void add_up_float64(const Sources& sources, double divisor, double factor, double* out, int64_t begin,
                                      int64_t end, Team team, Found& found) {
  for (int64_t i = begin + team.thread; i < end; i += team.threads) {
    double sum = -0.0;
    for (int rank = 0; rank < sources.ranks(); ++rank)
      sum = sum + global(static_cast<const double*>(sources[rank].data))[i];
    const double result = sum / divisor * factor;
    global(out)[i] = result;
    if (not_finite(result)) found.largest = kInfinity;
    found.squares += result * result;
  }
}

}  // namespace fastagg::cuda

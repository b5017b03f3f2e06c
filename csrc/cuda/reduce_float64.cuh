// Adding up float64 arrays, which travel as they are: sum * factor / divisor, as csrc/cpu/reduce_float64.h does.
#pragma once
#include "core/reduce.h"
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
  const Reduction64Of<ThreadLane> op(sources.ranks(), divisor, factor);
  for (int64_t i = begin + team.thread; i < end; i += team.threads) {
    double result[1];
    op.results([&](int rank, double (&x)[1]) { x[0] = global(static_cast<const double*>(sources[rank].data))[i]; },
               result);
    global(out)[i] = result[0];
    if (not_finite(result[0])) found.largest = kInfinity;
    found.squares += result[0] * result[0];
  }
}

}  // namespace fastagg::cuda

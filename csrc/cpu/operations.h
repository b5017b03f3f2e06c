// The operations on the CPU: each splits its elements into tasks, and lets the chosen loops do them on all threads.
#pragma once
#include "core/types.h"

namespace fastagg::cpu {

/// Every leaf's weighted sum or maximum. finite[leaf] tells whether all its sums are finite.
void weighted_sum(const Leaf* leaves, int64_t count, bool* finite);

/// One cast; true if nothing became infinite or NaN.
bool cast(const Cast& cast);

/// `reduce` of the elements [begin, end), `begin` a multiple of kChunk; true if the result is finite. Adds the result's
/// sum of squares to *squares, if there is one.
bool reduce(const Reduction& reduction, int64_t begin, int64_t end, double* squares);

}  // namespace fastagg::cpu

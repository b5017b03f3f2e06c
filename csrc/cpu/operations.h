// The operations on the CPU: each splits its elements into tasks, and lets the chosen loops do them on all threads.
#pragma once
#include "core/types.h"

namespace fastagg::cpu {

/// Every leaf's weighted sum or maximum. finite[leaf] tells whether all its sums are finite.
void weighted_sum(const Leaf* leaves, int64_t count, bool* finite);

/// One cast; true if nothing became infinite or NaN.
bool cast(const Cast& cast);

}  // namespace fastagg::cpu

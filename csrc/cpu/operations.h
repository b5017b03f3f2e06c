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

/// out = (sum_r sources[r]) / divisor * factor in float64, in the order of the ranks; true if it is finite. Adds its
/// sum of squares to *squares, if there is one. `out` may be a source.
bool reduce_float64(const double* const* sources, int32_t ranks, int64_t count, double divisor, double factor,
                    double* out, double* squares);

/// Every leaf's step, the moments in place.
void server_step(const Optimizer& optimizer, const ModelLeaf* leaves, int64_t count);

/// Every leaf's `sorted_mean`: its divisor is the number of values in the window, its weights are not read.
/// finite[leaf] tells whether all clients' values are finite.
void sorted_mean(const SortedMean& op, const Leaf* leaves, int64_t count, bool* finite);

/// The squared distances of all pairs of clients over all leaves, a symmetric matrix; true if all values are finite.
/// A client without data is zero.
bool squared_distances(const Leaf* leaves, int64_t count, int32_t clients, double* distances);

/// `weighted_sum`, and moments[leaf][client] of those that its measurement names, in the same pass.
void statistics(const Leaf* leaves, const Measurement* measurements, int64_t count, bool* finite,
                Moments* const* moments);

}  // namespace fastagg::cpu

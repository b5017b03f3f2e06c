// `reduce_float64`: the kernel of one reduction of float64 arrays that lie on one device.
#include "reduce_float64.cuh"

namespace fastagg::cuda {
namespace {

/// The arrays as `add_up_float64` reads them.
struct Arrays64 {
  const Reduction64& reduction;
  FASTAGG_INLINE int32_t ranks() const { return reduction.ranks; }
  FASTAGG_INLINE Source operator[](int rank) const { return {reduction.sources[rank], nullptr, Code::float64, 0}; }
};

__global__ void __launch_bounds__(kThreads, kBlocks)
    reduce_float64_kernel(const __grid_constant__ Reduction64 op, int32_t* nonfinite, double* squares) {
  Found found;
  add_up_float64(Arrays64{op}, op.divisor, op.factor, op.out, 0, op.count, whole_grid(), found);
  report(nonfinite, Code::float64, found.largest);
  keep_squares(squares, found.squares);
}

}  // namespace

cudaError_t reduce_float64(const Reduction64& reduction, int32_t* nonfinite, double* squares,
                           cudaStream_t stream) noexcept {
  if (reduction.ranks < 1 || reduction.ranks > kMaximumRanks) return cudaErrorInvalidValue;
  return launch_persistent(reduce_float64_kernel, (reduction.count + kThreads - 1) / kThreads, stream, reduction,
                           nonfinite, squares);
}

}  // namespace fastagg::cuda

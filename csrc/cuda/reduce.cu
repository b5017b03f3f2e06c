// `reduce`: the kernel of one reduction, of arrays that lie on one device.
#include "reduce.cuh"

namespace fastagg::cuda {
namespace {

/// Some arrays, by value: a kernel's parameters need no table.
struct Arrays {
  int32_t count;
  Source sources[kMaximumRanks];

  FASTAGG_INLINE int32_t ranks() const { return count; }
  FASTAGG_INLINE const Source& operator[](int rank) const { return sources[rank]; }

  /// Floats are added up for anything, a wire for itself and for floats.
  static constexpr FASTAGG_INLINE bool takes(Code from, Code to) {
    return !is_state(from) && !is_integer(from) && (!has_scales(from) || from == to || !has_scales(to));
  }
};

bool is_aligned(const Reduction& reduction) {
  const Feedback& feedback = reduction.feedback;
  uintptr_t bits = reinterpret_cast<uintptr_t>(reduction.result.out) | reinterpret_cast<uintptr_t>(feedback.residual) |
                   reinterpret_cast<uintptr_t>(feedback.error);
  for (int32_t rank = 0; rank < reduction.ranks; ++rank)
    bits |= reinterpret_cast<uintptr_t>(reduction.sources[rank].data);
  return bits % kAlignment == 0;
}

}  // namespace

cudaError_t reduce(const Reduction& reduction, int32_t* nonfinite, double* squares, cudaStream_t stream) noexcept {
  if (reduction.ranks < 1 || reduction.ranks > kMaximumRanks) return cudaErrorInvalidValue;
  const Code from = reduction.sources[0].code;
  if (!Arrays::takes(from, reduction.result.code)) return cudaErrorInvalidValue;
  SumWork<Arrays> work{reduction.result,
                       is_aligned(reduction),
                       nonfinite,
                       squares,
                       reduction.feedback,
                       reduction.divisor,
                       exact_inverse(reduction.divisor),
                       from,
                       {reduction.ranks, {}}};
  std::copy_n(reduction.sources, reduction.ranks, work.sources.sources);
  return launch_encode(work, stream);
}

}  // namespace fastagg::cuda

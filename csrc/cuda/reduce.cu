// `reduce`: adds up what all ranks have encoded, in their order and in float32, divides, and encodes the quotient, as
// csrc/cpu/reduce.h does: the same bytes. Error feedback and the sum of squares are found in the same pass.
#include "core/reduce.h"
#include "encode.cuh"

namespace fastagg::cuda {
namespace {

/// What a thread finds once its values are encoded.
template <class Work>
class FeedbackSink {
 public:
  static constexpr bool wanted = true;

  FASTAGG_INLINE explicit FeedbackSink(const Work& work) : work_(work) {}

  template <int n>
  FASTAGG_INLINE void take(int64_t i, const float (&x)[n], const float (&decoded)[n]) {
    for (int j = 0; j < n; ++j) {
      if (i + j >= work_.result.count) return;
      squares_ += static_cast<double>(decoded[j]) * decoded[j];
      keep_error(i + j, x[j] - decoded[j]);
    }
  }

  /// Adds up the squares of the block's threads: a fixed tree.
  __device__ void finish() {
    if (work_.squares == nullptr) return;
    __shared__ double warps[kThreads / kWarp];
    for (int width = kWarp / 2; width > 0; width /= 2) squares_ += __shfl_xor_sync(kWholeWarp, squares_, width);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = squares_;
    __syncthreads();
    if (threadIdx.x != 0) return;
    double sum = 0;
    for (const double warp : warps) sum += warp;
    work_.squares[blockIdx.x] = sum;
  }

 private:
  FASTAGG_INLINE void keep_error(int64_t i, float taken) const {
    const Feedback& feedback = work_.feedback;
    if (feedback.error == nullptr) return;
    float& error = global(feedback.error)[i];
    error = feedback.raise ? error + taken * feedback.error_factor : taken * feedback.error_factor;
  }

  const Work& work_;
  double squares_ = 0;
};

/// Whether arrays of a code are added up for a result of another: floats for anything, a wire for itself and for
/// floats.
constexpr FASTAGG_INLINE bool is_summand(Code from, Code to) {
  return from != Code::state48 && !is_integer(from) && (!has_scales(from) || from == to || !has_scales(to));
}

/// A reduction as a kernel's work.
struct SumWork {
  using Sink = FeedbackSink<SumWork>;
  static constexpr int blocks = 4;  // it needs more registers than a cast

  Cast result;
  bool aligned;
  int32_t* nonfinite;
  double* squares;  // one a block of threads, or null
  Feedback feedback;
  float divisor, inverse;  // the inverse is 0 where the divisor has no exact one
  int32_t ranks;
  Source sources[kMaximumRanks];

  /// The quotients.
  template <Code from>
  struct Values {
    const SumWork& work;

    template <int n>
    FASTAGG_INLINE void load(int64_t i, float* x) const {
      for (int j = 0; j < n; ++j) x[j] = -0.0f;
      for (int rank = 0; rank < work.ranks; ++rank) {
        const Elements<from, n> elements = load_elements<from, n>(work.sources[rank], i);
        const float scale = scale_at<from>(work.sources[rank], i);
        for (int j = 0; j < n; ++j) x[j] = x[j] + narrow(elements, j) * scale;
      }
      const Feedback& feedback = work.feedback;
      for (int j = 0; j < n; ++j) {
        if (feedback.residual != nullptr) x[j] = x[j] + global(feedback.residual)[i + j] * feedback.residual_factor;
        x[j] = work.inverse != 0 ? x[j] * work.inverse : x[j] / work.divisor;
      }
    }

   private:
    /// For a rank alone as `cast` does it, so that it is rounded once.
    template <int n>
    FASTAGG_INLINE float narrow(const Elements<from, n>& elements, int j) const {
      if constexpr (from == Code::float64) {
        double wide[1] = {value_of<double>(elements, j)};
        const bool alone = work.ranks == 1 && work.feedback.residual == nullptr;
        return alone ? narrow_for<ThreadLane>(work.result.code, wide) : ThreadLane::narrow(wide);
      } else {
        return value_of<float>(elements, j);
      }
    }
  };

  FASTAGG_INLINE Code values_code() const { return result.source.code; }

  template <Code to, class Function>
  FASTAGG_INLINE void with_values(Function&& function) const {
    with_code(sources[0].code, [&](auto constant) {
      constexpr Code from = decltype(constant)::value;
      if constexpr (is_summand(from, to)) function(Values<from>{*this});
    });
  }
};

bool is_aligned(const Reduction& reduction) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(reduction.result.out);
  for (int32_t rank = 0; rank < reduction.ranks; ++rank)
    bits |= reinterpret_cast<uintptr_t>(reduction.sources[rank].data);
  return bits % kAlignment == 0;
}

}  // namespace

cudaError_t reduce(const Reduction& reduction, int32_t* nonfinite, double* squares, cudaStream_t stream) noexcept {
  if (reduction.ranks < 1 || reduction.ranks > kMaximumRanks) return cudaErrorInvalidValue;
  if (!is_summand(reduction.sources[0].code, reduction.result.code)) return cudaErrorInvalidValue;
  SumWork work{reduction.result,
               is_aligned(reduction),
               nonfinite,
               squares,
               reduction.feedback,
               reduction.divisor,
               exact_inverse(reduction.divisor),
               reduction.ranks,
               {}};
  std::copy_n(reduction.sources, reduction.ranks, work.sources);
  return launch_encode(work, stream);
}

}  // namespace fastagg::cuda

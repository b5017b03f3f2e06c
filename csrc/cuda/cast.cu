// `cast`: from any floating code to any other, through float32 in registers, as csrc/cpu/cast.h does: the same bytes.
#include "encode.cuh"

namespace fastagg::cuda {
namespace {

/// A cast as a kernel's work.
struct CastWork {
  using Sink = NoSink;
  static constexpr int blocks = kBlocks, vectors = 2;

  Cast result;
  bool aligned;
  int32_t* nonfinite;

  /// Source elements, decoded.
  template <Code from>
  struct Values {
    const CastWork& work;

    template <int n>
    FASTAGG_INLINE void load(int64_t i, float* x) const {
      const Cast& op = work.result;
      const Elements<from, n> elements = load_elements<from, n>(op.source, i);
      const float scale = scale_at<from>(op.source, i);
      for (int j = 0; j < n; ++j) {
        if constexpr (from == Code::float64) {
          double wide[1] = {value_of<double>(elements, j)};
          x[j] = narrow_for<ThreadLane>(op.code, wide);
        } else {
          x[j] = value_of<float>(elements, j);
          if constexpr (has_scales(from)) x[j] = x[j] * scale;
        }
        x[j] = x[j] * op.factor;
      }
    }
  };

  FASTAGG_INLINE Code values_code() const { return result.source.code; }

  template <Code to, class Function>
  FASTAGG_INLINE void with_values(Function&& function) const {
    with_code(result.source.code, [&](auto constant) {
      constexpr Code from = decltype(constant)::value;
      if constexpr (!is_integer(from) && !is_state(from)) function(Values<from>{*this});
    });
  }
};

}  // namespace

cudaError_t cast(const Cast& cast, int32_t* nonfinite, cudaStream_t stream) noexcept {
  const uintptr_t past =
      (reinterpret_cast<uintptr_t>(cast.source.data) | reinterpret_cast<uintptr_t>(cast.out)) % kAlignment;
  return launch_encode(CastWork{cast, past == 0, nonfinite}, stream);
}

}  // namespace fastagg::cuda

// Adding up what ranks have encoded, as works for encode.cuh: in the ranks' order and in float32, divided, and encoded
// as csrc/cpu/reduce.h does: the same bytes. Error feedback and the sum of squares are found in the same pass.
#pragma once
#include "core/reduce.h"
#include "encode.cuh"

namespace fastagg::cuda {

/// What a thread finds once its values are encoded: the error, and the sum of squares.
class FeedbackSink {
 public:
  static constexpr bool wanted = true;

  template <class Work>
  FASTAGG_INLINE explicit FeedbackSink(const Work& work)
      : feedback_(work.feedback), count_(work.result.count), aligned_(work.aligned), kept_(work.squares) {}

  template <int n>
  FASTAGG_INLINE void take(int64_t i, const float (&x)[n], const float (&decoded)[n]) {
    const int64_t held = count_ - i;  // elements that the array has
    float taken[n];
    for (int j = 0; j < n; ++j) {
      taken[j] = x[j] - decoded[j];
      if (j < held) squares_ += static_cast<double>(decoded[j]) * decoded[j];
    }
    if (feedback_.error == nullptr) return;
    if (aligned_ && held >= n) return keep_errors<n>(i, taken);
    for (int j = 0; j < n; ++j)
      if (j < held) keep_errors<1>(i + j, {taken[j]});
  }

  FASTAGG_INLINE double squares() const { return squares_; }
  __device__ void finish() { keep_squares(kept_, squares_); }

 private:
  template <int n>
  FASTAGG_INLINE void keep_errors(int64_t i, const float (&taken)[n]) const {
    auto* errors = global(reinterpret_cast<Vector<float, n>*>(feedback_.error)) + i / n;
    Vector<float, n> sums{};
    if (feedback_.raise) sums = *errors;
    for (int j = 0; j < n; ++j) {
      const float error = taken[j] * feedback_.error_factor;
      sums.values[j] = feedback_.raise ? sums.values[j] + error : error;
    }
    *errors = sums;
  }

  const Feedback feedback_;
  const int64_t count_;
  const bool aligned_;
  double* const kept_;
  double squares_ = 0;
};

/// A reduction as a work. `Sources` tells what is added up: ranks(), [rank], code(), and takes(from, to), which pairs
/// of codes are to be compiled.
template <class Sources>
struct SumWork {
  using Sink = FeedbackSink;
  // It needs more registers than a cast, and has loads of several ranks under way.
  static constexpr int blocks = 4, vectors = 1;

  Cast result;
  bool aligned;  // the residual and the error too
  int32_t* nonfinite;
  double* squares;  // to which each block of threads adds in its own place, or null
  Feedback feedback;
  float divisor, inverse;  // where the inverse is not 0 it multiplies instead
  Code from_code;
  Sources sources;

  /// The quotients.
  template <Code from>
  struct Values {
    const SumWork& work;

    template <int n>
    FASTAGG_INLINE void load(int64_t i, float* x) const {
      for (int j = 0; j < n; ++j) x[j] = -0.0f;
      for (int rank = 0; rank < work.sources.ranks(); ++rank) {
        const Source source = work.sources[rank];
        const Elements<from, n> elements = load_elements<from, n>(source, i);
        const float scale = scale_at<from>(source, i);
        for (int j = 0; j < n; ++j) x[j] = x[j] + narrow(elements, j) * scale;
      }
      const Feedback& feedback = work.feedback;
      if (feedback.residual != nullptr) {
        const auto residual = global(reinterpret_cast<const Vector<float, n>*>(feedback.residual))[i / n];
        for (int j = 0; j < n; ++j) x[j] = x[j] + residual.values[j] * feedback.residual_factor;
      }
      for (int j = 0; j < n; ++j) {
        x[j] = work.inverse != 0 ? x[j] * work.inverse : x[j] / work.divisor;
      }
    }

   private:
    /// For a rank alone as `cast` does it, so that it is rounded once.
    template <int n>
    FASTAGG_INLINE float narrow(const Elements<from, n>& elements, int j) const {
      if constexpr (from == Code::float64) {
        double wide[1] = {value_of<double>(elements, j)};
        const bool alone = work.sources.ranks() == 1 && work.feedback.residual == nullptr;
        return alone ? narrow_for<ThreadLane>(work.result.code, wide) : ThreadLane::narrow(wide);
      } else {
        return value_of<float>(elements, j);
      }
    }
  };

  FASTAGG_INLINE Code values_code() const { return result.source.code; }

  template <Code to, class Function>
  FASTAGG_INLINE void with_values(Function&& function) const {
    with_code(from_code, [&](auto constant) {
      constexpr Code from = decltype(constant)::value;
      if constexpr (Sources::takes(from, to)) function(Values<from>{*this});
    });
  }
};

}  // namespace fastagg::cuda

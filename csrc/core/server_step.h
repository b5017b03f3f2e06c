// The arithmetic of `server_step`: an optimiser's step from the model x towards the clients' mean y, in float32, for
// float64 leaves in float64. Every operation is rounded once, in the order in which NumPy evaluates the formula.
#pragma once
#include "numbers.h"

namespace fastagg {

/// An optimiser's constants in the arithmetic's type.
template <class T>
struct Constants {
  explicit FASTAGG_INLINE Constants(const Optimizer& optimizer)
      : learning_rate(static_cast<T>(optimizer.learning_rate)),
        beta_1(static_cast<T>(optimizer.beta_1)),
        rest_of_beta_1(static_cast<T>(1 - optimizer.beta_1)),
        beta_2(static_cast<T>(optimizer.beta_2)),
        rest_of_beta_2(static_cast<T>(1 - optimizer.beta_2)),
        tau(static_cast<T>(optimizer.tau)) {}

  T learning_rate, beta_1, rest_of_beta_1, beta_2, rest_of_beta_2, tau;
};

/// The second moment after a step, from the square of the step's delta.
template <Rule rule, class T, class V>
FASTAGG_INLINE V next_second_moment(const Constants<T>& constants, V moment, V square) {
  if constexpr (rule == Rule::adagrad) return moment + square;
  const V change = constants.rest_of_beta_2 * square;
  if constexpr (rule == Rule::adam) return constants.beta_2 * moment + change;
  const V gap = moment - square;  // Yogi: moment - change * sign(gap), the sign of NaN being NaN
  return gap > V{} ? moment - change : gap < V{} ? moment + change : moment - gap;
}

/// The model after a step. The moments that the rule has are replaced.
template <Rule rule, class Lanes, class T, class V>
FASTAGG_INLINE V next_model(const Constants<T>& constants, V x, V y, V& first, V& second) {
  if constexpr (rule == Rule::add) return x + constants.learning_rate * y;
  if constexpr (rule == Rule::momentum) {
    first = constants.beta_1 * first + (x - y);
    return x - constants.learning_rate * first;
  }
  const V delta = y - x;
  if constexpr (rule == Rule::interpolate) return x + constants.learning_rate * delta;
  first = constants.beta_1 * first + constants.rest_of_beta_1 * delta;
  second = next_second_moment<rule>(constants, second, delta * delta);
  return x + constants.learning_rate * first / (Lanes::square_root(second) + constants.tau);
}

/// Whether models have leaves of the code.
constexpr FASTAGG_INLINE bool is_float(Code code) { return code <= Code::bfloat16; }

/// The code of a leaf's moments.
constexpr FASTAGG_INLINE Code moment_code(Code code) { return code == Code::float64 ? code : Code::float32; }

/// Steps the elements from index i on. With `stream`, the model's store leaves the cache alone.
template <class Lanes, Rule rule, Code code, bool stream>
FASTAGG_INLINE void step_elements(const ModelLeaf& leaf,
                                  const Constants<typename Numbers<Lanes, code>::Scalar>& constants, int64_t i) {
  using Moments = Numbers<Lanes, moment_code(code)>;
  Numbers<Lanes, code> x, y;
  Moments first{}, second{};
  x.load(leaf.model, i);
  y.load(leaf.mean, i);
  if constexpr (has_first_moment(rule)) first.load(leaf.first_moment, i);
  if constexpr (has_second_moment(rule)) second.load(leaf.second_moment, i);
  for (int part = 0; part < x.parts; ++part)
    x.values[part] =
        next_model<rule, Lanes>(constants, x.values[part], y.values[part], first.values[part], second.values[part]);
  if constexpr (has_first_moment(rule)) first.template store<false>(leaf.first_moment, i);
  if constexpr (has_second_moment(rule)) second.template store<false>(leaf.second_moment, i);
  x.template store<stream>(leaf.out, i);
}

}  // namespace fastagg

// The loops of `server_step`, compiled once for each instruction set: every element is read once and written once.
#pragma once
#include "core/server_step.h"
#include "stream.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// Steps whole vectors of the elements from i up to end; returns where it stopped.
template <class Lanes, Rule rule, Code code, bool stream, class T>
FASTAGG_INLINE int64_t step_vectors(const ModelLeaf& leaf, const Constants<T>& constants, int64_t i, int64_t end) {
  for (; i + Lanes::width <= end; i += Lanes::width) step_elements<Lanes, rule, code, stream>(leaf, constants, i);
  return i;
}

template <class Lanes, Rule rule, Code code, bool stream>
void step_range(const Optimizer& optimizer, ModelLeaf leaf, int64_t begin, int64_t end) {
  const Constants<typename Numbers<Lanes, code>::Scalar> constants(optimizer);
  const int64_t head = stream ? until_aligned(leaf.out, begin, sizeof(Element<code>), end - begin) : 0;
  begin = step_vectors<Lane, rule, code, false>(leaf, constants, begin, begin + head);
  begin = step_vectors<Lanes, rule, code, stream>(leaf, constants, begin, end);
  step_vectors<Lane, rule, code, false>(leaf, constants, begin, end);
}

/// A rule as a type, for `with_rule`.
template <Rule rule>
struct RuleConstant {
  static constexpr Rule value = rule;
};

template <class Function, size_t... rules>
void with_rule(Rule rule, Function&& function, std::index_sequence<rules...>) {
  ((static_cast<size_t>(rule) == rules ? function(RuleConstant<static_cast<Rule>(rules)>{}) : void()), ...);
}

/// Calls `function` with the rule as a compile-time constant.
template <class Function>
void with_rule(Rule rule, Function&& function) {
  with_rule(rule, function, std::make_index_sequence<kRules>{});
}

/// `server_step` of the elements [begin, end) of a leaf. With `stream`, the model bypasses the cache.
template <class Lanes>
void server_step(const Optimizer& optimizer, const ModelLeaf& leaf, int64_t begin, int64_t end, bool stream) {
  with_rule(optimizer.rule, [&](auto rule) {
    with_code(leaf.code, [&](auto code) {
      if constexpr (is_float(code.value)) {
        stream ? step_range<Lanes, rule.value, code.value, true>(optimizer, leaf, begin, end)
               : step_range<Lanes, rule.value, code.value, false>(optimizer, leaf, begin, end);
      }
    });
  });
}

}  // namespace
}  // namespace fastagg

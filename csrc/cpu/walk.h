// How loops walk a range of elements.
#pragma once
#include "core/lane.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// Vectors of sums that stay in registers while a group is added.
constexpr int kRegisters = 2;

template <class Lanes>
constexpr int registers_of = Lanes::width == 1 ? 1 : kRegisters;

/// Calls loop(lanes, i, end), which returns where it stopped, for a head in lanes of one, then vectors, then the tail.
template <class Lanes, class Loop>
FASTAGG_INLINE void walk(int64_t i, int64_t head, int64_t end, Loop&& loop) {
  i = loop(Lane{}, i, head);
  i = loop(Lanes{}, i, end);
  loop(Lane{}, i, end);
}

}  // namespace
}  // namespace fastagg

// The loop of `reduce_float64`, compiled once for each instruction set.
#pragma once
#include "core/reduce.h"
#include "unaligned.h"
#include "walk.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// out = sum_r sources[r] * factor / divisor, where `out` may be a source; true if it is finite. Adds its sum of
/// squares to *squares, if there is one.
template <class Lanes>
bool reduce_float64(const double* const* sources, int32_t ranks, int64_t count, double divisor, double factor,
                    double* out, double* squares) {
  bool finite = true;
  double strides[kSquareStrides] = {};
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = count - begin < kChunk ? count : begin + kChunk;
    walk<Lanes>(begin, begin, end, [&](auto lanes, int64_t i, int64_t to) {
      using Own = decltype(lanes);
      const Reduction64Of<Own> op(ranks, divisor, factor);
      auto mask = not_finite(typename Own::D{});
      for (; i + Own::width <= to; i += Own::width) {
        typename Own::D x[Own::halves];
        op.results([&](int32_t rank, auto& own) { Own::template load_wide<double>(sources[rank], i, own); }, x);
        for (const auto& half : x) mask |= not_finite(half);
        Own::template store_float64<false>(out, i, x);
      }
      finite &= !Own::any(mask);
      return i;
    });
    if (squares == nullptr) continue;
    for (int64_t i = begin; i < end; i += kSquareStrides) {
      const int64_t here = end - i < kSquareStrides ? end - i : kSquareStrides;
      for (int64_t stride = 0; stride < here; ++stride) strides[stride] += out[i + stride] * out[i + stride];
    }
  }
  if (squares != nullptr) *squares += sum_of_strides(strides);
  return finite;
}

}  // namespace
}  // namespace fastagg

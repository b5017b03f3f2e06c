// Clients' values side by side: a tile of a leaf, decoded to float32 or float64, a row a client.
#pragma once
#include "core/rows.h"
#include "weighted_sum.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// Columns of vectors that hold so many elements.
template <class Lanes>
constexpr int64_t padded(int64_t count) {
  return (count + Lanes::width - 1) / Lanes::width * Lanes::width;
}

/// Decodes `count` elements of a client from index `begin` on; true if they are finite.
template <class Lanes, Code code, Code work>
bool decode_row(const Source& source, int64_t begin, int64_t count, Element<work>* row) {
  bool finite = true;
  walk<Lanes>(0, 0, count, [&](auto lanes, int64_t i, int64_t end) {
    using Own = decltype(lanes);
    auto mask = not_finite(typename Numbers<Own, work>::Part{});
    for (; i + Own::width <= end; i += Own::width) {
      const Numbers<Own, work> x = decoded<Own, code, work>(source, begin + i);
      for (const auto& part : x.values) mask |= not_finite(part);
      x.template store<false>(row, i);
    }
    finite &= !Own::any(mask);
    return i;
  });
  return finite;
}

/// Decodes the elements [begin, begin + count) of all clients to rows `stride` apart, up to whole vectors, behind the
/// last one zeros; true if all are finite. A client without data is zero.
template <class Lanes, Code work>
bool decode_rows(const Leaf& leaf, int64_t begin, int64_t count, Element<work>* rows, int64_t stride) {
  bool finite = true;
  for (int32_t k = 0; k < leaf.clients; ++k) {
    const Source& source = leaf.sources[k];
    Element<work>* row = rows + k * stride;
    int64_t filled = 0;
    with_code(source.data == nullptr ? Code::state48 : source.code, [&](auto constant) {
      constexpr Code code = constant.value;
      if constexpr (!is_state(code) && (work == Code::float64 || !is_wide(code))) {
        finite &= decode_row<Lanes, code, work>(source, begin, count, row);
        filled = count;
      }
    });
    for (; filled < padded<Lanes>(count); ++filled) row[filled] = 0;
  }
  return finite;
}

}  // namespace
}  // namespace fastagg

// The loop of `sorted_mean`, compiled once for each instruction set: a tile of all clients' values is decoded into the
// first-level cache, sorted there row against row, and summed. Every client is read once.
#pragma once
#include "core/sorted_mean.h"
#include "core/sorting_network.h"
#include "rows.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// The mixtures of the clients, row by row.
template <class Lanes, Code work>
void mix_rows(const SortedMean& op, int32_t clients, const Element<work>* values, Element<work>* rows, int64_t stride,
              int64_t count) {
  using D = typename Lanes::D;
  for (int32_t r = 0; r < op.rows; ++r) {
    const double* shares = op.mixing + int64_t{r} * clients;
    for (int64_t i = 0; i < count; i += Lanes::width) {
      const SortedColumn<Lanes, work> column{values + i, stride};
      D sum[Lanes::halves];
      mix<Lanes, work>(shares, clients, [&](int32_t k, D(&x)[Lanes::halves]) { column.row(k, x); }, sum);
      if constexpr (work == Code::float64) Lanes::template store_float64<false>(rows, r * stride + i, sum);
      else Lanes::template store_float32<false>(rows, r * stride + i, Lanes::narrow(sum));
    }
  }
}

/// A vector of the type that values are sorted in.
template <class Lanes, Code work>
using Sortable = std::conditional_t<work == Code::float64, typename Lanes::D, typename Lanes::F>;

/// Rows that are sorted in registers: an instruction set has that many, or more.
constexpr int32_t kRegisterRows = 16;

template <class Lanes, int32_t rows, class V, size_t... c>
FASTAGG_INLINE void exchange(V (&sorted)[rows], std::index_sequence<c...>) {
  [[maybe_unused]] constexpr auto network = fixed_network<rows>();
  (compare_exchange<Lanes>(sorted[network[c].low], sorted[network[c].high]), ...);
}

/// The lanes of a sortable vector as integers.
template <class Lanes, Code work>
using SortableBits = std::conditional_t<work == Code::float64, typename Lanes::L, typename Lanes::I>;

/// Sorts whole vectors of columns in registers, and sums their windows; true if their values are finite. NaN sorts
/// last. If only the middle is wanted, `is_middle`, comparisons that cannot reach it are left out.
template <class Lanes, Code work, int32_t rows, bool is_middle>
bool sort_in_registers(const SortedMean& op, const Element<work>* const* values, int64_t count, double* sums) {
  using V = Sortable<Lanes, work>;
  using Bits = SortableBits<Lanes, work>;
  using Word = std::conditional_t<work == Code::float64, int64_t, int32_t>;
  constexpr auto infinity = static_cast<Word>(work == Code::float64 ? int64_t{0x7ff} << 52 : int64_t{0xff} << 23);
  constexpr auto magnitude = static_cast<Word>(work == Code::float64 ? INT64_MAX : INT32_MAX);
  constexpr int parts = Lanes::width * sizeof(Word) / sizeof(V), part = Lanes::width / parts;
  const int32_t first = is_middle ? first_middle(rows) : first_row(op.window, rows, op.left_out);
  const int32_t last = is_middle ? last_middle(rows) : last_row(op.window, rows, op.left_out);
  bool finite = true;
  for (int64_t i = 0; i < count; i += Lanes::width) {
    alignas(64) Element<work> window[rows * Lanes::width];
    for (int p = 0; p < parts; ++p) {
      V sorted[rows];
      Bits are_finite = ~Bits{};  // negative lanes; by integers, for comparisons keep the floating units busy
      for (int32_t r = 0; r < rows; ++r) {
        sorted[r] = load_bytes<V>(values[r] + i + p * part);
        are_finite &= (bit_cast<Bits>(sorted[r]) & magnitude) - infinity;
      }
      if (Lanes::any(are_finite >= 0)) {
        finite = false;
        for (V& x : sorted) x = sortable(x);
      }
      exchange<Lanes, rows>(sorted, std::make_index_sequence<count_of_comparators<rows>()>{});
      for (int32_t r = 0; r < rows; ++r)
        if (first <= r && r < last) store_bytes(window + r * Lanes::width + p * part, sorted[r]);
    }
    typename Lanes::D sum[1][Lanes::halves];
    sum_of_window<Lanes, work>(op, SortedColumn<Lanes, work>{window, Lanes::width}, sum[0]);
    KeepSums{sums}.template put<Lanes, 1>(i, sum);
  }
  return finite;
}

/// Sorts every column by the network, row against row in the cache.
template <class Lanes, Code work>
void sort_in_cache(const SortedMean& op, Element<work>* values, int64_t stride, int64_t count) {
  using V = Sortable<Lanes, work>;
  for (int64_t c = 0; c < op.comparators; ++c) {
    Element<work>*low = values + op.network[c].low * stride, *high = values + op.network[c].high * stride;
    for (int64_t i = 0; i < count; i += sizeof(V) / sizeof(*values)) {
      V x = load_bytes<V>(low + i), y = load_bytes<V>(high + i);
      compare_exchange<Lanes>(x, y);
      store_bytes(low + i, x);
      store_bytes(high + i, y);
    }
  }
}

template <class Lanes, Code work, size_t... rows>
bool sort_few_rows(const SortedMean& op, const Element<work>* const* values, int64_t count, double* sums,
                   std::index_sequence<rows...>) {
  bool finite = true;
  const auto sort = [&](auto count_of_rows) {
    constexpr int32_t all = count_of_rows.value;
    finite = op.window == Window::middle ? sort_in_registers<Lanes, work, all, true>(op, values, count, sums)
                                         : sort_in_registers<Lanes, work, all, false>(op, values, count, sums);
  };
  ((op.rows == rows + 1 ? sort(std::integral_constant<int32_t, rows + 1>{}) : void()), ...);
  return finite;
}

/// The sums of the windows of columns of few rows, which lie anywhere, in whole vectors; true if all values are finite.
template <class Lanes, Code work>
bool sum_few_rows(const SortedMean& op, const Element<work>* const* values, int64_t count, double* sums) {
  return sort_few_rows<Lanes, work>(op, values, count, sums, std::make_index_sequence<kRegisterRows>{});
}

/// Asks for the clients' next tile, which comes while this one is sorted. (Tiles of many clients gained nothing.)
inline void prefetch_tile(const Leaf& leaf, int64_t begin, int64_t count) {
  for (int32_t k = 0; k < leaf.clients; ++k) {
    const Source& source = leaf.sources[k];
    const auto* next = static_cast<const char*>(source.data) + encoded_bytes(source.code, begin + count);
    for (int64_t byte = 0; byte < encoded_bytes(source.code, count); byte += 64) __builtin_prefetch(next + byte);
  }
}

/// The sums of the columns' windows.
template <class Lanes, Code work>
void sum_windows(const SortedMean& op, const Element<work>* rows, int64_t stride, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; i += Lanes::width) {
    typename Lanes::D sum[1][Lanes::halves];
    sum_of_window<Lanes, work>(op, SortedColumn<Lanes, work>{rows + i, stride}, sum[0]);
    KeepSums{sums}.template put<Lanes, 1>(i, sum);
  }
}

/// Whether all clients' values can be sorted from where they lie.
inline bool are_plain(const Leaf& leaf, Code work) {
  for (int32_t k = 0; k < leaf.clients; ++k)
    if (leaf.sources[k].code != work || leaf.sources[k].data == nullptr) return false;
  return true;
}

/// `sorted_mean` of few clients whose values need neither mixing nor decoding: every vector stays in registers.
template <class Lanes, Code work>
bool sort_where_they_lie(const SortedMean& op, const Leaf& leaf, int64_t begin, int64_t end, bool stream) {
  const Leaf means = leaf_of_windows(leaf, work);
  double sums[kMostColumns];
  const Element<work>* values[kRegisterRows];
  bool finite = true;
  for (; begin < end; begin += kMostColumns) {
    const int64_t count = end - begin < kMostColumns ? end - begin : kMostColumns;
    const int64_t whole = count - count % Lanes::width;
    for (int32_t k = 0; k < leaf.clients; ++k)
      values[k] = static_cast<const Element<work>*>(leaf.sources[k].data) + begin;
    finite &= sum_few_rows<Lanes, work>(op, values, whole, sums);
    if (whole < count) {
      Element<work> rest[kRegisterRows][Lanes::width] = {};
      for (int32_t k = 0; k < leaf.clients; ++k) {
        memcpy(rest[k], values[k] + whole, (count - whole) * sizeof(Element<work>));
        values[k] = rest[k];
      }
      finite &= sum_few_rows<Lanes, work>(op, values, Lanes::width, sums + whole);
    }
    store_sums<Lanes>({means, begin, count, sums, false}, stream);
  }
  return finite;
}

/// `sorted_mean` of any clients, tile by tile.
template <class Lanes, Code work>
bool sort_tiles(const SortedMean& op, const Leaf& leaf, int64_t begin, int64_t end, void* scratch, bool stream) {
  const int32_t clients = op.mixing == nullptr ? 0 : leaf.clients;
  const int64_t columns = tile_columns((op.rows + clients) * static_cast<int64_t>(sizeof(Element<work>)));
  Element<work>* const rows = static_cast<Element<work>*>(scratch);
  Element<work>* const decoded = rows + (clients == 0 ? 0 : op.rows * columns);
  const Element<work>* few_rows[kRegisterRows];
  for (int32_t r = 0; r < op.rows && r < kRegisterRows; ++r) few_rows[r] = rows + r * columns;
  const Leaf means = leaf_of_windows(leaf, work);
  double sums[kMostColumns];
  bool finite = true;
  for (; begin < end; begin += columns) {
    const int64_t count = end - begin < columns ? end - begin : columns, whole = padded<Lanes>(count);
    if (!decode_rows<Lanes, work>(leaf, begin, count, decoded, columns)) {
      finite = false;
      for (int32_t k = 0; k < leaf.clients; ++k)
        for (int64_t i = k * columns; i < k * columns + count; ++i) decoded[i] = sortable(decoded[i]);
    }
    if (leaf.clients <= kRegisterRows) prefetch_tile(leaf, begin, count);
    if (clients != 0) mix_rows<Lanes, work>(op, clients, decoded, rows, columns, whole);
    if (op.rows <= kRegisterRows) {
      sum_few_rows<Lanes, work>(op, few_rows, whole, sums);
    } else {
      sort_in_cache<Lanes, work>(op, rows, columns, whole);
      sum_windows<Lanes, work>(op, rows, columns, whole, sums);
    }
    store_sums<Lanes>({means, begin, count, sums, false}, stream);
  }
  return finite;
}

template <class Lanes, Code work>
bool sorted_mean_of(const SortedMean& op, const Leaf& leaf, int64_t begin, int64_t end, void* scratch, bool stream) {
  const bool few = op.rows <= kRegisterRows && op.mixing == nullptr;
  return few && are_plain(leaf, work) ? sort_where_they_lie<Lanes, work>(op, leaf, begin, end, stream)
                                      : sort_tiles<Lanes, work>(op, leaf, begin, end, scratch, stream);
}

/// `sorted_mean` of the elements [begin, end) of a leaf, `begin` a multiple of kChunk; true if all clients' values are
/// finite. `scratch` is for scratch_bytes(); with `stream`, the result bypasses the cache.
template <class Lanes>
bool sorted_mean(const SortedMean& op, const Leaf& leaf, int64_t begin, int64_t end, void* scratch, bool stream) {
  return is_wide(leaf) ? sorted_mean_of<Lanes, Code::float64>(op, leaf, begin, end, scratch, stream)
                       : sorted_mean_of<Lanes, Code::float32>(op, leaf, begin, end, scratch, stream);
}

}  // namespace
}  // namespace fastagg

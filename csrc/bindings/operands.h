// What the bindings share: from Python's tuples to the operands of csrc/core/types.h.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <vector>

#include "core/weighted_sum.h"

namespace fastagg::bindings {

namespace py = pybind11;

template <class T = void>
T* pointer(py::handle address) {
  return reinterpret_cast<T*>(address.cast<uintptr_t>());
}

/// (data, companion, code, block_shift)
inline Source source_of(py::handle described) {
  const auto tuple = py::reinterpret_borrow<py::tuple>(described);
  return {pointer(tuple[0]), pointer(tuple[1]), static_cast<Code>(tuple[2].cast<int>()), tuple[3].cast<uint8_t>()};
}

/// (source, code, block_shift, out, scales, count, stochastic, (seed, step, tensor, rank), factor)
inline Cast cast_of(const py::tuple& described) {
  const auto [seed, step, tensor, rank] = described[7].cast<std::tuple<uint64_t, uint32_t, uint32_t, uint32_t>>();
  return {source_of(described[0]),      static_cast<Code>(described[1].cast<int>()),
          described[2].cast<uint8_t>(), described[6].cast<bool>() ? Rounding::stochastic : Rounding::nearest,
          {seed, step, tensor, rank},   described[5].cast<int64_t>(),
          pointer(described[3]),        pointer<float>(described[4]),
          described[8].cast<float>()};
}

/// [(begin, place), ...]
inline std::vector<Stretch> stretches_of(py::handle described) {
  std::vector<Stretch> stretches;
  for (py::handle item : py::reinterpret_borrow<py::sequence>(described)) {
    const auto [begin, place] = item.cast<std::pair<int64_t, int64_t>>();
    stretches.push_back({begin, place});
  }
  return stretches;
}

/// A reduction of the elements [begin, end) of larger arrays, with the storage that it points into. `described`:
/// (sources, divisor, residual, residual factor, error, error factor, raise, result as for `cast_of`, begin,
/// stretches), the addresses those of element `begin`.
class RangeReduction {
 public:
  explicit RangeReduction(const py::tuple& described) : begin_(described[8].cast<int64_t>()) {
    for (py::handle source : py::reinterpret_borrow<py::list>(described[0])) sources_.push_back(source_of(source));
    stretches_ = stretches_of(described[9]);
    reduction_ = {sources_.data(),
                  static_cast<int32_t>(sources_.size()),
                  described[1].cast<float>(),
                  {pointer<float>(described[2]), described[3].cast<float>(), pointer<float>(described[4]),
                   described[5].cast<float>(), described[6].cast<bool>()},
                  cast_of(py::reinterpret_borrow<py::tuple>(described[7]))};
  }

  int64_t begin() const { return begin_; }
  int64_t end() const { return begin_ + reduction_.result.count; }

  /// Of arrays whose element 0 is the larger arrays' own.
  const Reduction& of_whole() {
    for (Source& source : sources_) {
      source.companion = shifted(source.companion, Code::float32, begin_ >> source.block_shift);
      source.data = shifted(source.data, source.code, begin_);
    }
    Cast& result = reduction_.result;
    result.out = shifted(result.out, result.code, begin_);
    result.scales = shifted(result.scales, Code::float32, begin_ >> result.block_shift);
    reduction_.feedback.residual = shifted(reduction_.feedback.residual, Code::float32, begin_);
    reduction_.feedback.error = shifted(reduction_.feedback.error, Code::float32, begin_);
    return with_stretches();
  }

  /// Of arrays whose element 0 is `begin`.
  const Reduction& of_part() {
    std::vector<Stretch> part;
    if (stretches_.empty()) part.push_back({0, begin_});
    for (const Stretch& stretch : stretches_) {
      if (stretch.begin <= begin_) part.assign(1, {0, stretch.place + begin_ - stretch.begin});
      else part.push_back({stretch.begin - begin_, stretch.place});
    }
    stretches_ = std::move(part);
    return with_stretches();
  }

 private:
  const Reduction& with_stretches() {
    reduction_.result.stretches = stretches_.data();
    reduction_.result.stretch_count = static_cast<int64_t>(stretches_.size());
    return reduction_;
  }

  int64_t begin_;
  std::vector<Source> sources_;
  std::vector<Stretch> stretches_;
  Reduction reduction_;
};

/// Leaves with the storage that they point into.
class Leaves {
 public:
  /// `described`: one tuple a leaf, (sources, code of the sources, weights, divisor, count, fold, out, companion, code
  /// of the result, dither). `sources` are addresses if they share a code, or tuples for `source_of` where the code
  /// given is None.
  explicit Leaves(const py::list& described) {
    for (py::handle leaf : described) add(py::reinterpret_borrow<py::tuple>(leaf));
  }

  const Leaf* data() const { return leaves_.data(); }
  int64_t size() const { return static_cast<int64_t>(leaves_.size()); }

 private:
  void add(const py::tuple& leaf) {
    const auto sources = py::reinterpret_borrow<py::list>(leaf[0]);
    std::vector<Source> parsed;
    parsed.reserve(sources.size());
    if (leaf[1].is_none()) {
      for (py::handle source : sources) parsed.push_back(source_of(source));
    } else {
      const auto code = static_cast<Code>(leaf[1].cast<int>());
      for (py::handle address : sources) parsed.push_back({pointer(address), nullptr, code, 0});
    }
    Leaf result{};
    result.clients = static_cast<int32_t>(parsed.size());
    sources_.push_back(std::move(parsed));
    result.sources = sources_.back().data();
    result.weights = weights_of(leaf[2]);
    result.divisor = leaf[3].cast<double>();
    result.count = leaf[4].cast<int64_t>();
    result.fold = static_cast<Fold>(leaf[5].cast<int>());
    result.out = pointer(leaf[6]);
    result.companion = pointer(leaf[7]);
    result.code = static_cast<Code>(leaf[8].cast<int>());
    result.dither = leaf[9].cast<uint16_t>();
    leaves_.push_back(result);
  }

  /// Weights as doubles, converted once for all the leaves that share the list.
  const double* weights_of(py::handle list) {
    if (weights_.empty() || !list.is(weights_.back().first))
      weights_.emplace_back(list, list.cast<std::vector<double>>());
    return weights_.back().second.data();
  }

  std::vector<Leaf> leaves_;
  std::vector<std::vector<Source>> sources_;
  std::vector<std::pair<py::handle, std::vector<double>>> weights_;  // when it grows, the numbers stay where they are
};

/// The indices of the false entries.
inline std::vector<int64_t> indices_of_false(const bool* flags, int64_t count) {
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < count; ++i)
    if (!flags[i]) indices.push_back(i);
  return indices;
}

}  // namespace fastagg::bindings

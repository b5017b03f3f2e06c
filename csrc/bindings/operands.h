// What the bindings share: from Python's tuples to the operands of csrc/core/types.h.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "core/exchange.h"
#include "core/sorted_mean.h"
#include "core/sorting_network.h"
#include "core/weighted_sum.h"
#include "released_gil.h"

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

/// (data, code, count, wire, block_shift, stochastic, (seed, step, tensor, rank), mean, encoded_factor, factor,
/// residual, residual_factor, error, norm, stretches, description); the stretches are stored beside it.
inline Exchange exchange_of(const py::tuple& described, std::vector<Stretch>& stretches) {
  stretches = stretches_of(described[14]);
  const auto [seed, step, tensor, rank] = described[6].cast<std::tuple<uint64_t, uint32_t, uint32_t, uint32_t>>();
  return {pointer(described[0]),
          static_cast<Code>(described[1].cast<int>()),
          described[2].cast<int64_t>(),
          static_cast<Code>(described[3].cast<int>()),
          described[4].cast<uint8_t>(),
          described[5].cast<bool>() ? Rounding::stochastic : Rounding::nearest,
          {seed, step, tensor, rank},
          stretches.data(),
          static_cast<int64_t>(stretches.size()),
          described[7].cast<bool>(),
          described[8].cast<float>(),
          described[9].cast<double>(),
          pointer<float>(described[10]),
          described[11].cast<float>(),
          pointer<float>(described[12]),
          described[13].cast<bool>()};
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

/// Addresses, if they share a code; tuples for `source_of` where the code given is None.
inline std::vector<Source> sources_of(py::handle described, py::handle code) {
  const auto sources = py::reinterpret_borrow<py::list>(described);
  std::vector<Source> parsed;
  parsed.reserve(sources.size());
  if (code.is_none()) {
    for (py::handle source : sources) parsed.push_back(source_of(source));
  } else {
    const auto shared = static_cast<Code>(code.cast<int>());
    for (py::handle address : sources) parsed.push_back({pointer(address), nullptr, shared, 0});
  }
  return parsed;
}

/// Leaves with the storage that they point into.
class Leaves {
 public:
  /// `described`: one tuple a leaf, (sources, code of the sources, weights, divisor, count, fold, out, companion, code
  /// of the result, dither, divisor's rest), the sources as `sources_of` takes them.
  explicit Leaves(const py::list& described) {
    for (py::handle leaf : described) add(py::reinterpret_borrow<py::tuple>(leaf));
  }

  const Leaf* data() const { return leaves_.data(); }
  int64_t size() const { return static_cast<int64_t>(leaves_.size()); }

 private:
  void add(const py::tuple& leaf) {
    Leaf result{};
    sources_.push_back(sources_of(leaf[0], leaf[1]));
    result.clients = static_cast<int32_t>(sources_.back().size());
    result.sources = sources_.back().data();
    result.weights = weights_of(leaf[2]);
    result.divisor = leaf[3].cast<double>();
    result.count = leaf[4].cast<int64_t>();
    result.fold = static_cast<Fold>(leaf[5].cast<int>());
    result.out = pointer(leaf[6]);
    result.companion = pointer(leaf[7]);
    result.code = static_cast<Code>(leaf[8].cast<int>());
    result.dither = leaf[9].cast<uint16_t>();
    result.divisor_rest = leaf[10].cast<double>();
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

/// A rule of `sorted_mean` with the storage that it points into. `described`: (window, left_out, rows, mixing: a list
/// of rows * clients numbers, or None)
class WindowRule {
 public:
  explicit WindowRule(const py::tuple& described)
      : op_{static_cast<Window>(described[0].cast<int>()),
            described[1].cast<int32_t>(),
            described[2].cast<int32_t>(),
            nullptr,
            nullptr,
            0} {
    if (!described[3].is_none()) mixing_ = described[3].cast<std::vector<double>>();
    if (op_.rows < 1 || op_.left_out < 0 || op_.left_out >= op_.rows ||
        (op_.window == Window::trimmed && 2 * op_.left_out >= op_.rows))
      throw py::value_error("sorted_mean: no value is left in the window");
    network_ = sorting_network(op_.rows, first_row(op_.window, op_.rows, op_.left_out),
                               last_row(op_.window, op_.rows, op_.left_out));
    op_.mixing = mixing_.empty() ? nullptr : mixing_.data();
    op_.network = network_.data();
    op_.comparators = static_cast<int64_t>(network_.size());
  }
  WindowRule(const WindowRule&) = delete;

  const SortedMean& operands() const { return op_; }
  size_t mixing_bytes() const { return mixing_.size() * sizeof(double); }

 private:
  SortedMean op_;
  std::vector<double> mixing_;
  std::vector<Comparator> network_;
};

/// (rule, learning rate, beta_1, beta_2, tau)
inline Optimizer optimizer_of(const py::tuple& described) {
  return {static_cast<Rule>(described[0].cast<int>()), described[1].cast<double>(), described[2].cast<double>(),
          described[3].cast<double>(), described[4].cast<double>()};
}

/// One tuple a leaf: (model, mean, first moment, second moment, out, code, count)
inline std::vector<ModelLeaf> model_leaves_of(const py::list& described) {
  std::vector<ModelLeaf> leaves;
  for (py::handle item : described) {
    const auto leaf = py::reinterpret_borrow<py::tuple>(item);
    leaves.push_back({pointer(leaf[0]), pointer(leaf[1]), pointer(leaf[2]), pointer(leaf[3]), pointer(leaf[4]),
                      static_cast<Code>(leaf[5].cast<int>()), leaf[6].cast<int64_t>()});
  }
  return leaves;
}

/// What `statistics` looks at beside the leaves, with the storage that it points into.
class Measurements {
 public:
  /// `described`: one tuple a leaf, (sources, their code, factor), `sources` as for `Leaves`; all lists of sources that
  /// are not empty have one length.
  explicit Measurements(const py::list& described) {
    for (py::handle leaf : described) {
      const auto tuple = py::reinterpret_borrow<py::tuple>(leaf);
      sources_.push_back(sources_of(tuple[0], tuple[1]));
      const auto& sources = sources_.back();
      measurements_.push_back({sources.data(), static_cast<int32_t>(sources.size()), tuple[2].cast<double>()});
      clients_ = std::max(clients_, static_cast<int64_t>(sources.size()));
    }
  }

  const Measurement* data() const { return measurements_.data(); }
  int64_t clients() const { return clients_; }

 private:
  std::vector<Measurement> measurements_;
  std::vector<std::vector<Source>> sources_;
  int64_t clients_ = 0;
};

/// The indices of the false entries.
inline std::vector<int64_t> indices_of_false(const bool* flags, int64_t count) {
  std::vector<int64_t> indices;
  for (int64_t i = 0; i < count; ++i)
    if (!flags[i]) indices.push_back(i);
  return indices;
}

}  // namespace fastagg::bindings

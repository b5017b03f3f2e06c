// _core: the CPU's operations for Python. Addresses come in as integers; python/fastagg/_arrays checks what they
// name.
#include <pybind11/numpy.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/dispatch.h"
#include "cpu/mapped_file.h"
#include "cpu/operations.h"
#include "cpu/probe.h"
#include "cpu/thread_pool.h"
#include "operands.h"
#include "shared_memory_group.h"
#include "tensor_addresses.h"

namespace fastagg::bindings {
namespace {

std::vector<int64_t> weighted_sum(const py::list& described) {
  const Leaves leaves(described);
  const auto finite = std::make_unique<bool[]>(leaves.size());
  {
    const ReleasedGil released;
    cpu::weighted_sum(leaves.data(), leaves.size(), finite.get());
  }
  return indices_of_false(finite.get(), leaves.size());
}

bool cast(const py::tuple& described) {
  const Cast operands = cast_of(described);
  const ReleasedGil released;
  return cpu::cast(operands);
}

std::pair<bool, double> reduce_float64(const std::vector<uintptr_t>& sources, double divisor, double factor,
                                       uintptr_t out, int64_t count) {
  std::vector<const double*> pointers;
  for (const uintptr_t source : sources) pointers.push_back(reinterpret_cast<const double*>(source));
  const ReleasedGil released;
  double squares = 0;
  const bool finite = cpu::reduce_float64(pointers.data(), static_cast<int32_t>(pointers.size()), count, divisor,
                                          factor, reinterpret_cast<double*>(out), &squares);
  return {finite, squares};
}

std::pair<bool, double> reduce(const py::tuple& described, bool norm) {
  RangeReduction range(described);
  const ReleasedGil released;
  double squares = 0;
  const bool finite = cpu::reduce(range.of_whole(), range.begin(), range.end(), norm ? &squares : nullptr);
  return {finite, squares};
}

void server_step(const py::tuple& optimizer, const py::list& leaves) {
  const Optimizer rule = optimizer_of(optimizer);
  const std::vector<ModelLeaf> operands = model_leaves_of(leaves);
  const ReleasedGil released;
  cpu::server_step(rule, operands.data(), static_cast<int64_t>(operands.size()));
}

std::vector<int64_t> sorted_mean(const py::tuple& rule, const py::list& described) {
  const WindowRule window(rule);
  const Leaves leaves(described);
  const auto finite = std::make_unique<bool[]>(leaves.size());
  {
    const ReleasedGil released;
    cpu::sorted_mean(window.operands(), leaves.data(), leaves.size(), finite.get());
  }
  return indices_of_false(finite.get(), leaves.size());
}

bool squared_distances(const py::list& described, int32_t clients, uintptr_t distances) {
  const Leaves leaves(described);
  const ReleasedGil released;
  return cpu::squared_distances(leaves.data(), leaves.size(), clients, reinterpret_cast<double*>(distances));
}

std::pair<std::vector<int64_t>, py::array_t<double>> statistics(const py::list& described, const py::list& measured) {
  const Leaves leaves(described);
  const Measurements measurements(measured);
  const auto finite = std::make_unique<bool[]>(leaves.size());
  std::vector<Moments> moments(leaves.size() * measurements.clients());
  std::vector<Moments*> of_leaves(leaves.size());
  for (int64_t leaf = 0; leaf < leaves.size(); ++leaf) of_leaves[leaf] = moments.data() + leaf * measurements.clients();
  {
    const ReleasedGil released;
    cpu::statistics(leaves.data(), measurements.data(), leaves.size(), finite.get(), of_leaves.data());
  }
  py::array_t<double> found({leaves.size(), measurements.clients(), int64_t{kMoments}});
  if (!moments.empty()) memcpy(found.mutable_data(), moments.data(), moments.size() * sizeof(Moments));
  return {indices_of_false(finite.get(), leaves.size()), found};
}

uint64_t stream_probe(const std::vector<uint64_t>& sources, int64_t source_bytes, uintptr_t out, int64_t out_bytes,
                      int64_t chunk_bytes) {
  if (source_bytes < 0 || out_bytes < 0 || chunk_bytes <= 0 || chunk_bytes % 64 != 0)
    throw py::value_error("stream_probe: bytes must not be negative, and chunk_bytes must be a multiple of 64");
  const cpu::Probe probe{sources.data(), static_cast<int64_t>(sources.size()),
                         source_bytes,   reinterpret_cast<uint8_t*>(out),
                         out_bytes,      chunk_bytes};
  const ReleasedGil released;
  return cpu::stream_probe(probe);
}

/// The addresses of the leading arrays that share the first one's dtype, of native byte order, and its shape,
/// C-contiguous and aligned.
py::list numpy_addresses(const py::list& arrays) {
  constexpr int layout = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  py::list addresses;
  py::handle dtype;
  const py::ssize_t* shape = nullptr;
  py::ssize_t dimensions = 0;
  for (py::handle item : arrays) {
    if (Py_TYPE(item.ptr()) != py::detail::npy_api::get().PyArray_Type_) break;  // a subclass may mean more
    const auto array = py::reinterpret_borrow<py::array>(item);
    if (shape == nullptr) {
      const char order = array.dtype().byteorder();
      if (order != '=' && order != '|') break;
      dtype = py::detail::array_proxy(array.ptr())->descr;
      shape = array.shape();
      dimensions = array.ndim();
    }
    const bool fits = py::detail::array_proxy(array.ptr())->descr == dtype.ptr() && array.ndim() == dimensions &&
                      std::equal(shape, shape + dimensions, array.shape()) && (array.flags() & layout) == layout;
    if (!fits) break;
    addresses.append(reinterpret_cast<uintptr_t>(array.data()));
  }
  return addresses;
}

/// Whether one of `outs`, spans of addresses, shares a byte with an input or with another of them. `inputs`: (first
/// addresses of arrays of one size, their bytes)
bool overlaps(const py::list& inputs, std::vector<std::pair<uintptr_t, uintptr_t>> outs) {
  outs.erase(std::remove_if(outs.begin(), outs.end(), [](const auto& out) { return out.first >= out.second; }),
             outs.end());
  std::sort(outs.begin(), outs.end());
  for (size_t i = 1; i < outs.size(); ++i)
    if (outs[i].first < outs[i - 1].second) return true;
  for (py::handle item : inputs) {
    const auto arrays = py::reinterpret_borrow<py::tuple>(item);
    const auto bytes = arrays[1].cast<uintptr_t>();
    if (bytes == 0) continue;
    for (py::handle address : py::reinterpret_borrow<py::list>(arrays[0])) {
      const auto begin = address.cast<uintptr_t>();
      // The first that begins behind this array: of those before, only the last can reach into it.
      const auto next = std::lower_bound(outs.begin(), outs.end(), std::pair<uintptr_t, uintptr_t>(begin + bytes, 0));
      if (next != outs.begin() && std::prev(next)->second > begin) return true;
    }
  }
  return false;
}

/// Asks for huge pages for a large block of memory that is about to be written first.
void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end > begin)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal is no error
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace
}  // namespace fastagg::bindings

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace fastagg;
  namespace py = pybind11;
  m.doc() = "fastagg's operations on the CPU.";
  m.attr("__version__") = FASTAGG_VERSION;
#if defined(__clang__)
  m.attr("__compiler__") = __VERSION__;
#else
  m.attr("__compiler__") = "GCC " __VERSION__;
#endif
  m.attr("MINIMUM_BLOCK") = 1 << kMinimumBlockShift;
  m.attr("MAXIMUM_BLOCK") = 1 << kMaximumBlockShift;
  m.attr("MEANS_RANK") = kMeansRank;
  m.attr("PASS") = kChunk;  // elements at whose multiples `reduce` may begin

  m.def("weighted_sum", &bindings::weighted_sum, py::arg("leaves"),
        "Weighted sums or maxima of leaves, in place; returns the indices of leaves with non-finite sums.");
  m.def("cast", &bindings::cast, py::arg("operands"),
        "Decodes a source and encodes it as another code; returns whether nothing became infinite or NaN.");
  m.def("reduce", &bindings::reduce, py::arg("operands"), py::arg("norm"),
        "Adds up encoded arrays, divides and encodes; returns whether the result is finite, and its sum of squares.");
  m.def("reduce_float64", &bindings::reduce_float64, py::arg("sources"), py::arg("divisor"), py::arg("factor"),
        py::arg("out"), py::arg("count"),
        "Adds up arrays of float64, divides and multiplies; returns whether the result is finite, and its sum of "
        "squares.");
  m.def("server_step", &bindings::server_step, py::arg("optimizer"), py::arg("leaves"),
        "A server optimiser's step of leaves, their moments in place.");
  m.def("sorted_mean", &bindings::sorted_mean, py::arg("rule"), py::arg("leaves"),
        "Means of windows of the clients' sorted values; returns the indices of leaves with non-finite values.");
  m.def(
      "squared_distances", &bindings::squared_distances, py::arg("leaves"), py::arg("clients"), py::arg("distances"),
      "Squared distances of all pairs of clients, over all leaves, as a matrix of float64; returns whether all values "
      "are finite.");
  m.def("statistics", &bindings::statistics, py::arg("leaves"), py::arg("measured"),
        "Weighted sums, and moments of the clients (leaves, clients, numbers); returns the indices of leaves with "
        "non-finite sums first.");
  m.def("numpy_addresses", &bindings::numpy_addresses, py::arg("arrays"),
        "Addresses of the leading NumPy arrays that share the first one's dtype, shape and C layout.");
  m.def("tensor_addresses", &bindings::tensor_addresses, py::arg("exchange"), py::arg("types"), py::arg("is_negative"),
        py::arg("tensors"),
        "Addresses of the leading tensors that are of one of these types and share the first one's dtype, device and "
        "shape, contiguous and not negative views; `exchange` is their library's table for DLPack.");
  m.def(
      "numpy_address", [](const py::array& array) { return reinterpret_cast<uintptr_t>(array.data()); },
      py::arg("array"), "Address of a NumPy array's first element.");
  m.def("overlaps", &bindings::overlaps, py::arg("inputs"), py::arg("outs"),
        "Whether one of the outs, (first address, the one behind the last byte), shares a byte with an input or with "
        "another; inputs are (first addresses, bytes of each).");
  m.def("advise_huge_pages", &bindings::advise_huge_pages, py::arg("address"), py::arg("bytes"),
        "Asks for huge pages for memory that is about to be written first.");

  m.def("stream_probe", &bindings::stream_probe, py::arg("sources"), py::arg("source_bytes"), py::arg("out"),
        py::arg("out_bytes"), py::arg("chunk_bytes"),
        "Reads the sources side by side and overwrites `out`, without arithmetic: the benchmark's limit.");

  py::class_<MappedFileGuard>(m, "MappedFileGuard",
                              "While it lives, to read where a mapped file was cut off gives NaN, and no SIGBUS.")
      .def(py::init([](uintptr_t address, uint64_t bytes) {
             return std::make_unique<MappedFileGuard>(reinterpret_cast<const void*>(address), bytes);
           }),
           py::arg("address"), py::arg("bytes"), "Watches over memory that is a mapped file.")
      .def("was_cut", &MappedFileGuard::was_cut, "Whether anything behind the file's end has been read.");
  bindings::define_shared_memory(m);

  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("available_isas", &available_isas, "Instruction sets of this build that the processor has, best first.");
  m.def("force_isa", &force_isa, py::arg("name"), "Uses one instruction set from now on.");
  m.def("get_num_threads", &get_num_threads, "Threads that an operation uses.");
  m.def(
      "set_num_threads",
      [](int count) {
        if (count < 0)
          throw py::value_error("the number of threads must be 1 or more (0: the default), got " +
                                std::to_string(count));
        set_num_threads(count);
      },
      py::arg("count"), "Sets the threads that an operation uses; 0 restores the default.");
  m.def("available_processors", &available_processors, "Processors that this process may run on.");
}

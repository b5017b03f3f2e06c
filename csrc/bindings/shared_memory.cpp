// The same-host transport for Python.
#include "comm/shared_memory.h"

#include "operands.h"
#include "shared_memory_group.h"

namespace fastagg::bindings {
namespace {

using comm::SharedMemory;

[[noreturn]] void raise_peer_error(const comm::PeerLost& lost) {
  const py::object type = py::module_::import("fastagg._errors").attr("PeerError");
  const py::object error = type(lost.rank, lost.what());
  PyErr_SetObject(type.ptr(), error.ptr());
  throw py::error_already_set();
}

std::shared_ptr<comm::Segment> share(comm::Segment segment) {
  return std::make_shared<comm::Segment>(std::move(segment));
}

/// One rank's end of a group.
class SharedMemoryGroup {
 public:
  SharedMemoryGroup(std::shared_ptr<comm::Segment> segment, const std::vector<pid_t>& processes,
                    const std::vector<int>& names, int rank)
      : transport_(std::move(segment), processes, names, rank) {}

  std::pair<bool, int64_t> all_reduce(uintptr_t data, int code, int64_t count, int wire, int block_shift,
                                      bool stochastic, const std::tuple<uint64_t, uint32_t, uint32_t, uint32_t>& key,
                                      bool mean, double timeout) {
    const auto [seed, step, tensor, rank] = key;
    const comm::AllReduce operation{reinterpret_cast<void*>(data),
                                    static_cast<Code>(code),
                                    count,
                                    static_cast<Code>(wire),
                                    static_cast<uint8_t>(block_shift),
                                    stochastic ? Rounding::stochastic : Rounding::nearest,
                                    {seed, step, tensor, rank},
                                    mean};
    const auto wait = std::chrono::nanoseconds(static_cast<int64_t>(timeout * 1e9));
    try {
      const py::gil_scoped_release release;
      const comm::Outcome outcome = transport_.all_reduce(operation, wait);
      return {outcome.finite, outcome.wire_bytes};
    } catch (const comm::PeerLost& lost) {
      raise_peer_error(lost);
    } catch (const comm::Mismatch& mismatch) {
      throw py::value_error(mismatch.what());
    }
  }

  int descriptor() const { return transport_.segment().descriptor(); }
  void close_descriptor() { transport_.segment().close_descriptor(); }

 private:
  mutable SharedMemory transport_;
};

}  // namespace

void define_shared_memory(py::module_& m) {
  using Names = std::vector<int>;
  py::class_<SharedMemoryGroup>(m, "SharedMemoryGroup", "One rank's end of a group of processes on one host.")
      .def(py::init([](const Names& processes, const Names& names, int rank) {
             return std::make_unique<SharedMemoryGroup>(share(comm::Segment::create(SharedMemory::bytes(names.size()))),
                                                        processes, names, rank);
           }),
           py::arg("processes"), py::arg("names"), py::arg("rank"), "Creates the group's segment.")
      .def_static(
          "attach",
          [](const Names& processes, const Names& names, int rank, int creator, int descriptor) {
            return std::make_unique<SharedMemoryGroup>(
                share(comm::Segment::attach(creator, descriptor, SharedMemory::bytes(names.size()))), processes, names,
                rank);
          },
          py::arg("processes"), py::arg("names"), py::arg("rank"), py::arg("creator"), py::arg("descriptor"),
          "Attaches to the segment that another process has created.")
      .def("descriptor", &SharedMemoryGroup::descriptor, "The segment's descriptor, or -1.")
      .def("close_descriptor", &SharedMemoryGroup::close_descriptor, "For when all have attached.")
      .def("all_reduce", &SharedMemoryGroup::all_reduce, py::arg("data"), py::arg("code"), py::arg("count"),
           py::arg("wire"), py::arg("block_shift"), py::arg("stochastic"), py::arg("key"), py::arg("mean"),
           py::arg("timeout"),
           "Sums or averages in place; returns whether the result is finite, and the bytes handed to others.");
}

}  // namespace fastagg::bindings

// The same-host transport for Python.
#include "comm/shared_memory.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <system_error>

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

/// Whether a signal's handler wants to leave; it has run, and left its exception, in the main thread alone.
bool is_interrupted() {
  if (static_cast<pid_t>(syscall(SYS_gettid)) != getpid()) return false;
  const py::gil_scoped_acquire acquire;
  return PyErr_CheckSignals() != 0;
}

/// Does what may wait for others, without the GIL.
template <typename Call>
auto waiting(double timeout, const Call& call) {
  const auto wait = std::chrono::nanoseconds(static_cast<int64_t>(timeout * 1e9));
  try {
    const ReleasedGil released;
    return call(comm::Patience{wait, is_interrupted});
  } catch (const comm::PeerLost& lost) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();  // the signal's
    raise_peer_error(lost);
  } catch (const comm::Mismatch& mismatch) {
    throw py::value_error(mismatch.what());
  }
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

  using Phase = comm::Outcome (SharedMemory::*)(const comm::Exchange&, const comm::Patience&);

  template <Phase phase>
  std::tuple<bool, int64_t, double> exchange(const py::tuple& described, double timeout) {
    std::vector<Stretch> stretches;
    const comm::Exchange exchange{exchange_of(described, stretches), described[15].cast<std::string>()};
    const comm::Outcome outcome =
        waiting(timeout, [&](const comm::Patience& patience) { return (transport_.*phase)(exchange, patience); });
    return {outcome.finite, outcome.wire_bytes, outcome.squares};
  }

  void broadcast(uintptr_t data, int64_t bytes, int root, const std::string& description, double timeout) {
    waiting(timeout, [&](const comm::Patience& patience) {
      transport_.broadcast(reinterpret_cast<void*>(data), bytes, root, description, patience);
    });
  }

  void interrupt() { transport_.interrupt(); }
  int descriptor() const { return transport_.segment().descriptor(); }
  int tell_lost(int name) { return transport_.tell_lost(name); }
  void close_descriptor() { transport_.segment().close_descriptor(); }

 private:
  mutable SharedMemory transport_;
};

}  // namespace

void define_shared_memory(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });
  m.attr("DESCRIPTION_BYTES") = comm::kDescriptionBytes;
  using Names = std::vector<int>;
  py::class_<comm::Peers>(m, "Peers", "The processes of a group's ranks, watched whatever they do.")
      .def(py::init<const Names&, Names, int>(), py::arg("processes"), py::arg("names"), py::arg("rank"))
      .def("ended", &comm::Peers::ended, "The rank of a process that has ended, or -1.");
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
      .def("all_reduce", &SharedMemoryGroup::exchange<&SharedMemory::all_reduce>, py::arg("operands"),
           py::arg("timeout"),
           "Sums or averages in place; returns whether the result is finite, the bytes handed to others, and the sum "
           "of its squares.")
      .def("reduce_scatter", &SharedMemoryGroup::exchange<&SharedMemory::reduce_scatter>, py::arg("operands"),
           py::arg("timeout"), "The same for this rank's slice alone.")
      .def("all_gather", &SharedMemoryGroup::exchange<&SharedMemory::all_gather>, py::arg("operands"),
           py::arg("timeout"), "Copies each rank's slice to all ranks.")
      .def("broadcast", &SharedMemoryGroup::broadcast, py::arg("data"), py::arg("bytes"), py::arg("root"),
           py::arg("description"), py::arg("timeout"), "Copies a rank's bytes, at an address, to all ranks.")
      .def("interrupt", &SharedMemoryGroup::interrupt, "Ends the wait of another thread, and every later one.")
      .def("tell_lost", &SharedMemoryGroup::tell_lost, py::arg("name"),
           "All ranks will raise PeerError for this one, or for the returned one, of which they were told before.");
  m.def(
      "slice_of",
      [](int64_t count, int rank, int ranks) {
        const Slice slice = slice_of(count, rank, ranks);
        return std::pair(slice.begin, slice.end);
      },
      py::arg("count"), py::arg("rank"), py::arg("ranks"), "The elements that a rank owns: [begin, end).");
  m.def("in_one_shot", &in_one_shot, py::arg("count"), py::arg("ranks"),
        "Whether every rank reduces everything itself.");
}

}  // namespace fastagg::bindings

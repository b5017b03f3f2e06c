// _cuda: the operations on CUDA devices for Python, on the caller's stream. Imports without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "core/squared_distances.h"
#include "cuda/leaf_table.h"
#include "device.h"
#include "operands.h"
#include "peer_memory.h"

namespace fastagg::bindings {
namespace {

cudaStream_t stream_at(uintptr_t address) { return reinterpret_cast<cudaStream_t>(address); }

/// A table of leaves in their device's memory, with room for more behind it.
class DeviceLeaves {
 public:
  DeviceLeaves(const cuda::LeafTableBuilder& builder, cudaStream_t stream, size_t more = 0)
      : builder_(builder),
        table_bytes_((builder.bytes() + 7) / 8 * 8),
        device_(builder.any_data()),
        buffer_(table_bytes_ + more, device_.device(), stream),
        stream_(stream) {
    const std::vector<char> bytes = builder.bytes_for(buffer_.data(), &table_);
    check_status(cuda::upload(bytes.data(), buffer_.data(), static_cast<int64_t>(bytes.size()), stream),
                 "copying the table of leaves");
  }

  const cuda::LeafTable& table() const { return table_; }
  char* more() const { return buffer_.data() + table_bytes_; }

  /// The leaves whose flags are raised, once the stream has come here.
  std::vector<int64_t> flagged() const {
    std::vector<int64_t> indices;
    const auto flags = read<int32_t>(buffer_.data(), builder_.size(), stream_);
    for (int64_t i = 0; i < builder_.size(); ++i)
      if (flags[i] != 0) indices.push_back(builder_.index_of(i));
    return indices;
  }

 private:
  const cuda::LeafTableBuilder& builder_;
  size_t table_bytes_;
  DeviceOf device_;
  StreamBuffer buffer_;
  cudaStream_t stream_;
  cuda::LeafTable table_{};
};

std::vector<int64_t> weighted_sum(const py::list& described, uintptr_t stream_address, bool check) {
  const Leaves leaves(described);
  const cudaStream_t stream = stream_at(stream_address);
  const ReleasedGil released;
  const cuda::LeafTableBuilder builder(leaves.data(), leaves.size());
  if (builder.size() == 0) return {};
  if (check) check_waiting(stream, "looking for non-finite values (any nan_policy but \"propagate\")");
  const DeviceLeaves device(builder, stream);
  check_status(cuda::weighted_sum(device.table(), stream), "weighted_sum");
  return check ? device.flagged() : std::vector<int64_t>{};
}

std::vector<int64_t> sorted_mean(const py::tuple& rule, const py::list& described, uintptr_t stream_address) {
  const WindowRule window(rule);
  const Leaves leaves(described);
  const cudaStream_t stream = stream_at(stream_address);
  const ReleasedGil released;
  const cuda::LeafTableBuilder builder(leaves.data(), leaves.size());
  if (builder.size() == 0) return {};
  SortedMean op = window.operands();
  const int64_t rows = scratch_rows(op, *leaves.data());
  if (rows > cuda::kMaximumRows)
    throw py::value_error("expected at most " + std::to_string(cuda::kMaximumRows) +
                          " clients, mixtures included, on a device, got " + std::to_string(rows));
  check_waiting(stream, "looking for non-finite values");
  const size_t network_bytes = op.comparators * sizeof(Comparator), mixing_bytes = window.mixing_bytes();
  const DeviceLeaves device(builder, stream, network_bytes + mixing_bytes);
  const auto place = [&](const void* from, size_t bytes, char* to) {
    check_status(cuda::upload(from, to, static_cast<int64_t>(bytes), stream), "copying the rule");
    return static_cast<void*>(to);
  };
  op.network = static_cast<Comparator*>(place(op.network, network_bytes, device.more()));
  if (op.mixing != nullptr)
    op.mixing = static_cast<double*>(place(op.mixing, mixing_bytes, device.more() + network_bytes));
  check_status(cuda::sorted_mean(op, device.table(), stream), "sorted_mean");
  return device.flagged();
}

bool squared_distances(const py::list& described, int32_t clients, uintptr_t distances, uintptr_t stream_address) {
  const Leaves leaves(described);
  const cudaStream_t stream = stream_at(stream_address);
  const ReleasedGil released;
  const size_t entries = static_cast<size_t>(clients) * clients;
  const cuda::LeafTableBuilder builder(leaves.data(), leaves.size());
  std::fill_n(reinterpret_cast<double*>(distances), entries, 0.0);
  if (builder.size() == 0) return true;
  if (clients > cuda::kMaximumClients)
    throw py::value_error("expected at most " + std::to_string(cuda::kMaximumClients) +
                          " points, a reference included, on a device, got " + std::to_string(clients));
  check_waiting(stream, "reading the distances");
  const int64_t parts = distance_parts(builder.tasks(), clients);
  const DeviceLeaves device(builder, stream, (parts + 1) * entries * sizeof(double));
  check_status(cudaMemsetAsync(device.more(), 0, (parts + 1) * entries * sizeof(double), stream), "clearing the sums");
  auto* const sums = reinterpret_cast<double*>(device.more());
  const cuda::Distances op{clients, parts, sums, sums + parts * entries};
  check_status(cuda::squared_distances(op, device.table(), stream), "squared_distances");
  const auto found = read<double>(reinterpret_cast<const char*>(op.distances), static_cast<int64_t>(entries), stream);
  std::copy(found.begin(), found.end(), reinterpret_cast<double*>(distances));
  return device.flagged().empty();
}

void cast(const py::tuple& described, uintptr_t stream, uintptr_t nonfinite) {
  const Cast operands = cast_of(described);
  if (operands.count == 0) return;
  const ReleasedGil released;
  const DeviceOf device(operands.source.data);
  check_status(cuda::cast(operands, reinterpret_cast<int32_t*>(nonfinite), stream_at(stream)), "cast");
}

void server_step(const py::tuple& optimizer, const py::list& leaves, uintptr_t stream_address) {
  const Optimizer rule = optimizer_of(optimizer);
  const std::vector<ModelLeaf> operands = model_leaves_of(leaves);
  const cudaStream_t stream = stream_at(stream_address);
  const ReleasedGil released;
  cuda::StepTable table{};
  const auto entries = cuda::step_leaves_of(operands.data(), static_cast<int64_t>(operands.size()), &table.tasks);
  if (entries.empty()) return;
  const DeviceOf device(entries[0].leaf.out);
  const size_t bytes = entries.size() * sizeof(cuda::StepLeaf);
  const StreamBuffer buffer(bytes, device.device(), stream);
  check_status(cuda::upload(entries.data(), buffer.data(), static_cast<int64_t>(bytes), stream),
               "copying the table of leaves");
  table.leaves = reinterpret_cast<const cuda::StepLeaf*>(buffer.data());
  table.count = static_cast<int64_t>(entries.size());
  check_status(cuda::server_step(rule, table, stream), "server_step");
}

/// Lets `stretches` point to a copy in device memory, which lasts as long as what is returned.
template <class Operands>
std::unique_ptr<StreamBuffer> upload_stretches(Operands& op, const DeviceOf& device, cudaStream_t stream) {
  if (op.rounding == Rounding::nearest) op.stretch_count = 0;  // they would not be read
  if (op.stretch_count == 0) return nullptr;
  const auto bytes = op.stretch_count * static_cast<int64_t>(sizeof(Stretch));
  auto buffer = std::make_unique<StreamBuffer>(bytes, device.device(), stream);
  check_status(cuda::upload(op.stretches, buffer->data(), bytes, stream), "copying the stretches");
  op.stretches = reinterpret_cast<const Stretch*>(buffer->data());
  return buffer;
}

void reduce(const py::tuple& described, uintptr_t stream_address, uintptr_t nonfinite, uintptr_t squares) {
  RangeReduction range(described);
  Reduction reduction = range.of_part();
  Cast& result = reduction.result;
  if (result.count == 0) return;
  const cudaStream_t stream = stream_at(stream_address);
  const ReleasedGil released;
  const DeviceOf device(reduction.sources[0].data);
  const auto buffer = upload_stretches(result, device, stream);
  check_status(
      cuda::reduce(reduction, reinterpret_cast<int32_t*>(nonfinite), reinterpret_cast<double*>(squares), stream),
      "reduce");
}

void reduce_float64(const std::vector<uintptr_t>& sources, double divisor, double factor, uintptr_t out, int64_t count,
                    uintptr_t stream, uintptr_t nonfinite, uintptr_t squares) {
  if (count == 0) return;
  cuda::Reduction64 reduction{{},    static_cast<int32_t>(sources.size()), divisor, factor,
                              count, reinterpret_cast<double*>(out)};
  if (sources.size() > cuda::kMaximumRanks) throw py::value_error("more ranks than one reduction adds up");
  for (size_t rank = 0; rank < sources.size(); ++rank)
    reduction.sources[rank] = reinterpret_cast<const double*>(sources[rank]);
  const ReleasedGil released;
  const DeviceOf device(reduction.out);
  check_status(cuda::reduce_float64(reduction, reinterpret_cast<int32_t*>(nonfinite),
                                    reinterpret_cast<double*>(squares), stream_at(stream)),
               "reduce_float64");
}

/// `peers`: (rank, every rank's memory, bytes of a slot, blocks of threads, timeout in seconds, where who is lost
/// stands)
void all_reduce(const py::tuple& described, const py::tuple& peers, uint32_t description, uintptr_t stream_address,
                uintptr_t nonfinite, uintptr_t squares) {
  std::vector<Stretch> stretches;
  const auto memory = peers[1].cast<std::vector<uintptr_t>>();
  cuda::PeerExchange exchange{};
  exchange.exchange = exchange_of(described, stretches);
  exchange.rank = peers[0].cast<int32_t>();
  exchange.ranks = static_cast<int32_t>(memory.size());
  if (memory.size() > cuda::kMaximumRanks) throw py::value_error("more ranks than can share memory");
  for (size_t rank = 0; rank < memory.size(); ++rank) exchange.memory[rank] = reinterpret_cast<char*>(memory[rank]);
  exchange.slot_bytes = peers[2].cast<int64_t>();
  exchange.blocks = peers[3].cast<int32_t>();
  exchange.description = description;
  exchange.timeout = static_cast<int64_t>(peers[4].cast<double>() * 1e9);
  exchange.lost = pointer<uint32_t>(peers[5]);
  exchange.nonfinite = reinterpret_cast<int32_t*>(nonfinite);
  exchange.squares = reinterpret_cast<double*>(squares);
  Exchange& op = exchange.exchange;
  if (op.count == 0) return;
  const cudaStream_t stream = stream_at(stream_address);
  const ReleasedGil released;
  const DeviceOf device(op.data);
  const auto buffer = upload_stretches(op, device, stream);
  check_status(cuda::all_reduce(exchange, stream), "all_reduce");
}

/// Blocks of threads of an all-reduce on a device: few, so that what computes has room beside those that wait.
int peer_blocks(int device) {
  int processors = 0;
  check_status(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
               "asking for a device's multiprocessors");
  return std::min(processors, cuda::kPeerBlocks);
}

/// CUDA's version that the driver serves, as 1000 * major + 10 * minor; 0 without a driver.
int driver_version() {
  int version = 0;
  check_status(cudaDriverGetVersion(&version), "asking for the driver's version");
  return version;
}

int runtime_version() {
  int version = 0;
  check_status(cudaRuntimeGetVersion(&version), "asking for the runtime's version");
  return version;
}

/// The devices that can be used: none without a driver, or with one that is too old.
int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace
}  // namespace fastagg::bindings

PYBIND11_MODULE(FASTAGG_CUDA_MODULE, m, pybind11::mod_gil_not_used()) {
  using namespace fastagg;
  namespace py = pybind11;
  m.doc() = "fastagg's operations on CUDA devices.";
  py::register_local_exception_translator(&bindings::raise_cuda_error);

  m.def("weighted_sum", &bindings::weighted_sum, py::arg("leaves"), py::arg("stream"), py::arg("check"),
        "Weighted sums or maxima of leaves on a stream; with check, waits and returns the indices of leaves with "
        "non-finite sums.");
  // Below: `nonfinite` is an int32 on the device that is raised, `squares` MAXIMUM_BLOCKS float64 that are added to; 0
  // for neither.
  m.def("cast", &bindings::cast, py::arg("operands"), py::arg("stream"), py::arg("nonfinite"),
        "Decodes a source and encodes it as another code on a stream.");
  m.def("reduce", &bindings::reduce, py::arg("operands"), py::arg("stream"), py::arg("nonfinite"), py::arg("squares"),
        "Adds up encoded arrays, divides and encodes on a stream.");
  m.def("reduce_float64", &bindings::reduce_float64, py::arg("sources"), py::arg("divisor"), py::arg("factor"),
        py::arg("out"), py::arg("count"), py::arg("stream"), py::arg("nonfinite"), py::arg("squares"),
        "Adds up float64 arrays on a stream: sum / divisor * factor.");
  m.def("server_step", &bindings::server_step, py::arg("optimizer"), py::arg("leaves"), py::arg("stream"),
        "A server optimiser's step of leaves on a stream, their moments in place.");
  m.def("sorted_mean", &bindings::sorted_mean, py::arg("rule"), py::arg("leaves"), py::arg("stream"),
        "Means of windows of the clients' sorted values on a stream; waits and returns the indices of leaves with "
        "non-finite values.");
  m.def("squared_distances", &bindings::squared_distances, py::arg("leaves"), py::arg("clients"), py::arg("distances"),
        py::arg("stream"),
        "Squared distances of all pairs of clients, over all leaves, on a stream; waits, writes them to the host's "
        "memory "
        "as a matrix of float64 and returns whether all values are finite.");
  m.def("all_reduce", &bindings::all_reduce, py::arg("exchange"), py::arg("peers"), py::arg("description"),
        py::arg("stream"), py::arg("nonfinite"), py::arg("squares"),
        "Reduces over ranks whose devices reach each other's memory; `description` is the same on all.");
  bindings::define_peer_memory(m);
  m.attr("MAXIMUM_BLOCKS") = cuda::kMaximumBlocks;
  m.attr("MAXIMUM_RANKS") = cuda::kMaximumRanks;
  m.def("peer_blocks", &bindings::peer_blocks, py::arg("device"), "Blocks of threads of an all-reduce on a device.");
  m.def("driver_version", &bindings::driver_version, "CUDA's version that the driver serves; 0 without a driver.");
  m.def("runtime_version", &bindings::runtime_version, "CUDA's version that this module was built with.");
  m.def("device_count", &bindings::device_count, "CUDA devices that can be used; 0 without a driver.");
}

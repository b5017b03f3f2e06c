// _cuda: the operations on CUDA devices for Python, on the caller's stream. Imports without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <limits>
#include <map>
#include <mutex>

#include "cuda/leaf_table.h"
#include "operands.h"

namespace fastagg::bindings {
namespace {

struct CudaError : std::runtime_error { using std::runtime_error::runtime_error; };

/// Throws what a call of the runtime returned, unless it is success.
void check_status(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw CudaError(std::string(doing) + ": " + cudaGetErrorString(status));
}

/// Turns a CudaError into fastagg.CudaError.
void raise_cuda_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const CudaError& refused) {
    py::set_error(py::module_::import("fastagg._errors").attr("CudaError"), refused.what());
  }
}

/// Makes the device that owns `data` current for a scope.
class DeviceOf {
 public:
  explicit DeviceOf(const void* data) {
    cudaPointerAttributes attributes{};
    check_status(cudaPointerGetAttributes(&attributes, data), "asking for an array's device");
    if (attributes.type == cudaMemoryTypeUnregistered) throw CudaError("an array is not in a CUDA device's memory");
    check_status(cudaGetDevice(&previous_), "asking for the current device");
    device_ = attributes.device;
    if (device_ != previous_) check_status(cudaSetDevice(device_), "changing the device");
  }
  ~DeviceOf() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceOf(const DeviceOf&) = delete;
  DeviceOf& operator=(const DeviceOf&) = delete;

  int device() const { return device_; }

 private:
  int previous_ = 0, device_ = 0;
};

/// Our own pool of a device's memory, made at first use. It keeps what it has got: the default pool would hand memory
/// back at every synchronisation, and others' settings of that one are not ours to change.
cudaMemPool_t pool_of(int device) {
  static std::mutex mutex;
  static std::map<int, cudaMemPool_t> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = pools.find(device); found != pools.end()) return found->second;
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location = {cudaMemLocationTypeDevice, device};
  cudaMemPool_t pool = nullptr;
  check_status(cudaMemPoolCreate(&pool, &properties), "creating a memory pool");
  uint64_t keep = std::numeric_limits<uint64_t>::max();
  check_status(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "setting up a memory pool");
  return pools[device] = pool;
}

/// Device memory in a stream's order, freed when the stream has passed the scope's end.
class StreamBuffer {
 public:
  StreamBuffer(size_t bytes, int device, cudaStream_t stream) : stream_(stream) {
    void* data = nullptr;
    check_status(cudaMallocFromPoolAsync(&data, bytes, pool_of(device), stream), "allocating device memory");
    data_ = static_cast<char*>(data);
  }
  ~StreamBuffer() { cudaFreeAsync(data_, stream_); }
  StreamBuffer(const StreamBuffer&) = delete;
  StreamBuffer& operator=(const StreamBuffer&) = delete;

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  cudaStream_t stream_;
};

/// What lies on the device once the stream has come here.
template <class T>
std::vector<T> read(const char* from, int64_t count, cudaStream_t stream) {
  std::vector<T> values(count);
  check_status(cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream),
               "reading what was found");
  check_status(cudaStreamSynchronize(stream), "waiting for the stream");
  return values;
}

std::vector<int64_t> weighted_sum(const py::list& described, uintptr_t stream_address, bool check) {
  const Leaves leaves(described);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const py::gil_scoped_release release;
  const cuda::LeafTableBuilder builder(leaves.data(), leaves.size());
  if (builder.size() == 0) return {};
  const DeviceOf device(builder.any_data());
  const StreamBuffer buffer(builder.bytes(), device.device(), stream);
  cuda::LeafTable table;
  const std::vector<char> bytes = builder.bytes_for(buffer.data(), &table);
  // From pageable memory: the runtime has staged all of it when the call returns, so that `bytes` may go.
  check_status(cudaMemcpyAsync(buffer.data(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream),
               "copying the table of leaves");
  check_status(cuda::weighted_sum(table, stream), "weighted_sum");
  std::vector<int64_t> nonfinite;
  if (!check) return nonfinite;
  const auto flags = read<int32_t>(buffer.data(), builder.size(), stream);
  for (int64_t i = 0; i < builder.size(); ++i)
    if (flags[i] != 0) nonfinite.push_back(builder.index_of(i));
  return nonfinite;
}

bool cast(const py::tuple& described, uintptr_t stream_address, bool check) {
  const Cast operands = cast_of(described);
  if (operands.count == 0) return true;
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const py::gil_scoped_release release;
  const DeviceOf device(operands.source.data);
  if (!check) {
    check_status(cuda::cast(operands, nullptr, stream), "cast");
    return true;
  }
  const StreamBuffer flag(sizeof(int32_t), device.device(), stream);
  check_status(cudaMemsetAsync(flag.data(), 0, sizeof(int32_t), stream), "clearing the non-finite flag");
  check_status(cuda::cast(operands, reinterpret_cast<int32_t*>(flag.data()), stream), "cast");
  return read<int32_t>(flag.data(), 1, stream)[0] == 0;
}

std::pair<bool, double> reduce(const py::tuple& described, uintptr_t stream_address, bool norm, bool check) {
  RangeReduction range(described);
  Reduction reduction = range.of_part();
  Cast& result = reduction.result;
  if (result.count == 0) return {true, 0};
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const py::gil_scoped_release release;
  const DeviceOf device(reduction.sources[0].data);
  if (result.rounding == Rounding::nearest) result.stretch_count = 0;  // they would not be read
  // The stretches, the sums of squares, the flag.
  const size_t squares_at = result.stretch_count * sizeof(Stretch);
  const size_t flag_at = squares_at + (norm ? cuda::kMaximumBlocks * sizeof(double) : 0);
  const StreamBuffer buffer(flag_at + sizeof(int32_t), device.device(), stream);
  check_status(cudaMemcpyAsync(buffer.data(), result.stretches, squares_at, cudaMemcpyHostToDevice, stream),
               "copying the stretches");
  check_status(cudaMemsetAsync(buffer.data() + squares_at, 0, flag_at + sizeof(int32_t) - squares_at, stream),
               "clearing what will be found");
  result.stretches = reinterpret_cast<const Stretch*>(buffer.data());
  auto* squares = norm ? reinterpret_cast<double*>(buffer.data() + squares_at) : nullptr;
  check_status(cuda::reduce(reduction, reinterpret_cast<int32_t*>(buffer.data() + flag_at), squares, stream), "reduce");
  if (!norm && !check) return {true, 0};
  const auto found = read<char>(buffer.data() + squares_at, flag_at + sizeof(int32_t) - squares_at, stream);
  double sum = 0;
  for (size_t at = 0; at < flag_at - squares_at; at += sizeof(double)) {
    double part;
    memcpy(&part, found.data() + at, sizeof part);
    sum += part;
  }
  int32_t nonfinite;
  memcpy(&nonfinite, found.data() + flag_at - squares_at, sizeof nonfinite);
  return {nonfinite == 0, sum};
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
  m.def("cast", &bindings::cast, py::arg("operands"), py::arg("stream"), py::arg("check"),
        "Decodes a source and encodes it as another code on a stream; with check, waits and returns whether nothing "
        "became infinite or NaN.");
  m.def("reduce", &bindings::reduce, py::arg("operands"), py::arg("stream"), py::arg("norm"), py::arg("check"),
        "Adds up encoded arrays, divides and encodes on a stream; with norm or check, waits and returns whether the "
        "result is finite, and its sum of squares.");
  m.def("driver_version", &bindings::driver_version, "CUDA's version that the driver serves; 0 without a driver.");
  m.def("runtime_version", &bindings::runtime_version, "CUDA's version that this module was built with.");
  m.def("device_count", &bindings::device_count, "CUDA devices that can be used; 0 without a driver.");
}

// _cuda: the operations on CUDA devices for Python, on the caller's stream. Imports without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

/// Flags from the start of a device buffer, after everything before them in the stream.
std::vector<int32_t> read_flags(const StreamBuffer& buffer, int64_t count, cudaStream_t stream) {
  std::vector<int32_t> flags(count);
  check_status(cudaMemcpyAsync(flags.data(), buffer.data(), count * sizeof(int32_t), cudaMemcpyDeviceToHost, stream),
               "reading the non-finite flags");
  check_status(cudaStreamSynchronize(stream), "waiting for the stream");
  return flags;
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
  const std::vector<int32_t> flags = read_flags(buffer, builder.size(), stream);
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
  return read_flags(flag, 1, stream)[0] == 0;
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
  m.def("driver_version", &bindings::driver_version, "CUDA's version that the driver serves; 0 without a driver.");
  m.def("runtime_version", &bindings::runtime_version, "CUDA's version that this module was built with.");
  m.def("device_count", &bindings::device_count, "CUDA devices that can be used; 0 without a driver.");
}

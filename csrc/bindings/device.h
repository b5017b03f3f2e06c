// Devices, their memory and their errors, for the bindings of _cuda.
#pragma once
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/operations.h"

namespace fastagg::bindings {

namespace py = pybind11;

struct CudaError : std::runtime_error { using std::runtime_error::runtime_error; };

/// What would mend an error, where that is known.
inline std::string remedy_for(cudaError_t status) {
  const auto version = [](int number) {
    return std::to_string(number / 1000) + '.' + std::to_string(number % 100 / 10);
  };
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
    return " (this build has code for the architectures " FASTAGG_CUDA_ARCHITECTURES
           "; build it with -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native)";
  if (status != cudaErrorInsufficientDriver) return "";
  int driver = 0;
  cudaDriverGetVersion(&driver);
  return " (this build needs a driver of CUDA " + version(CUDART_VERSION) +
         (driver == 0 ? ", and there is none)" : ", and the one here serves " + version(driver) + ")");
}

/// Throws what a call of the runtime returned, unless it is success. Nobody else is told of it again.
inline void check_status(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError(std::string(doing) + ": " + cudaGetErrorString(status) + remedy_for(status));
}

/// Turns a CudaError into fastagg.CudaError.
inline void raise_cuda_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const CudaError& refused) {
    py::set_error(py::module_::import("fastagg._errors").attr("CudaError"), refused.what());
  }
}

/// Makes a device current for a scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check_status(cudaGetDevice(&previous_), "asking for the current device");
    changed_ = device != previous_;
    if (changed_) check_status(cudaSetDevice(device), "changing the device");
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

/// The device that owns `data`.
inline int device_of(const void* data) {
  cudaPointerAttributes attributes{};
  check_status(cudaPointerGetAttributes(&attributes, data), "asking for an array's device");
  if (attributes.type == cudaMemoryTypeUnregistered) throw CudaError("an array is not in a CUDA device's memory");
  return attributes.device;
}

/// Lets this thread do, while some stream is captured, what is no part of the capture.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// Makes the device that owns `data` current for a scope, in which kernels may be loaded: the runtime does so when one
/// is first started, and a capture would forbid it.
class DeviceOf {
 public:
  explicit DeviceOf(const void* data) : device_(device_of(data)), current_(device_) {}
  int device() const { return device_; }

 private:
  OutsideCapture outside_;
  int device_;
  CurrentDevice current_;
};

/// Our own pool of a device's memory, made at first use, within a `DeviceOf`. It keeps what it has got: the default
/// pool would hand memory back at every synchronisation, and others' settings of that one are not ours to change.
inline cudaMemPool_t pool_of(int device) {
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

/// Throws if the host cannot wait for a stream because it is captured.
inline void check_waiting(cudaStream_t stream, const char* why) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_status(cudaStreamIsCapturing(stream, &status), "asking whether the stream is captured");
  if (status != cudaStreamCaptureStatusNone)
    throw CudaError(std::string(why) + " waits for the device, which a CUDA graph cannot capture");
}

/// What lies on the device once the stream has come here.
template <class T>
std::vector<T> read(const char* from, int64_t count, cudaStream_t stream) {
  std::vector<T> values(count);
  check_status(cudaMemcpyAsync(values.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream),
               "reading what was found");
  check_status(cudaStreamSynchronize(stream), "waiting for the stream");
  return values;
}

}  // namespace fastagg::bindings

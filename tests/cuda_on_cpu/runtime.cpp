// Test-only: the calls of the CUDA runtime that the binding and the launchers make, on the host's memory. Device memory
// is the host's, and everything is done when a call returns. The device is small, so that launches are small.
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

/// A device's memory that other processes can open: a file without a name.
struct Shared {
  pid_t process;
  int descriptor;
  size_t bytes;
};
std::mutex mutex;
std::map<void*, Shared> shared;

cudaError_t map(int descriptor, size_t bytes, pid_t process, void** data) {
  *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (*data == MAP_FAILED) return cudaErrorMemoryAllocation;
  const std::lock_guard<std::mutex> lock(mutex);
  shared[*data] = {process, descriptor, bytes};
  return cudaSuccess;
}

cudaError_t unmap(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = shared.find(data);
  if (found == shared.end()) return cudaErrorInvalidValue;
  munmap(data, found->second.bytes);
  close(found->second.descriptor);
  shared.erase(found);
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** data, size_t bytes) {
  const int descriptor = memfd_create("cuda-on-cpu", MFD_CLOEXEC);
  if (descriptor < 0 || ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) return cudaErrorMemoryAllocation;
  return map(descriptor, bytes, getpid(), data);
}

cudaError_t cudaFree(void* data) { return unmap(data); }

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &shared.at(data), sizeof(Shared));
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** data, cudaIpcMemHandle_t handle, unsigned) {
  Shared theirs;
  memcpy(&theirs, &handle, sizeof theirs);
  const std::string path = "/proc/" + std::to_string(theirs.process) + "/fd/" + std::to_string(theirs.descriptor);
  const int descriptor = open(path.c_str(), O_RDWR | O_CLOEXEC);
  return descriptor < 0 ? cudaErrorInvalidValue : map(descriptor, theirs.bytes, theirs.process, data);
}

cudaError_t cudaIpcCloseMemHandle(void* data) { return unmap(data); }

cudaError_t cudaMemset(void* data, int value, size_t bytes) {
  memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(data, value, bytes);
}

cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  *data = malloc(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void* data) {
  free(data);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;  // only the number of multiprocessors is asked for
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* data) {
  *attributes = {};
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = const_cast<void*>(data);
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  *pool = nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

cudaError_t cudaMallocFromPoolAsync(void** data, size_t bytes, cudaMemPool_t, cudaStream_t) {
  *data = aligned_alloc(256, (bytes + 255) / 256 * 256);  // as a device aligns
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeAsync(void* data, cudaStream_t) {
  free(data);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaErrorLaunchFailure:
      return "threads of a block waited at different barriers";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "an error of the CUDA runtime";
  }
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

}  // extern "C"

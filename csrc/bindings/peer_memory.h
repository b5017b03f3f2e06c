// One rank's end of the memory through which devices of one host exchange, and the word by which device and host tell
// each other who is lost.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "device.h"
#include "released_gil.h"

namespace fastagg::bindings {

/// Zeroed memory of a device that other processes can open, and theirs as this one reaches it.
class PeerMemory {
 public:
  PeerMemory(int64_t bytes, int device) : device_(device) {
    const ReleasedGil released;
    const CurrentDevice current(device_);
    check_status(cudaHostAlloc(reinterpret_cast<void**>(&lost_), sizeof *lost_, cudaHostAllocPortable),
                 "allocating a word of the host's for a device");
    *lost_ = 0;
    const cudaError_t status = cudaMalloc(reinterpret_cast<void**>(&own_), bytes);
    if (status != cudaSuccess) cudaFreeHost(lost_);
    check_status(status, "allocating memory for the peers of a device");
    check_status(cudaMemset(own_, 0, bytes), "clearing it");
    check_status(cudaDeviceSynchronize(), "clearing it");
  }

  /// Waits for the device, which may still be at the last exchange.
  ~PeerMemory() {
    const ReleasedGil released;
    try {
      const CurrentDevice current(device_);
      cudaDeviceSynchronize();
      for (char* memory : opened_) cudaIpcCloseMemHandle(memory);
      cudaFree(own_);
      cudaFreeHost(lost_);
    } catch (const CudaError&) {  // the driver has gone before, and all memory with it
    }
  }
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  /// What lets another process open it.
  py::bytes handle() const {
    const CurrentDevice current(device_);
    cudaIpcMemHandle_t handle;
    check_status(cudaIpcGetMemHandle(&handle, own_), "sharing a device's memory");
    return {reinterpret_cast<const char*>(&handle), sizeof handle};
  }

  /// Every rank's memory, given all their handles.
  std::vector<uintptr_t> open(const std::vector<std::string>& handles, size_t rank) {
    const CurrentDevice current(device_);
    std::vector<uintptr_t> addresses;
    for (size_t peer = 0; peer < handles.size(); ++peer) {
      void* memory = own_;
      if (peer != rank) {
        cudaIpcMemHandle_t handle;
        if (handles[peer].size() != sizeof handle) throw py::value_error("a handle of another size");
        memcpy(&handle, handles[peer].data(), sizeof handle);
        check_status(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess), "opening a peer's memory");
        opened_.push_back(static_cast<char*>(memory));
      }
      addresses.push_back(reinterpret_cast<uintptr_t>(memory));
    }
    return addresses;
  }

  uintptr_t lost_address() const { return reinterpret_cast<uintptr_t>(lost_); }
  uint32_t lost() const { return __atomic_load_n(lost_, __ATOMIC_ACQUIRE); }

  /// Ends the device's waits, unless it has found somebody lost itself.
  void tell_lost(uint32_t number) {
    uint32_t nobody = 0;
    __atomic_compare_exchange_n(lost_, &nobody, number, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }

 private:
  int device_;
  char* own_ = nullptr;
  uint32_t* lost_ = nullptr;
  std::vector<char*> opened_;
};

inline void define_peer_memory(py::module_& m) {
  // Local, for a process may hold _cuda and, in the tests, the same kernels on the CPU.
  py::class_<PeerMemory>(m, "PeerMemory", py::module_local(),
                         "Zeroed memory of a device that the other ranks' processes can open.")
      .def(py::init<int64_t, int>(), py::arg("bytes"), py::arg("device"))
      .def("handle", &PeerMemory::handle, "What lets another process open it.")
      .def("open", &PeerMemory::open, py::arg("handles"), py::arg("rank"),
           "The addresses of all ranks' memory here, given all their handles.")
      .def_property_readonly("lost", &PeerMemory::lost, "A lost rank + 1, or one that differs, DIFFERS above it; or 0.")
      .def_property_readonly("lost_address", &PeerMemory::lost_address, "Where the device looks and tells.")
      .def("tell_lost", &PeerMemory::tell_lost, py::arg("number"), "Ends the device's waits.");
  m.attr("DIFFERS") = cuda::kDiffers;
  m.attr("PEER_CONTROL_BYTES") = cuda::kPeerControlBytes;
}

}  // namespace fastagg::bindings

// `upload`: bytes from the host, carried by kernels' parameters. A copy from the host's pageable memory would wait for
// the stream, and in a captured graph would read that memory again at every replay.
#include "launch.cuh"

namespace fastagg::cuda {
namespace {

#if CUDART_VERSION >= 12010
constexpr int kWords = 8000;  // parameters may have 32764 bytes
#else
constexpr int kWords = 1000;
#endif

struct Words {
  uint32_t* to;
  int32_t count;
  uint32_t words[kWords];
};

__global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ Words words) {
  const auto i = static_cast<int32_t>(kThreads * blockIdx.x + threadIdx.x);
  if (i < words.count) words.to[i] = words.words[i];
}

}  // namespace

cudaError_t upload(const void* from, void* to, int64_t bytes, cudaStream_t stream) noexcept {
  const auto* words = static_cast<const uint32_t*>(from);
  const int64_t count = bytes / static_cast<int64_t>(sizeof *words);
  for (int64_t first = 0; first < count; first += kWords) {
    Words part;
    part.to = static_cast<uint32_t*>(to) + first;
    part.count = static_cast<int32_t>(std::min<int64_t>(kWords, count - first));
    std::copy_n(words + first, part.count, part.words);
    const auto blocks = static_cast<unsigned>((part.count + kThreads - 1) / kThreads);
    const cudaError_t error = launch(upload_kernel, blocks, kThreads, 0, stream, part);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastagg::cuda

#include "probe.h"

#include <algorithm>
#include <atomic>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "thread_pool.h"

namespace fastagg::cpu {
namespace {

constexpr int64_t kLine = 64;
/// Bytes of one buffer that make a task.
constexpr int64_t kTaskBytes = 256 << 10;

uint64_t read_plain(const uint8_t* data, int64_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(data);
  uint64_t folded = 0;
  for (int64_t i = 0; i < bytes / 8; ++i) folded ^= words[i];
  return folded;
}

void write_plain(uint8_t* out, int64_t bytes) { std::fill_n(out, bytes, static_cast<uint8_t>(1)); }

#if defined(__x86_64__)
/// As the operations do: a result this large is stored around the caches.
constexpr int64_t kStreamBytes = 4 << 20;

__attribute__((target("avx2"))) uint64_t read_avx2(const uint8_t* data, int64_t bytes) {
  __m256i folded[4] = {};
  int64_t i = 0;
  for (; i + 4 * 32 <= bytes; i += 4 * 32)
    for (int r = 0; r < 4; ++r)
      folded[r] = _mm256_xor_si256(folded[r], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + r * 32)));
  const __m256i both = _mm256_xor_si256(_mm256_xor_si256(folded[0], folded[1]), _mm256_xor_si256(folded[2], folded[3]));
  alignas(32) uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), both);
  return words[0] ^ words[1] ^ words[2] ^ words[3] ^ read_plain(data + i, bytes - i);
}

__attribute__((target("avx2"))) void stream_avx2(uint8_t* out, int64_t bytes) {
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t i = 0; i + 32 <= bytes; i += 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), ones);
}
#endif

struct Loops {
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  void (*write)(uint8_t* out, int64_t bytes);
};

Loops loops_for(int64_t out_bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return {&read_avx2, out_bytes >= kStreamBytes ? &stream_avx2 : &write_plain};
#else
  (void)out_bytes;
#endif
  return {&read_plain, &write_plain};
}

/// The part of the aligned output that belongs to the first `read` bytes of every source.
int64_t written_until(const Probe& probe, int64_t read) {
  const double share = static_cast<double>(read) / static_cast<double>(std::max<int64_t>(probe.source_bytes, 1));
  return static_cast<int64_t>(share * static_cast<double>(probe.out_bytes)) / kLine * kLine;
}

}  // namespace

uint64_t stream_probe(const Probe& probe) {
  const Loops loops = loops_for(probe.out_bytes);
  const int64_t unaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(probe.out) % kLine);
  uint8_t* const out = unaligned == 0 ? probe.out : probe.out + kLine - unaligned;
  Probe aligned = probe;
  aligned.out_bytes = std::max<int64_t>(probe.out_bytes - (out - probe.out), 0);
  const int64_t task_bytes = std::max(kTaskBytes / probe.chunk_bytes, int64_t{1}) * probe.chunk_bytes;
  const int64_t tasks = (probe.source_bytes + task_bytes - 1) / task_bytes;
  std::atomic<uint64_t> folded{0};
  parallel_for(tasks, get_num_threads(), [&](int64_t task) {
    const int64_t end = std::min((task + 1) * task_bytes, probe.source_bytes);
    uint64_t own = 0;
    for (int64_t begin = task * task_bytes; begin < end; begin += probe.chunk_bytes) {
      const int64_t bytes = std::min(probe.chunk_bytes, end - begin);
      for (int64_t k = 0; k < probe.source_count; ++k)
        own ^= loops.read(reinterpret_cast<const uint8_t*>(probe.sources[k]) + begin, bytes);
      const int64_t first = written_until(aligned, begin), last = written_until(aligned, begin + bytes);
      loops.write(out + first, last - first);
    }
    folded.fetch_xor(own, std::memory_order_relaxed);
  });
  return folded.load();
}

}  // namespace fastagg::cpu

// What the memory gives: the operations' walk over memory without their arithmetic. The benchmark's limit.
#pragma once
#include <cstdint>

namespace fastagg::cpu {

/// Buffers to read side by side, and one to write meanwhile.
struct Probe {
  const uint64_t* sources;  // their addresses
  int64_t source_count;
  int64_t source_bytes;  // of each
  uint8_t* out;
  int64_t out_bytes;
  int64_t chunk_bytes;  // read from one buffer before the next one's turn; a multiple of 64
};

/// Reads whole cache lines of the sources on all threads and writes those of `out`, its part of every chunk as soon as
/// the chunk has been read. Returns what was read, folded into one word, so that no compiler can leave the reading out.
uint64_t stream_probe(const Probe& probe);

}  // namespace fastagg::cpu

// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
#pragma once
#include "types.h"

namespace fastagg {

struct Random4 { uint32_t words[4]; };

/// The random words of elements 4 * group to 4 * group + 3.
FASTAGG_INLINE Random4 philox(RandomKey key, uint32_t group) {
  uint32_t c0 = group, c1 = key.rank, c2 = key.tensor, c3 = key.step;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t high0 = static_cast<uint32_t>(first >> 32), high1 = static_cast<uint32_t>(second >> 32);
    c0 = high1 ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = high0 ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastagg

// Scaled integers of a group of clients can be summed as integers where the products of weights and scales are small
// multiples of one power of two: counts of examples mostly are.
#pragma once
#include "core/weighted_sum.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// The products of weights and scales of a group, for one block: 15 bits each, so that a group's sum of products with
/// int8 fits 32 bits.
struct IntegerWeights {
  int32_t pairs[kLargestGroup / 2];  // two clients' in the lower and the upper half
  double unit;                       // a power of two
};

/// A group's weights as odd integers times powers of two.
class ShortWeights {
 public:
  explicit ShortWeights(const Group& group) {
    for (int k = 0; k < group.clients; ++k) {
      const uint64_t bits = bit_cast<uint64_t>(group.weights[k]);
      const uint64_t significand = (bits << 12 >> 12) | uint64_t{1} << 52;
      const int zeros = __builtin_ctzll(significand);
      exact_ &= zeros >= 38 && bits - (uint64_t{500} << 52) < uint64_t{1000} << 52;  // the unit will be in range
      odd_[k] = static_cast<int32_t>(significand >> zeros);
      exponents_[k] = static_cast<int32_t>(bits >> 52) - 1075 + zeros;
    }
  }

  /// The weights times the scales of the block of element i; false if they do not fit.
  template <Code code>
  bool scaled(const Group& group, int64_t i, IntegerWeights& result) const {
    if (!exact_) return false;
    int32_t exponents[kLargestGroup], least = INT32_MAX;
    bool fits = true;
    for (int k = 0; k < group.clients; ++k) {
      const int32_t bits = bit_cast<int32_t>(scale_at<code>(group.sources[k], i));
      fits &= bits - 0x00800000u <= 0x7b000000u && (bits & 0x7fffff) == 0;  // a normal power of two: at most 2^120,
                                                                            // so that no code's value is infinite
      exponents[k] = exponents_[k] + (bits >> 23) - 127;
      least = exponents[k] < least ? exponents[k] : least;
    }
    for (int k = 0; k < group.clients; ++k) {
      const int32_t shift = exponents[k] - least;
      const int32_t value = odd_[k] << (shift & 15);
      fits &= shift < 16 && value < 1 << 15;
      int32_t& pair = result.pairs[k / 2];
      pair = k % 2 == 0 ? value & 0xffff : pair | (value & 0xffff) << 16;
    }
    result.unit = bit_cast<double>(static_cast<int64_t>(least + 1023) << 52);
    return fits;
  }

 private:
  int32_t odd_[kLargestGroup], exponents_[kLargestGroup];
  bool exact_ = true;
};

}  // namespace
}  // namespace fastagg

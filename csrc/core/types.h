// The vocabulary of the arithmetic: element codes, operand descriptors and the one inline specifier.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// Functors run on scalars, on SIMD lanes and on CUDA threads. They are always inlined: emitted as a function of its
// own, one compiled for AVX-512 could be the copy that the linker keeps for everybody.
#ifdef __CUDACC__
#define FASTAGG_INLINE __host__ __device__ __forceinline__
#else
#define FASTAGG_INLINE inline __attribute__((always_inline))
#endif

namespace fastagg {

/// How the elements of a leaf are encoded: the dtypes of arrays, the accumulator's state, the wires of `quantize`.
enum class Code : uint8_t {
  float64,
  float32,
  float16,
  bfloat16,
  state48,  // the accumulator's sums: core/state48.h
  int8,
  int16,
  int32,
  int64,
  uint8,
  uint16,
  uint32,
  uint64,
  wire_fp8_e4m3,
  wire_fp8_e5m2,
  wire_int8,
  wire_int4,
  wire_sign,
  state128,  // the accumulator's sums of float64: core/pair.h; the last one, for checkpoints keep codes as numbers
};
constexpr int kCodes = 19;

/// One client's leaf, or any other encoded array.
struct Source {
  const void* data;
  const void* companion;  // a float32 scale a block (wires that have one), the second plane of sums, else null
  Code code;
  uint8_t block_shift;  // log2 of the elements that share a scale
};

/// How the clients' values of one leaf become one.
enum class Fold : uint8_t { mean, maximum };

/// One leaf of `weighted_sum`: out = sum_k weights[k] * sources[k] / divisor, or the elementwise maximum.
struct Leaf {
  const Source* sources;
  const double* weights;
  int32_t clients;
  Fold fold;
  Code code;  // of the result
  double divisor;
  uint16_t dither;  // of a state48 result: core/state48.h
  int64_t count;
  void* out;                // null: only look for clients' non-finite values
  void* companion;          // the second plane of sums
  double divisor_rest = 0;  // what the divisor of a float64 result lacks
};

enum class Rounding : uint8_t { nearest, stochastic };

/// Names one random number an element: stochastic rounding depends on nothing else.
struct RandomKey {
  uint64_t seed;
  uint32_t step;
  uint32_t tensor;
  uint32_t rank;
};

/// Stands for a rank in the key of what the owner of a slice rounds for all: the same whoever owns it.
constexpr uint32_t kMeansRank = UINT32_MAX;

/// Elements from `begin` on draw the random numbers from `place` on, up to where the next stretch begins.
struct Stretch { int64_t begin, place; };

/// One `cast`: decodes `source`, multiplies by `factor` and encodes it as `code`.
struct Cast {
  Source source;
  Code code;
  uint8_t block_shift;
  Rounding rounding;
  RandomKey key;
  int64_t count;
  void* out;
  float* scales;
  float factor = 1;
  const Stretch* stretches = nullptr;  // in order, the first from element 0 on; none: elements are their own places
  int64_t stretch_count = 0;
};

/// What rounding takes from a rank's values, to be added to its next ones.
struct Feedback {
  const float* residual;  // added to the sum; null: none
  float residual_factor;
  float* error;  // receives (value - result) * error_factor, or is raised by it; null: not wanted
  float error_factor;
  bool raise;
};

/// One `reduce`: adds up encoded arrays in their order, in float32, divides, and encodes the quotient.
struct Reduction {
  const Source* sources;  // all of one code
  int32_t ranks;
  float divisor;
  Feedback feedback;
  Cast result;  // of a source and a factor that are not read
};

/// How a server's optimiser moves a model: core/server_step.h. In the order of what they keep.
enum class Rule : uint8_t { add, interpolate, momentum, adagrad, adam, yogi };
constexpr int kRules = 6;

constexpr FASTAGG_INLINE bool has_first_moment(Rule rule) { return rule >= Rule::momentum; }
constexpr FASTAGG_INLINE bool has_second_moment(Rule rule) { return rule >= Rule::adagrad; }

/// A rule with its constants.
struct Optimizer {
  Rule rule;
  double learning_rate, beta_1, beta_2, tau;
};

/// One leaf of `server_step`. The moments are float32, those of a float64 leaf float64; null where the rule has none.
struct ModelLeaf {
  const void* model;
  const void* mean;  // the clients'; of the model's code
  void* first_moment;
  void* second_moment;
  void* out;  // may be the model
  Code code;  // a floating one
  int64_t count;
};

/// Which of a coordinate's sorted values `sorted_mean` averages: the middle one or two, all but `left_out` at each end,
/// or all but the `left_out` that are farthest from the median or from that trimmed mean.
enum class Window : uint8_t { middle, trimmed, near_median, near_trimmed };

/// Two rows to be sorted, the smaller value into `low`.
struct Comparator { int32_t low, high; };

/// One `sorted_mean`, for all leaves.
struct SortedMean {
  Window window;
  int32_t left_out;
  int32_t rows;               // values of a coordinate
  const double* mixing;       // rows x clients: each value is such a combination of the clients'; null: their own
  const Comparator* network;  // core/sorting_network.h
  int64_t comparators;
};

/// What `statistics` finds of one client's leaf x, and of how it lies to a reference m. Values that are not finite
/// count for nothing but `nonfinite`.
struct Moments {
  double finite = 0;  // their number
  double nonfinite = 0;
  double mean = 0;
  double deviations = 0;  // sum of (x - mean)^2
  double minimum = __builtin_inf();
  double maximum = -__builtin_inf();
  double products = 0;   // sum of x * m
  double distances = 0;  // sum of (x - m)^2
  double reference = 0;  // sum of m^2
};
constexpr int kMoments = sizeof(Moments) / sizeof(double);

/// Whom `statistics` looks at beside a leaf's weighted sum: the reference is what the sum has written, times a factor.
struct Measurement {
  const Source* sources;
  int32_t clients;
  double factor;
};

/// Elements that one pass of `cast` keeps in the first-level cache; a multiple of every block of scales.
constexpr int64_t kChunk = 4096;
constexpr int kMinimumBlockShift = 5;
constexpr int kMaximumBlockShift = 12;

/// Bytes of `count` elements, the companion left out.
FASTAGG_INLINE int64_t encoded_bytes(Code code, int64_t count) {
  switch (code) {
    case Code::float64:
    case Code::int64:
    case Code::uint64:
    case Code::state128:
      return 8 * count;
    case Code::float32:
    case Code::state48:
    case Code::int32:
    case Code::uint32:
      return 4 * count;
    case Code::float16:
    case Code::bfloat16:
    case Code::int16:
    case Code::uint16:
      return 2 * count;
    case Code::wire_int4:
      return (count + 1) / 2;
    case Code::wire_sign:
      return (count + 7) / 8;
    default:
      return count;
  }
}

/// Where an array of codes would begin whose element `begin` lies at `data`.
template <class T>
FASTAGG_INLINE T* shifted(T* data, Code code, int64_t begin) {
  return data == nullptr ? nullptr
                         : reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) -
                                                static_cast<uintptr_t>(encoded_bytes(code, begin)));
}

/// Whether a float32 scale belongs to each block of the code's elements.
constexpr FASTAGG_INLINE bool has_scales(Code code) { return code >= Code::wire_fp8_e4m3 && code <= Code::wire_sign; }

/// The accumulator's sums, in two planes.
constexpr FASTAGG_INLINE bool is_state(Code code) { return code == Code::state48 || code == Code::state128; }

constexpr FASTAGG_INLINE bool is_integer(Code code) { return code >= Code::int8 && code <= Code::uint64; }

template <Code code>
struct ElementOf {
  using type = uint8_t;  // the wires below 16 bits
};
template <> struct ElementOf<Code::float64> { using type = double; };
template <> struct ElementOf<Code::float32> { using type = float; };
template <> struct ElementOf<Code::float16> { using type = uint16_t; };
template <> struct ElementOf<Code::bfloat16> { using type = uint16_t; };
template <> struct ElementOf<Code::state48> { using type = uint32_t; };
template <> struct ElementOf<Code::state128> { using type = double; };
template <> struct ElementOf<Code::int8> { using type = int8_t; };
template <> struct ElementOf<Code::int16> { using type = int16_t; };
template <> struct ElementOf<Code::int32> { using type = int32_t; };
template <> struct ElementOf<Code::int64> { using type = int64_t; };
template <> struct ElementOf<Code::uint16> { using type = uint16_t; };
template <> struct ElementOf<Code::uint32> { using type = uint32_t; };
template <> struct ElementOf<Code::uint64> { using type = uint64_t; };

/// The C++ type whose array holds a code's elements.
template <Code code>
using Element = typename ElementOf<code>::type;

/// That of the second plane of sums.
template <Code code>
using CompanionElement = std::conditional_t<code == Code::state128, double, uint16_t>;

/// The bits of `from` read as another type of the same size: scalars and lanes.
template <class To, class From>
FASTAGG_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace fastagg

// `cast`: from any floating code to any other, through float32 in registers, as csrc/cpu/cast.h does: the same bytes.
// Wires with scales are encoded by blocks, each by a few neighbouring threads of one warp; all other codes by vectors.
#include "core/cast.h"
#include "elements.cuh"
#include "launch.cuh"
#include "operations.h"

namespace fastagg::cuda {
namespace {

/// Neighbouring elements of a thread: as many as one Philox block covers, and 16 bytes of float32.
constexpr int kVector = 4;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int32_t kInfinity = 0x7f800000;

/// One cast as the kernels see it.
struct Operands {
  Cast cast;
  bool aligned;  // source and destination, to kAlignment
  int32_t* nonfinite;
};

/// n elements from i on as float32.
template <Code from, int n>
FASTAGG_INLINE void decode(const Cast& op, int64_t i, float* x) {
  const Elements<from, n> elements = load_elements<from, n>(op.source, i);
  const float scale = scale_at<from>(op.source, i);
  for (int j = 0; j < n; ++j) {
    if constexpr (from == Code::float64) {
      double wide[1] = {value_of<double>(elements, j)};
      x[j] = narrow_for<ThreadLane>(op.code, wide);
    } else {
      x[j] = value_of<float>(elements, j);
      if constexpr (has_scales(from)) x[j] = x[j] * scale;
    }
    x[j] = x[j] * op.factor;
  }
}

/// The vector from i < count on; the last element stands for those beyond it.
template <Code from>
FASTAGG_INLINE void decode_vector(const Operands& op, int64_t i, float (&x)[kVector]) {
  const int64_t last = op.cast.count - 1;
  if (op.aligned && i + kVector - 1 <= last) return decode<from, kVector>(op.cast, i, x);
  for (int j = 0; j < kVector; ++j) decode<from, 1>(op.cast, i + j < last ? i + j : last, x + j);
}

/// Calls `function` with the source's code as a compile-time constant, for the codes that can be cast.
template <class Function>
FASTAGG_INLINE void with_source(const Operands& op, Function&& function) {
  with_code(op.cast.source.code, [&](auto code) {
    if constexpr (!is_integer(decltype(code)::value) && decltype(code)::value != Code::state48) function(code);
  });
}

FASTAGG_INLINE void raise(int32_t& largest, float x) {
  const int32_t magnitude = bit_cast<int32_t>(x) & 0x7fffffff;
  largest = magnitude > largest ? magnitude : largest;
}

template <Rounding rounding>
FASTAGG_INLINE Random4 random_of(const Cast& op, int64_t i) {
  if constexpr (rounding == Rounding::nearest) return {};
  return philox(op.key, static_cast<uint32_t>(i / kVector));
}

/// Stores a vector's codes, or as much of it as the array holds.
template <Code code>
FASTAGG_INLINE void store_vector(const Operands& op, int64_t i, const Elements<code, kVector>& elements) {
  constexpr int per_entry = elements_per_entry(code);
  if (op.aligned && i + kVector <= op.cast.count) {
    static_cast<typename Elements<code, kVector>::Entries*>(op.cast.out)[i / kVector] = elements.entries;
    return;
  }
  for (int entry = 0; entry < kVector / per_entry; ++entry)
    if (i + entry * per_entry < op.cast.count)
      static_cast<Element<code>*>(op.cast.out)[i / per_entry + entry] = elements.entries.values[entry];
}

/// Encodes a vector for a code without scales.
template <Code code, Rounding rounding>
FASTAGG_INLINE void encode_vector(const Operands& op, int64_t i, const float (&x)[kVector], int32_t& largest) {
  const Random4 random = random_of<rounding>(op.cast, i);
  Elements<code, kVector> codes;
  for (int j = 0; j < kVector; ++j) {
    auto& out = codes.entries.values;
    raise(largest, x[j]);
    if constexpr (code == Code::float32 || code == Code::float64) out[j] = x[j];
    else if constexpr (code == Code::float16 && rounding == Rounding::nearest)
      ThreadLane::store_float16<false>(out, j, x[j]);
    else
      out[j] =
          static_cast<uint16_t>(encode<code, rounding, float, int32_t>(x[j], static_cast<int32_t>(random.words[j])));
  }
  store_vector<code>(op, i, codes);
}

/// Encodes a vector of a block, given the inverse of its scale.
template <Code code, Rounding rounding>
FASTAGG_INLINE void encode_in_block(const Operands& op, int64_t i, const float (&x)[kVector], Inverse inverse,
                                    bool marked) {
  const Random4 random = random_of<rounding>(op.cast, i);
  Elements<code, kVector> codes{};
  for (int j = 0; j < kVector; ++j) {
    const auto random_bits = static_cast<int32_t>(random.words[j]);
    int32_t encoded;
    if constexpr (code == Code::wire_int8 || code == Code::wire_int4)
      encoded = marked ? 0 : encode_integer<rounding, float, int32_t>(x[j], inverse.first, inverse.second, random_bits);
    else encoded = encode<code, rounding, float, int32_t>(x[j] * inverse.first * inverse.second, random_bits);
    if constexpr (code == Code::wire_int4) {
      if (i + j < op.cast.count) codes.entries.values[j / 2] |= static_cast<uint8_t>((encoded & 15) << (j % 2 * 4));
    } else {
      codes.entries.values[j] = static_cast<uint8_t>(encoded);
    }
  }
  store_vector<code>(op, i, codes);
}

/// The largest value among `lanes` neighbouring threads, a power of two.
__device__ inline int32_t largest_of_lanes(int32_t value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const int32_t other = __shfl_xor_sync(kWholeWarp, value, mask);
    value = other > value ? other : value;
  }
  return value;
}

/// Raises the flag if a thread met a magnitude that the code turns into infinity or NaN.
__device__ inline void report(const Operands& op, int32_t largest) {
  if (op.nonfinite != nullptr && largest >= overflow_from(op.cast.code)) atomicOr(op.nonfinite, 1);
}

template <Code code, Rounding rounding>
__global__ void __launch_bounds__(kThreads, kBlocks) encode_vectors(Operands op) {
  const int64_t stride = int64_t{kVector} * kThreads * gridDim.x;
  const int64_t begin = kVector * (int64_t{kThreads} * blockIdx.x + threadIdx.x);
  int32_t largest = 0;
  with_source(op, [&](auto from) {
    for (int64_t i = begin; i < op.cast.count; i += stride) {
      float x[kVector];
      decode_vector<decltype(from)::value>(op, i, x);
      encode_vector<code, rounding>(op, i, x, largest);
    }
  });
  report(op, largest);
}

FASTAGG_INLINE void decode_any(const Operands& op, int64_t i, float (&x)[kVector]) {
  with_source(op, [&](auto from) { decode_vector<decltype(from)::value>(op, i, x); });
}

/// Encodes the block that begins at `begin`: `lanes` threads together, this one as number `lane`. Threads of blocks
/// beyond the end take part, for the others of their warp. Returns the largest magnitude that this thread met.
template <Code code, Rounding rounding>
__device__ inline int32_t encode_block(const Operands& op, int64_t begin, int lanes, int lane) {
  const int64_t block = int64_t{1} << op.cast.block_shift;
  const int64_t end = begin + block < op.cast.count ? begin + block : op.cast.count;
  const int64_t first = begin + lane * kVector, stride = lanes * kVector;
  int32_t largest = 0, finite = 0;
  float x[kVector];
  for (int64_t i = first; i < end; i += stride) {
    decode_any(op, i, x);
    for (const float value : x) {
      raise(largest, value);
      if (magnitude_of(value) < bit_cast<float>(kInfinity)) raise(finite, value);
    }
  }
  finite = largest_of_lanes(finite, lanes);
  const bool marked =
      (code == Code::wire_int8 || code == Code::wire_int4) && largest_of_lanes(largest, lanes) >= kInfinity;
  const int exponent = scale_exponent(bit_cast<float>(finite), code);
  if (lane == 0 && begin < end)
    op.cast.scales[begin >> op.cast.block_shift] = marked ? bit_cast<float>(0x7fc00000) : scale_of(exponent);
  const Inverse inverse = inverse_of(exponent);
  const float ceiling = ceiling_of(code, exponent, op.cast.source.code);
  for (int64_t i = first; i < end; i += stride) {
    if (block > lanes * kVector) decode_any(op, i, x);  // else it is still at hand
    if (bit_cast<float>(finite) > ceiling)
      for (float& value : x) value = clamp_finite(value, ceiling);
    encode_in_block<code, rounding>(op, i, x, inverse, marked);
  }
  return largest;
}

template <Code code, Rounding rounding>
__global__ void __launch_bounds__(kThreads, kBlocks) encode_blocks(Operands op) {
  const int lanes = (1 << op.cast.block_shift) / kVector < kWarp ? (1 << op.cast.block_shift) / kVector : kWarp;
  const int64_t tile = int64_t{kWarp / lanes} << op.cast.block_shift;  // elements of a warp's blocks
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t warp = (int64_t{kThreads} * blockIdx.x + threadIdx.x) / kWarp,
                warps = int64_t{kThreads} / kWarp * gridDim.x;
  int32_t largest = 0;
  for (int64_t begin = warp * tile; begin < op.cast.count; begin += warps * tile) {
    const int64_t block_begin = begin + (int64_t{lane / lanes} << op.cast.block_shift);
    const int32_t here = encode_block<code, rounding>(op, block_begin, lanes, lane % lanes);
    largest = here > largest ? here : largest;
  }
  report(op, largest);
}

FASTAGG_INLINE float decode_one(const Operands& op, int64_t i) {
  float x = 0;
  with_source(op, [&](auto from) { decode<decltype(from)::value, 1>(op.cast, i, &x); });
  return x;
}

/// Encodes the signs of the block that begins at `begin`, and its mean magnitude: kSignStrides threads together, each
/// with one of the strided sums of core/block.h. Returns the largest magnitude that this thread met.
__device__ inline int32_t encode_signs(const Operands& op, int64_t begin, int lane) {
  const int64_t block = int64_t{1} << op.cast.block_shift;
  const int64_t end = begin + block < op.cast.count ? begin + block : op.cast.count;
  uint8_t* out = static_cast<uint8_t*>(op.cast.out);
  int32_t largest = 0;
  double sum = 0;
  for (int64_t first = begin; first < begin + block; first += kSignStrides) {
    const float x = first + lane < end ? decode_one(op, first + lane) : 0.0f;
    raise(largest, x);
    sum += magnitude_of(x);
    // The warp's signs; this block's are one half of them, and each of two threads stores a byte.
    const unsigned signs = __ballot_sync(kWholeWarp, bit_cast<int32_t>(x) < 0) >> (threadIdx.x % kWarp - lane);
    if (lane < 2 && first + 8 * lane < end) out[first / 8 + lane] = static_cast<uint8_t>(signs >> (8 * lane));
  }
  for (int width = kSignStrides / 2; width > 0; width /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, width);
  if (lane == 0 && begin < end) op.cast.scales[begin >> op.cast.block_shift] = mean_magnitude(sum, end - begin);
  return largest;
}

__global__ void __launch_bounds__(kThreads, kBlocks) encode_sign_blocks(Operands op) {
  const int64_t block = int64_t{1} << op.cast.block_shift;
  const int lane = static_cast<int>(threadIdx.x % kSignStrides),
            of_warp = static_cast<int>(threadIdx.x % kWarp / kSignStrides);
  const int64_t warp = (int64_t{kThreads} * blockIdx.x + threadIdx.x) / kWarp,
                warps = int64_t{kThreads} / kWarp * gridDim.x;
  int32_t largest = 0;
  for (int64_t begin = warp * 2 * block; begin < op.cast.count; begin += warps * 2 * block) {
    const int32_t here = encode_signs(op, begin + of_warp * block, lane);
    largest = here > largest ? here : largest;
  }
  report(op, largest);
}

using Kernel = void (*)(Operands);

template <Code code, Rounding rounding>
Kernel kernel_for() {
  if constexpr (code == Code::wire_sign) return encode_sign_blocks;
  else if constexpr (has_scales(code)) return encode_blocks<code, rounding>;
  else return encode_vectors<code, rounding>;
}

template <Code code>
Kernel kernel_for(Rounding rounding) {
  return rounding == Rounding::stochastic ? kernel_for<code, Rounding::stochastic>()
                                          : kernel_for<code, Rounding::nearest>();
}

Kernel kernel_for(Code code, Rounding rounding) {
  switch (code) {
    case Code::float64:
      return kernel_for<Code::float64, Rounding::nearest>();
    case Code::float32:
      return kernel_for<Code::float32, Rounding::nearest>();
    case Code::float16:
      return kernel_for<Code::float16>(rounding);
    case Code::bfloat16:
      return kernel_for<Code::bfloat16>(rounding);
    case Code::wire_fp8_e4m3:
      return kernel_for<Code::wire_fp8_e4m3>(rounding);
    case Code::wire_fp8_e5m2:
      return kernel_for<Code::wire_fp8_e5m2>(rounding);
    case Code::wire_int8:
      return kernel_for<Code::wire_int8>(rounding);
    case Code::wire_int4:
      return kernel_for<Code::wire_int4>(rounding);
    case Code::wire_sign:
      return kernel_for<Code::wire_sign, Rounding::nearest>();
    default:
      return nullptr;
  }
}

}  // namespace

cudaError_t cast(const Cast& cast, int32_t* nonfinite, cudaStream_t stream) noexcept {
  const Kernel kernel = kernel_for(cast.code, cast.rounding);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const uintptr_t past =
      (reinterpret_cast<uintptr_t>(cast.source.data) | reinterpret_cast<uintptr_t>(cast.out)) % kAlignment;
  // A block of threads has at least this many elements to do.
  constexpr int64_t share = int64_t{kThreads} * kVector;
  return launch_persistent(kernel, (cast.count + share - 1) / share, stream, Operands{cast, past == 0, nonfinite});
}

}  // namespace fastagg::cuda

// Encoding what an operation computes, element by element. Wires with scales are encoded by blocks, each by a few
// neighbouring threads of one warp; all other codes by vectors.
//
// The operation is a `Work`, of these members:
//   result, aligned        the encoded array (a Cast whose source is not read); whether all arrays are aligned to
//                          kAlignment
//   with_values<code>(f)   for a result of this code: calls f with the operation's values, compiled for its operands'
//                          code: values.load<n>(i, x), aligned where n is kVector
//   values_code()          whose finite values must stay finite
//   vectors                of a thread whose loads shall be under way together
//   Sink                   what a thread does with its values once they are encoded: take(i, x, decoded)
// and, to be a kernel of its own, nonfinite (a flag to raise, or null), blocks (that a multiprocessor shall hold at
// least) and the sink's finish().
#pragma once
#include "core/cast.h"
#include "elements.cuh"
#include "launch.cuh"
#include "operations.h"

namespace fastagg::cuda {

/// Neighbouring elements of a thread: as many as one Philox block covers, and 16 bytes of float32.
constexpr int kVector = 4;
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int32_t kInfinity = 0x7f800000;

/// Threads that share elements, in whole warps: this one's number among them, and how many they are.
struct Team { int64_t thread, threads; };

__device__ inline Team whole_grid() {
  return {int64_t{kThreads} * blockIdx.x + threadIdx.x, int64_t{kThreads} * gridDim.x};
}

/// A sink for operations that need nothing more.
struct NoSink {
  static constexpr bool wanted = false;
  template <class Work>
  FASTAGG_INLINE explicit NoSink(const Work&) {}
  template <int n>
  FASTAGG_INLINE void take(int64_t, const float (&)[n], const float (&)[n]) {}
  FASTAGG_INLINE void finish() {}
};

FASTAGG_INLINE void raise(int32_t& largest, float x) {
  const int32_t magnitude = bit_cast<int32_t>(x) & 0x7fffffff;
  largest = magnitude > largest ? magnitude : largest;
}

/// The random number of one place.
FASTAGG_INLINE uint32_t random_at(const RandomKey& key, int64_t place) {
  const Random4 four = philox(key, static_cast<uint32_t>(place / 4));
  const auto word = place % 4;
  return word == 0 ? four.words[0] : word == 1 ? four.words[1] : word == 2 ? four.words[2] : four.words[3];
}

/// The last stretch that begins at element i or before it.
FASTAGG_INLINE int64_t stretch_of(const Cast& op, int64_t i) {
  int64_t low = 0, high = op.stretch_count;
  while (low + 1 < high) {
    const int64_t middle = (low + high) / 2;
    (op.stretches[middle].begin <= i ? low : high) = middle;
  }
  return low;
}

/// The random numbers of the vector from i on.
template <Rounding rounding>
FASTAGG_INLINE Random4 random_of(const Cast& op, int64_t i) {
  if constexpr (rounding == Rounding::nearest) return {};
  if (op.stretch_count == 0) return philox(op.key, static_cast<uint32_t>(i / kVector));
  Random4 random;
  int64_t stretch = stretch_of(op, i);
  for (int j = 0; j < kVector; ++j) {
    while (stretch + 1 < op.stretch_count && op.stretches[stretch + 1].begin <= i + j) ++stretch;
    random.words[j] = random_at(op.key, op.stretches[stretch].place + i + j - op.stretches[stretch].begin);
  }
  return random;
}

/// Stores a vector's codes, or as much of it as the array holds.
template <Code code, class Work>
FASTAGG_INLINE void store_vector(const Work& work, int64_t i, const Elements<code, kVector>& elements) {
  const Cast& op = work.result;
  constexpr int per_entry = elements_per_entry(code);
  if (work.aligned && i + kVector <= op.count) {
    static_cast<typename Elements<code, kVector>::Entries*>(op.out)[i / kVector] = elements.entries;
    return;
  }
  for (int entry = 0; entry < kVector / per_entry; ++entry)
    if (i + entry * per_entry < op.count)
      static_cast<Element<code>*>(op.out)[i / per_entry + entry] = elements.entries.values[entry];
}

/// Hands a vector that has been encoded with this scale to the sink.
template <Code code, class Sink>
FASTAGG_INLINE void hand_over(Sink& sink, int64_t i, const float (&x)[kVector], const Elements<code, kVector>& elements,
                              float scale) {
  if constexpr (Sink::wanted) {
    float decoded[kVector];
    for (int j = 0; j < kVector; ++j) {
      if constexpr (code == Code::float64) decoded[j] = x[j];
      else decoded[j] = value_of<float>(elements, j) * scale;
    }
    sink.take(i, x, decoded);
  }
}

/// Encodes a vector for a code without scales.
template <Code code, Rounding rounding, class Work>
FASTAGG_INLINE void encode_vector(const Work& work, int64_t i, const float (&x)[kVector], int32_t& largest,
                                  typename Work::Sink& sink) {
  const Random4 random = random_of<rounding>(work.result, i);
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
  store_vector<code>(work, i, codes);
  hand_over<code>(sink, i, x, codes, 1);
}

/// Encodes a vector of a block, given its scale's exponent. Finite values that would become infinite are clamped.
template <Code code, Rounding rounding, class Work>
FASTAGG_INLINE void encode_in_block(const Work& work, int64_t i, const float (&x)[kVector], int exponent, bool marked,
                                    typename Work::Sink& sink) {
  const Random4 random = random_of<rounding>(work.result, i);
  const Inverse inverse = inverse_of(exponent);
  const float ceiling = ceiling_of(code, exponent, work.values_code());
  Elements<code, kVector> codes{};
  for (int j = 0; j < kVector; ++j) {
    const auto random_bits = static_cast<int32_t>(random.words[j]);
    const float value = clamp_finite(x[j], ceiling);
    int32_t encoded;
    if constexpr (code == Code::wire_int8 || code == Code::wire_int4)
      encoded =
          marked ? 0 : encode_integer<rounding, float, int32_t>(value, inverse.first, inverse.second, random_bits);
    else encoded = encode<code, rounding, float, int32_t>(value * inverse.first * inverse.second, random_bits);
    if constexpr (code == Code::wire_int4) {
      if (i + j < work.result.count) codes.entries.values[j / 2] |= static_cast<uint8_t>((encoded & 15) << (j % 2 * 4));
    } else {
      codes.entries.values[j] = static_cast<uint8_t>(encoded);
    }
  }
  store_vector<code>(work, i, codes);
  hand_over<code>(sink, i, x, codes, marked ? bit_cast<float>(0x7fc00000) : scale_of(exponent));
}

/// The largest value among `lanes` neighbouring threads, a power of two.
__device__ inline int32_t largest_of_lanes(int32_t value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const int32_t other = __shfl_xor_sync(kWholeWarp, value, mask);
    value = other > value ? other : value;
  }
  return value;
}

/// Raises the flag, unless it is null, if a thread met a magnitude that the code turns into infinity or NaN.
__device__ inline void report(int32_t* nonfinite, Code code, int32_t largest) {
  if (nonfinite != nullptr && largest >= overflow_from(code)) atomicOr(nonfinite, 1);
}

/// Adds the squares that the threads of this block have summed up to the block's place, unless `kept` is null: a fixed
/// tree.
__device__ inline void keep_squares(double* kept, double squares) {
  if (kept == nullptr) return;
  auto& warps = block_shared<double[kThreads / kWarp]>();
  for (int width = kWarp / 2; width > 0; width /= 2) squares += __shfl_xor_sync(kWholeWarp, squares, width);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = squares;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (const double warp : warps) sum += warp;
  kept[blockIdx.x] += sum;
}

/// The vector from i on; beyond the end it is the last value that stands there.
template <class Work, class Values>
FASTAGG_INLINE void load_vector(const Work& work, const Values& values, int64_t i, float (&x)[kVector]) {
  const int64_t last = work.result.count - 1;
  if (work.aligned && i + kVector - 1 <= last) return values.template load<kVector>(i, x);
  // Not unrolled: this is the last vector, or all of a misaligned array's. Registers cannot be indexed.
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (int j = 0; j < kVector; ++j) {
    x[0] = x[1], x[1] = x[2], x[2] = x[3];
    values.template load<1>(i + j < last ? i + j : last, x + 3);
  }
}

/// The vectors from i on, i + stride, ... that begin before `end`: their loads are under way together where all are
/// whole. Returns how many there are.
template <class Work, class Values, int n>
FASTAGG_INLINE int load_vectors(const Work& work, const Values& values, int64_t i, int64_t stride, int64_t end,
                                float (&x)[n][kVector]) {
  if (work.aligned && i + (n - 1) * stride + kVector <= end) {
    for (int v = 0; v < n; ++v) values.template load<kVector>(i + v * stride, x[v]);
    return n;
  }
  int count = 0;
  for (int v = 0; v < n; ++v) {
    if (i + v * stride >= end) continue;
    load_vector(work, values, i + v * stride, x[v]);
    ++count;
  }
  return count;
}

/// Encodes the elements [begin, end) by vectors. This and its siblings return the largest magnitude that this thread
/// met; `end` is the array's, or a multiple of a vector.
template <Code code, Rounding rounding, class Work>
__device__ inline int32_t encode_vectors(const Work& work, int64_t begin, int64_t end, Team team,
                                         typename Work::Sink& sink) {
  constexpr int together = Work::vectors;
  const int64_t stride = kVector * team.threads;
  int32_t largest = 0;
  work.template with_values<code>([&](const auto& values) {
    for (int64_t i = begin + kVector * team.thread; i < end; i += together * stride) {
      float x[together][kVector];
      const int count = load_vectors(work, values, i, stride, end, x);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (int v = 0; v < together; ++v)
        if (v < count) encode_vector<code, rounding>(work, i + v * stride, x[v], largest, sink);
    }
  });
  return largest;
}

/// The largest magnitude, and the largest of those that are finite.
FASTAGG_INLINE void raise_both(int32_t& largest, int32_t& finite, const float (&x)[kVector]) {
  for (const float value : x) {
    raise(largest, value);
    if (magnitude_of(value) < bit_cast<float>(kInfinity)) raise(finite, value);
  }
}

/// Encodes the block that begins at `begin`: `lanes` threads together, this one as number `lane`. Threads of blocks
/// from `last` on take part, for the others of their warp.
template <Code code, Rounding rounding, class Work>
__device__ inline int32_t encode_block(const Work& work, int64_t begin, int64_t last, int lanes, int lane,
                                       typename Work::Sink& sink) {
  const Cast& op = work.result;
  const int64_t block = int64_t{1} << op.block_shift;
  const int64_t end = begin + block < last ? begin + block : last;
  constexpr int together = Work::vectors;
  const int64_t first = begin + lane * kVector, stride = lanes * kVector;
  int32_t largest = 0, finite = 0;
  int exponent = 0, count = 0;
  bool marked = false;
  float x[together][kVector];
  // Not unrolled: an operation's values are much code.
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
  for (int pass = 0; pass < 2; ++pass) {
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (int64_t i = first; i < end; i += together * stride) {
      if (pass == 0 || block > together * stride)  // else they are still at hand
        work.template with_values<code>(
            [&](const auto& values) { count = load_vectors(work, values, i, stride, end, x); });
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
      for (int v = 0; v < together; ++v) {
        if (v >= count) continue;
        if (pass == 1) encode_in_block<code, rounding>(work, i + v * stride, x[v], exponent, marked, sink);
        else raise_both(largest, finite, x[v]);
      }
    }
    if (pass == 1) break;
    finite = largest_of_lanes(finite, lanes);
    marked = (code == Code::wire_int8 || code == Code::wire_int4) && largest_of_lanes(largest, lanes) >= kInfinity;
    exponent = scale_exponent(bit_cast<float>(finite), code);
    if (lane == 0 && begin < end)
      op.scales[begin >> op.block_shift] = marked ? bit_cast<float>(0x7fc00000) : scale_of(exponent);
  }
  return largest;
}

/// Encodes the elements [begin, end) by blocks, the first of which begins at `begin`.
template <Code code, Rounding rounding, class Work>
__device__ inline int32_t encode_blocks(const Work& work, int64_t begin, int64_t end, Team team,
                                        typename Work::Sink& sink) {
  const int shift = work.result.block_shift;
  const int lanes = (1 << shift) / kVector < kWarp ? (1 << shift) / kVector : kWarp;
  const int64_t tile = int64_t{kWarp / lanes} << shift;  // elements of a warp's blocks
  const int lane = static_cast<int>(team.thread % kWarp);
  const int64_t own = int64_t{lane / lanes} << shift;
  int32_t largest = 0;
  for (int64_t first = begin + team.thread / kWarp * tile; first < end; first += team.threads / kWarp * tile) {
    const int32_t here = encode_block<code, rounding>(work, first + own, end, lanes, lane % lanes, sink);
    largest = here > largest ? here : largest;
  }
  return largest;
}

template <class Work>
FASTAGG_INLINE float value_at(const Work& work, int64_t i) {
  float x = 0;
  work.template with_values<Code::wire_sign>([&](const auto& values) { values.template load<1>(i, &x); });
  return x;
}

/// Encodes the signs of the block that begins at `begin`, and its mean magnitude: kSignStrides threads together, each
/// with one of the strided sums of core/block.h.
template <class Work>
__device__ inline int32_t encode_signs(const Work& work, int64_t begin, int64_t last, int lane,
                                       typename Work::Sink& sink) {
  const Cast& op = work.result;
  const int64_t block = int64_t{1} << op.block_shift;
  const int64_t end = begin + block < last ? begin + block : last;
  uint8_t* out = static_cast<uint8_t*>(op.out);
  int32_t largest = 0;
  double sum = 0;
  for (int64_t first = begin; first < begin + block; first += kSignStrides) {
    const float x = first + lane < end ? value_at(work, first + lane) : 0.0f;
    raise(largest, x);
    sum += magnitude_of(x);
    // The warp's signs; this block's are one half of them, and each of two threads stores a byte.
    const unsigned signs = __ballot_sync(kWholeWarp, bit_cast<int32_t>(x) < 0) >> (threadIdx.x % kWarp - lane);
    if (lane < 2 && first + 8 * lane < end) out[first / 8 + lane] = static_cast<uint8_t>(signs >> (8 * lane));
  }
  for (int width = kSignStrides / 2; width > 0; width /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, width);
  if (begin >= end) return largest;
  const float scale = mean_magnitude(sum, end - begin);
  if (lane == 0) op.scales[begin >> op.block_shift] = scale;
  if constexpr (Work::Sink::wanted) {
    for (int64_t i = begin + lane; i < end; i += kSignStrides) {
      const float x[1] = {value_at(work, i)};
      const float decoded[1] = {bit_cast<float>(bit_cast<int32_t>(scale) ^ (bit_cast<int32_t>(x[0]) & INT32_MIN))};
      sink.take(i, x, decoded);
    }
  }
  return largest;
}

/// Encodes the elements [begin, end) as signs, the first block of which begins at `begin`.
template <class Work>
__device__ inline int32_t encode_sign_blocks(const Work& work, int64_t begin, int64_t end, Team team,
                                             typename Work::Sink& sink) {
  const int64_t block = int64_t{1} << work.result.block_shift;
  const int lane = static_cast<int>(team.thread % kSignStrides);
  const int64_t own = team.thread % kWarp / kSignStrides * block;
  const int64_t warp = team.thread / kWarp, warps = team.threads / kWarp;
  int32_t largest = 0;
  for (int64_t first = begin + warp * 2 * block; first < end; first += warps * 2 * block) {
    const int32_t here = encode_signs(work, first + own, end, lane, sink);
    largest = here > largest ? here : largest;
  }
  return largest;
}

/// Encodes the elements [begin, end): `begin` is a multiple of a block of scales, `end` as well unless it is the
/// array's.
template <Code code, Rounding rounding, class Work>
__device__ inline int32_t encode_range(const Work& work, int64_t begin, int64_t end, Team team,
                                       typename Work::Sink& sink) {
  if constexpr (code == Code::wire_sign) return encode_sign_blocks(work, begin, end, team, sink);
  else if constexpr (has_scales(code)) return encode_blocks<code, rounding>(work, begin, end, team, sink);
  else return encode_vectors<code, rounding>(work, begin, end, team, sink);
}

template <Code code, Rounding rounding, class Work>
__global__ void __launch_bounds__(kThreads, Work::blocks) encode_whole(const __grid_constant__ Work work) {
  typename Work::Sink sink(work);
  report(work.nonfinite, code, encode_range<code, rounding>(work, 0, work.result.count, whole_grid(), sink));
  sink.finish();
}

template <class Work>
using EncodeKernel = void (*)(Work);

template <class Work, Code code>
EncodeKernel<Work> encode_kernel(Rounding rounding) {
  return rounding == Rounding::stochastic ? encode_whole<code, Rounding::stochastic, Work>
                                          : encode_whole<code, Rounding::nearest, Work>;
}

/// The kernel that encodes a work's result; null for a code that it cannot become.
template <class Work>
EncodeKernel<Work> encode_kernel(Code code, Rounding rounding) {
  switch (code) {
    case Code::float64:
      return encode_whole<Code::float64, Rounding::nearest, Work>;
    case Code::float32:
      return encode_whole<Code::float32, Rounding::nearest, Work>;
    case Code::float16:
      return encode_kernel<Work, Code::float16>(rounding);
    case Code::bfloat16:
      return encode_kernel<Work, Code::bfloat16>(rounding);
    case Code::wire_fp8_e4m3:
      return encode_kernel<Work, Code::wire_fp8_e4m3>(rounding);
    case Code::wire_fp8_e5m2:
      return encode_kernel<Work, Code::wire_fp8_e5m2>(rounding);
    case Code::wire_int8:
      return encode_kernel<Work, Code::wire_int8>(rounding);
    case Code::wire_int4:
      return encode_kernel<Work, Code::wire_int4>(rounding);
    case Code::wire_sign:
      return encode_whole<Code::wire_sign, Rounding::nearest, Work>;
    default:
      return nullptr;
  }
}

/// Starts the kernel for a work's result.
template <class Work>
cudaError_t launch_encode(const Work& work, cudaStream_t stream) {
  const EncodeKernel<Work> kernel = encode_kernel<Work>(work.result.code, work.result.rounding);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  // A block of threads has at least this many elements to do.
  constexpr int64_t share = int64_t{kThreads} * kVector;
  return launch_persistent(kernel, (work.result.count + share - 1) / share, stream, work);
}

}  // namespace fastagg::cuda

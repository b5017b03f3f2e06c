// The loops of `cast`, compiled once for each instruction set: decode a chunk to float32, encode it from there. A side
// that is float32 already is read or written in place.
#pragma once
#include "core/cast.h"
#include "stream.h"
#include "unaligned.h"

namespace fastagg {
namespace {  // the loops of another instruction set must never be linked in these ones' place

/// Raises `largest` to the magnitudes of x, as float32 bits: they order like the numbers, NaN last.
template <class I, class F>
FASTAGG_INLINE void raise(I& largest, F x) {
  const I magnitude = bit_cast<I>(x) & 0x7fffffff;
  largest = magnitude > largest ? magnitude : largest;
}

template <class Lanes>
FASTAGG_INLINE int32_t maximum(typename Lanes::I largest) {
  int32_t lanes[Lanes::width], result = 0;
  memcpy(&lanes, &largest, sizeof lanes);
  for (int32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}

/// Decodes whole vectors of source[begin + i ...] to out[at + i ...] from i up to count; returns where it stopped.
template <class Lanes, Code from, bool stream>
FASTAGG_INLINE int64_t decode_vectors(const Cast& op, float* out, int64_t begin, int64_t at, int64_t i, int64_t count,
                                      int32_t& largest) {
  typename Lanes::I magnitudes{};
  for (; i + Lanes::width <= count; i += Lanes::width) {
    typename Lanes::F x;
    if constexpr (from == Code::float64) {
      typename Lanes::D wide[Lanes::halves];
      load_wide<Lanes, from>(op.source, begin + i, wide);
      x = narrow_for<Lanes>(op.code, wide);
    } else {
      x = load_scaled<Lanes, from>(op.source, begin + i);
    }
    x = x * op.factor;
    raise(magnitudes, x);
    Lanes::template store_float32<stream>(out, at + i, x);
  }
  const int32_t here = maximum<Lanes>(magnitudes);
  largest = here > largest ? here : largest;
  return i;
}

/// Decodes a chunk to out[at ...]; returns the largest magnitude.
template <class Lanes, Code from, bool stream>
int32_t decode_chunk(const Cast& op, float* out, int64_t begin, int64_t at, int64_t count) {
  int32_t largest = 0;
  const int64_t head = stream ? until_aligned(out, at, sizeof(float), count) : 0;
  // A vector must not reach into the next block of scales: an unaligned destination is stored the usual way.
  if (stream && head != 0 && has_scales(from)) return decode_chunk<Lanes, from, false>(op, out, begin, at, count);
  int64_t i = decode_vectors<Lane, from, false>(op, out, begin, at, 0, head, largest);
  i = decode_vectors<Lanes, from, stream>(op, out, begin, at, i, count, largest);
  decode_vectors<Lane, from, false>(op, out, begin, at, i, count, largest);
  return largest;
}

/// Encodes whole vectors of factor * x[i ...] to out[begin + i ...], for codes without scales; returns where it
/// stopped.
template <class Lanes, Code code, Rounding rounding, bool stream>
FASTAGG_INLINE int64_t encode_vectors(void* out, const float* x, float factor, const uint32_t* random, int64_t begin,
                                      int64_t i, int64_t count, int32_t& largest) {
  using F = typename Lanes::F;
  using I = typename Lanes::I;
  I magnitudes{};
  for (; i + Lanes::width <= count; i += Lanes::width) {
    const F value = load_bytes<F>(x + i) * factor;
    I random_bits{};
    if constexpr (rounding == Rounding::stochastic) random_bits = load_bytes<I>(random + i);
    raise(magnitudes, value);
    if constexpr (code == Code::float32) {
      Lanes::template store_float32<stream>(out, begin + i, value);
    } else if constexpr (code == Code::float64) {
      typename Lanes::D wide[Lanes::halves];
      Lanes::widen(value, wide);
      Lanes::template store_float64<stream>(out, begin + i, wide);
    } else if constexpr (code == Code::float16 && rounding == Rounding::nearest) {
      Lanes::template store_float16<stream>(out, begin + i, value);
    } else {
      Lanes::template store_uint16<stream>(out, begin + i, encode<code, rounding, F, I>(value, random_bits));
    }
  }
  const int32_t here = maximum<Lanes>(magnitudes);
  largest = here > largest ? here : largest;
  return i;
}

template <class Lanes, Code code, Rounding rounding, bool stream>
int32_t encode_chunk(const Cast& op, const float* x, float factor, const uint32_t* random, int64_t begin,
                     int64_t count) {
  int32_t largest = 0;
  const int64_t head = stream ? until_aligned(op.out, begin, sizeof(Element<code>), count) : 0;
  int64_t i = encode_vectors<Lane, code, rounding, false>(op.out, x, factor, random, begin, 0, head, largest);
  i = encode_vectors<Lanes, code, rounding, stream>(op.out, x, factor, random, begin, i, count, largest);
  encode_vectors<Lane, code, rounding, false>(op.out, x, factor, random, begin, i, count, largest);
  return largest;
}

/// Codes of one block's vectors as bytes; returns where it stopped.
template <class Lanes, Code code, Rounding rounding>
FASTAGG_INLINE int64_t encode_block_vectors(uint8_t* codes, const float* x, const uint32_t* random, Inverse inverse,
                                            int64_t i, int64_t count) {
  using F = typename Lanes::F;
  using I = typename Lanes::I;
  for (; i + Lanes::width <= count; i += Lanes::width) {
    const F value = load_bytes<F>(x + i);
    I random_bits{};
    if constexpr (rounding == Rounding::stochastic) random_bits = load_bytes<I>(random + i);
    I encoded;
    if constexpr (code == Code::wire_int8 || code == Code::wire_int4) {
      encoded = encode_integer<rounding, F, I>(value, F{} + inverse.first, F{} + inverse.second, random_bits);
    } else {
      encoded = encode<code, rounding, F, I>(value * inverse.first * inverse.second, random_bits);
    }
    Lanes::template store_uint8<false>(codes, i, encoded);
  }
  return i;
}

/// The largest magnitude of a block, and the largest finite one.
struct Magnitudes { int32_t largest, finite; };

template <class Lanes>
FASTAGG_INLINE Magnitudes block_magnitudes(const float* x, int64_t count) {
  int32_t largest = 0, finite = 0;
  typename Lanes::I lanes{};
  int64_t i = 0;
  for (; i + Lanes::width <= count; i += Lanes::width) {
    raise(lanes, load_bytes<typename Lanes::F>(x + i));
  }
  largest = maximum<Lanes>(lanes);
  for (; i < count; ++i) raise(largest, x[i]);
  if (largest < 0x7f800000) return {largest, largest};
  for (i = 0; i < count; ++i) {
    const int32_t magnitude = bit_cast<int32_t>(x[i]) & 0x7fffffff;
    if (magnitude < 0x7f800000 && magnitude > finite) finite = magnitude;
  }
  return {largest, finite};
}

/// A block of a wire of powers of two. A non-finite value marks an integer block by a NaN scale; fp8 codes it as
/// itself.
template <class Lanes, Code code, Rounding rounding>
FASTAGG_INLINE void encode_block(uint8_t* codes, float* scale, const float* x, const uint32_t* random, int64_t count,
                                 Magnitudes magnitudes, Code source) {
  const int exponent = scale_exponent(bit_cast<float>(magnitudes.finite), code);
  *scale = scale_of(exponent);
  if ((code == Code::wire_int8 || code == Code::wire_int4) && magnitudes.largest >= 0x7f800000) {
    *scale = bit_cast<float>(0x7fc00000);
    memset(codes, 0, count);
    return;
  }
  alignas(64) float clamped[kChunk];
  const float ceiling = ceiling_of(code, exponent, source);
  if (bit_cast<float>(magnitudes.finite) > ceiling) {
    for (int64_t i = 0; i < count; ++i) clamped[i] = clamp_finite(x[i], ceiling);
    x = clamped;
  }
  const Inverse inverse = inverse_of(exponent);
  const int64_t done = encode_block_vectors<Lanes, code, rounding>(codes, x, random, inverse, 0, count);
  encode_block_vectors<Lane, code, rounding>(codes, x, random, inverse, done, count);
}

/// A block of signs, one bit an element, and its mean magnitude.
template <class Lanes>
void encode_signs(uint8_t* packed, float* scale, const float* x, int64_t count) {
  constexpr int vectors = kSignStrides / Lanes::width, half = Lanes::width / Lanes::halves;
  using F = typename Lanes::F;
  using I = typename Lanes::I;
  typename Lanes::D sums[vectors][Lanes::halves] = {};
  int64_t i = 0;
  for (; i + kSignStrides <= count; i += kSignStrides) {
    uint32_t bits = 0;
    for (int v = 0; v < vectors; ++v) {
      const F value = load_bytes<F>(x + i + v * Lanes::width);
      bits |= Lanes::signs(value) << (v * Lanes::width);
      typename Lanes::D wide[Lanes::halves];
      Lanes::widen(bit_cast<F>(bit_cast<I>(value) & 0x7fffffff), wide);
      for (int h = 0; h < Lanes::halves; ++h) sums[v][h] = sums[v][h] + wide[h];
    }
    store_bytes(packed + i / 8, static_cast<uint16_t>(bits));
  }
  double strides[kSignStrides];
  for (int v = 0; v < vectors; ++v)
    for (int h = 0; h < Lanes::halves; ++h) store_bytes(strides + v * Lanes::width + h * half, sums[v][h]);
  uint32_t bits = 0;
  for (int stride = 0; i + stride < count; ++stride) {
    strides[stride] += magnitude_of(x[i + stride]);
    bits |= Lane::signs(x[i + stride]) << stride;
  }
  for (; i < count; i += 8, bits >>= 8) packed[i / 8] = static_cast<uint8_t>(bits);
  *scale = sign_scale(strides, count);
}

/// Two codes to a byte, the first in the lower half.
inline void pack_int4(uint8_t* packed, const uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count / 2; ++i) packed[i] = (codes[2 * i] & 15) | static_cast<uint8_t>(codes[2 * i + 1] << 4);
  if (count % 2) packed[count / 2] = codes[count - 1] & 15;
}

template <class Lanes, Code code, Rounding rounding>
int32_t encode_blocks(const Cast& op, const float* x, const uint32_t* random, int64_t begin, int64_t count) {
  const int64_t block = int64_t{1} << op.block_shift;
  int32_t largest = 0;
  uint8_t codes[kChunk];
  for (int64_t i = 0; i < count; i += block) {
    const int64_t elements = count - i < block ? count - i : block;
    float* scale = op.scales + ((begin + i) >> op.block_shift);
    uint8_t* out = static_cast<uint8_t*>(op.out) + encoded_bytes(code, begin + i);
    const Magnitudes magnitudes = block_magnitudes<Lanes>(x + i, elements);
    largest = magnitudes.largest > largest ? magnitudes.largest : largest;
    if constexpr (code == Code::wire_sign) {
      encode_signs<Lanes>(out, scale, x + i, elements);
    } else {
      uint8_t* destination = code == Code::wire_int4 ? codes : out;
      encode_block<Lanes, code, rounding>(destination, scale, x + i, random + i, elements, magnitudes, op.source.code);
      if constexpr (code == Code::wire_int4) pack_int4(out, codes, elements);
    }
  }
  return largest;
}

/// Random numbers of the places [place, place + count).
inline void fill_places(uint32_t* random, const RandomKey& key, int64_t place, int64_t count) {
  for (int64_t i = 0; i < count;) {
    const Random4 four = philox(key, static_cast<uint32_t>((place + i) / 4));
    for (int64_t word = (place + i) % 4; word < 4 && i < count; ++word, ++i) random[i] = four.words[word];
  }
}

/// Random numbers of the elements [begin, begin + count).
inline void fill_random(uint32_t* random, const Cast& op, int64_t begin, int64_t count) {
  if (op.stretch_count == 0) return fill_places(random, op.key, begin, count);
  const int64_t end = begin + count;
  for (int64_t s = 0; s < op.stretch_count; ++s) {
    const int64_t first = op.stretches[s].begin > begin ? op.stretches[s].begin : begin;
    const int64_t next = s + 1 < op.stretch_count ? op.stretches[s + 1].begin : end;
    const int64_t last = next < end ? next : end;
    if (first < last)
      fill_places(random + (first - begin), op.key, op.stretches[s].place + first - op.stretches[s].begin,
                  last - first);
  }
}

/// Encodes a chunk of float32, times a factor that codes with scales do not take, as op.code; returns the largest
/// magnitude.
template <class Lanes>
int32_t encode_any(const Cast& op, const float* x, float factor, int64_t begin, int64_t count, bool stream) {
  alignas(64) uint32_t random[kChunk];
  const bool stochastic = op.rounding == Rounding::stochastic;
  if (stochastic) fill_random(random, op, begin, count);
  int32_t largest = 0;
  with_code(op.code, [&](auto constant) {
    constexpr Code code = constant.value;
    constexpr auto nearest = Rounding::nearest;
    if constexpr (has_scales(code)) {
      largest = stochastic ? encode_blocks<Lanes, code, Rounding::stochastic>(op, x, random, begin, count)
                           : encode_blocks<Lanes, code, nearest>(op, x, random, begin, count);
    } else if constexpr (code <= Code::bfloat16) {
      if (stochastic)
        largest = encode_chunk<Lanes, code, Rounding::stochastic, false>(op, x, factor, random, begin, count);
      else if (stream) largest = encode_chunk<Lanes, code, nearest, true>(op, x, factor, random, begin, count);
      else largest = encode_chunk<Lanes, code, nearest, false>(op, x, factor, random, begin, count);
    }
  });
  return largest;
}

/// Decodes a chunk of any floating code to out[at ...]; returns the largest magnitude.
template <class Lanes>
int32_t decode_any(const Cast& op, float* out, int64_t begin, int64_t at, int64_t count, bool stream) {
  int32_t largest = 0;
  with_code(op.source.code, [&](auto constant) {
    constexpr Code from = constant.value;
    if constexpr (!is_integer(from) && !is_state(from)) {
      largest = stream ? decode_chunk<Lanes, from, true>(op, out, begin, at, count)
                       : decode_chunk<Lanes, from, false>(op, out, begin, at, count);
    }
  });
  return largest;
}

/// `cast` of the elements [begin, end), `begin` a multiple of kChunk; true if nothing became infinite or NaN.
template <class Lanes>
bool cast(const Cast& op, int64_t begin, int64_t end, bool stream) {
  alignas(64) float values[kChunk];
  int32_t largest = 0;
  for (; begin < end; begin += kChunk) {
    const int64_t count = end - begin < kChunk ? end - begin : kChunk;
    int32_t here;
    if (op.source.code == Code::float32 && (op.factor == 1 || !has_scales(op.code))) {
      const float* x = static_cast<const float*>(op.source.data) + begin;
      here = encode_any<Lanes>(op, x, op.factor, begin, count, stream);
    } else if (op.code == Code::float32) {
      here = decode_any<Lanes>(op, static_cast<float*>(op.out), begin, begin, count, stream);
    } else {
      decode_any<Lanes>(op, values, begin, 0, count, false);
      here = encode_any<Lanes>(op, values, 1, begin, count, stream);
    }
    largest = here > largest ? here : largest;
  }
  return largest < overflow_from(op.code);
}

}  // namespace
}  // namespace fastagg

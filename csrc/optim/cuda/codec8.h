// 8-bit codes on the GPU (code books and what decides: book8.h). Eight lanes, an octet, hold a block of 256 elements,
// 32 each, in chunks of Run consecutive ones that neighbouring lanes interleave, so that accesses to data fill whole
// sectors. Codes are in natural order: a lane reads and writes 16 consecutive ones at a time, and lanes exchange words
// in between.
#pragma once
#include "optim/book8.h"
#include "optim/cuda/codec.h"

namespace tilewise::optim {

constexpr int kOctet = kBlock8 / kLaneElements;

template <int Run>
struct Octet {
  static constexpr int kRun = Run, kChunks = kLaneElements / Run;
  using Values = float[kChunks][Run];
  using Codes = uint32_t[8];  // four codes to a word, in the order of Values
  int part;                   // 0..7, this lane's place

  // The first element of chunk c within the block. Before they are exchanged, lane `part` has the codes from 16 part
  // and from 128 + 16 part on.
  SIMT_DEVICE int element(int c) const {
    if constexpr (Run == 4) return 128 * (c >> 2) + 64 * (part >> 2) + 16 * (c & 3) + 4 * (part & 3);
    return 128 * (c >> 1) + 32 * (part >> 1) + 16 * (c & 1) + 8 * (part & 1);
  }
  SIMT_DEVICE uint32_t code(const Codes& words, int c, int i) const {
    return words[(c * Run + i) / 4] >> 8 * (i & 3) & 255;
  }
  SIMT_DEVICE void clear(Codes& words) const {
#pragma unroll
    for (int i = 0; i < 8; i++) words[i] = 0;
  }
  SIMT_DEVICE void put(Codes& words, int c, int i, uint32_t code) const {
    words[(c * Run + i) / 4] |= code << 8 * (i & 3);
  }

  // All lanes of the warp take part; only those with `valid` touch memory.
  SIMT_DEVICE void load_codes(Codes& words, const uint8_t* codes, bool valid) const {
    clear(words);
    if (valid) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const uint4 v = load16(codes + 128 * half + 16 * part);
        words[4 * half] = v.x, words[4 * half + 1] = v.y, words[4 * half + 2] = v.z, words[4 * half + 3] = v.w;
      }
    }
    exchange(words);
  }
  SIMT_DEVICE void store_codes(const Codes& words, uint8_t* codes, bool valid) const {
    Codes out;
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = words[i];
    exchange(out);
    if (!valid) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = 4 * half;
      store16(codes + 128 * half + 16 * part, make_uint4(out[i], out[i + 1], out[i + 2], out[i + 3]));
    }
  }

 private:
  // Transposes 4 words of 4 lanes, or 2 pairs of words of 2 lanes; its own inverse.
  SIMT_DEVICE void exchange(Codes& words) const {
    if constexpr (Run == 4) {
      swap_bit(words, 1, 1);
      swap_bit(words, 2, 2);
    } else {
      swap_bit(words, 1, 2);
    }
  }
  // Exchanges one bit of the lane's number with one of the word's.
  SIMT_DEVICE void swap_bit(Codes& words, int lane_bit, int word_bit) const {
    const bool upper = part & lane_bit;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i & word_bit) continue;
      uint32_t &low = words[i], &high = words[i | word_bit];
      const uint32_t got = shfl_xor(upper ? low : high, lane_bit);
      (upper ? low : high) = got;
    }
  }
};

// Exact decisions at one scale; all of it but `entries` is the same for the eight lanes.
template <bool kSigned>
struct Encoder8 {
  const SearchEntry* entries;  // [8]
  float scale, inverse;        // in units of book.scale_factor

  SIMT_DEVICE Encoder8(const SearchEntry* table, float block_scale) : entries(table) {
    constexpr Book8 book = kSigned ? kSignedBook8 : kUnsignedBook8;
    scale = block_scale * book.scale_factor;
    inverse = 1 / scale;
  }
  // The class of book8.h in integers, 8.24 fixed point: the bits of y without the last 13, times the rounded slope,
  // which is exact in the middle of the range.
  SIMT_DEVICE static int search_class(float y) {
    constexpr Book8 book = kSigned ? kSignedBook8 : kUnsignedBook8;
    constexpr double kMiddle = book.start + 4 * book.width;
    constexpr auto kPerClass = static_cast<uint32_t>(0x1p14 / book.width + .5);
    constexpr auto kStart = static_cast<uint32_t>(0x1p10 * kMiddle * kPerClass) - (4u << 24);
    return static_cast<int>(((f32_bits(y) >> 13) * kPerClass - kStart) >> 24 & 7);
  }
  SIMT_DEVICE uint32_t encode(float x) const {
    constexpr Book8 book = kSigned ? kSignedBook8 : kUnsignedBook8;
    const float a = kSigned ? fabsf(x) : x;
    const uint4 words = load16(entries + search_class(fminf(fmaf(a, inverse, book.least), book.most)));
    const float factor = bits_f32(words.x), offset = bits_f32(words.y), last = bits_f32(words.z);
    // The ordinal below the nearest midpoint, roughly; where that may be wrong, x is at a value, far from midpoints.
    const float product = factor * a;
    const float biased = fminf(fmaf(fmaf(product, inverse, -offset), 1.f / 9, kRoundBias), last);
    const float inner = fmaf(biased - kRoundBias, 9, offset);
    const float midpoint = biased == last ? bits_f32(words.w) : inner;
    // factor a > midpoint scale, both less the rounded product.
    const bool above = fmaf(-midpoint, scale, product) > fmaf(-factor, a, product);
    const int ordinal = static_cast<int>(f32_bits(biased)) - kRoundBiasBits + above;
    if constexpr (!kSigned) return ordinal - 1;
    if (x < 0) return ordinal < 128 ? 127 - ordinal : 0;
    return 127 + ordinal;
  }
};

template <bool kSigned>
struct Decoder8 {
  const ValueEntry* entries;  // [8]
  float factor;

  SIMT_DEVICE Decoder8(const ValueEntry* table, float f) : entries(table), factor(f) {}

  SIMT_DEVICE float decode(uint32_t code) const {
    const float number = bits_f32(0x4b000000u | code);  // 2^23 + code
    const float from_zero = number - 8388735.f;
    const float half_up = kSigned ? fabsf(from_zero) + .5f : number - 8388606.5f;  // ordinal + 1/2
    const uint2 words = load8(entries + (f32_bits(half_up) >> 23 & 7));
    const float value = fmaxf(fmaf(18, half_up, bits_f32(words.x)), 0) * (bits_f32(words.y) * factor);
    return kSigned ? bits_f32(f32_bits(value) ^ (f32_bits(from_zero) & 0x80000000u)) : value;
  }
};

// As Codec4. An entry of the tables is a lane's one access, and eight of them fill the banks at most once: no
// conflicts.
struct Codec8 {
  static constexpr int kBits = 8, kElements = kBlock8, kBytes = kCodeBytes8, kLanes = kOctet;
  template <int Run>
  using Lane = Octet<Run>;

  struct Tables {
    alignas(128) SearchEntry signed_search[8], unsigned_search[8];
    ValueEntry signed_values[8], unsigned_values[8];

    // Thread i writes the entries i.
    template <int I = 0>
    SIMT_DEVICE void fill() {
      if constexpr (I < 8) {
        if (thread_id() == I) {
          constexpr SearchEntry search[2] = {kSignedBook8.search[I], kUnsignedBook8.search[I]};
          constexpr ValueEntry value[2] = {kSignedBook8.value[I], kUnsignedBook8.value[I]};
          signed_search[I] = search[0], unsigned_search[I] = search[1];
          signed_values[I] = value[0], unsigned_values[I] = value[1];
        }
        fill<I + 1>();
      }
    }
  };
  struct SignedDecoder : Decoder8<true> {
    SIMT_DEVICE SignedDecoder(const Tables& t, float f) : Decoder8(t.signed_values, f) {}
  };
  struct UnsignedDecoder : Decoder8<false> {
    SIMT_DEVICE UnsignedDecoder(const Tables& t, float f) : Decoder8(t.unsigned_values, f) {}
  };
  struct SignedEncoder : Encoder8<true> {
    SIMT_DEVICE SignedEncoder(const Tables& t, float scale) : Encoder8(t.signed_search, scale) {}
  };
  struct UnsignedEncoder : Encoder8<false> {
    SIMT_DEVICE UnsignedEncoder(const Tables& t, float scale) : Encoder8(t.unsigned_search, scale) {}
  };
  SIMT_DEVICE static float signed_scale(float absmax) { return fmaxf(warp_max(absmax, kOctet), kMinScale8); }
  SIMT_DEVICE static float unsigned_scale(float max) { return fmaxf(warp_max(max, kOctet), kMinScale8); }
};

}  // namespace tilewise::optim

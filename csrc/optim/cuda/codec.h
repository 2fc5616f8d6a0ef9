// 4-bit codes on the GPU (layout and code books: params.h). Four lanes, a quad, hold a block of 128 elements, 32 each,
// in chunks of Run consecutive ones:
//   Run 4: a lane holds all the elements of its four words, in eight chunks.
//   Run 8: for 16-bit data, where 16 bytes are eight elements. A lane holds the low (or its neighbour the high) nibbles
//          of eight words, in four chunks; before the store the two exchange halves.
// Either way a lane stores words 4 part .. 4 part + 3, and every access to codes or data is 16 bytes.
#pragma once
#include "optim/cuda/runs.h"
#include "optim/params.h"

namespace tilewise::optim {

constexpr int kLaneElements = 32;
constexpr int kQuad = kBlock / kLaneElements;

template <int Run>
struct Quad {
  static constexpr int kRun = Run, kChunks = kLaneElements / Run;
  using Values = float[kChunks][Run];
  using Codes = uint32_t[Run];
  int part;  // 0..3, this lane's place

  // The first element of chunk c within the block, and where its codes stand in their words.
  SIMT_DEVICE int element(int c) const {
    return Run == 4 ? 16 * c + 4 * part : 64 * (part & 1) + 16 * c + 8 * (part >> 1);
  }
  SIMT_DEVICE int shift(int c) const { return Run == 4 ? 8 * (c & 3) + 4 * (c >> 2) : 8 * c + 4 * (part & 1); }

  // The code of element i of chunk c.
  SIMT_DEVICE uint32_t code(const Codes& words, int c, int i) const { return words[i] >> shift(c) & 15; }
  SIMT_DEVICE void clear(Codes& words) const {
#pragma unroll
    for (int i = 0; i < Run; i++) words[i] = 0;
  }
  SIMT_DEVICE void put(Codes& words, int c, int i, uint32_t code) const { words[i] |= code << shift(c); }

  // All lanes of the warp take part; only those with `valid` load.
  SIMT_DEVICE void load_codes(Codes& words, const uint8_t* codes, bool valid) const {
    clear(words);
    if (valid) load_codes(words, codes);
  }
  SIMT_DEVICE void load_codes(uint32_t (&words)[Run], const uint8_t* codes) const {
    const uint8_t* mine = codes + (Run == 4 ? 16 * part : 32 * (part >> 1));
#pragma unroll
    for (int i = 0; i < Run; i += 4) {
      const uint4 v = load16(mine + 4 * i);
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  }

  // All lanes of the warp take part; only those with `valid` store.
  SIMT_DEVICE void store_codes(const uint32_t (&words)[Run], uint8_t* codes, bool valid) const {
    uint32_t out[4];
    const bool high = part & 1;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out[i] = words[i];
      if constexpr (Run == 8) {
        const uint32_t kept = high ? words[4 + i] : words[i], given = high ? words[i] : words[4 + i];
        out[i] = kept | shfl_xor(given, 1);
      }
    }
    if (valid) store16(codes + 16 * part, make_uint4(out[0], out[1], out[2], out[3]));
  }
};

// The largest float <= a * b, for positive a and b: then x > a * b in the reals exactly when x > product_down(a, b).
// The fused remainder rounds once, so its sign is exact.
SIMT_DEVICE float product_down(float a, float b) {
  const float product = a * b;
  return fmaf(a, b, -product) < 0 ? bits_f32(f32_bits(product) - 1) : product;
}

// Codes of first moments at one scale.
struct SignedCodec {
  float thresholds[8];

  SIMT_DEVICE explicit SignedCodec(float scale) {
    constexpr Magnitudes book = kMagnitudes;
#pragma unroll
    for (int i = 0; i < 8; i++) thresholds[i] = product_down(book.midpoint[i], scale);
  }
  // Nearest, a tie to the smaller magnitude: three steps of bisection over seven thresholds, then the eighth, which
  // negative values lack.
  SIMT_DEVICE uint32_t encode(float x) const {
    const float a = fabsf(x);
    const bool four = a > thresholds[3];
    const bool two = a > (four ? thresholds[5] : thresholds[1]);
    const float last = four ? (two ? thresholds[6] : thresholds[4]) : (two ? thresholds[2] : thresholds[0]);
    const int magnitude = 4 * four + 2 * two + (a > last);
    return x < 0 ? kZeroCode - magnitude : kZeroCode + magnitude + (a > thresholds[7]);
  }
};

// Codes of second moments at one scale.
struct UnsignedCodec {
  float unit, inverse;

  // The range a little below 2^16 keeps the fourth root of the scale itself below 16, roughly as it is taken. (The
  // reciprocal of the unit, unlike that of the scale, is never subnormal.)
  SIMT_DEVICE explicit UnsignedCodec(float scale)
      : unit(scale * kFourthPowerUnit), inverse(65000.f / 65536 * rcp_approx(unit)) {}
  // The bin b = floor(fourth root) holds the one midpoint (b^2 + b + 1)^2 - 1/2, between codes b - 1 and b; near a
  // bin's edge either bin gives the same code. Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  SIMT_DEVICE uint32_t encode(float x) const {
    const float rounded = rsqrt_approx(rsqrt_approx(x * inverse)) - .5f + 12582912.f;
    const int bin = static_cast<int>(f32_bits(rounded) - 0x4b400000u);
    const float b = rounded - 12582912.f, e = fmaf(b, b, b + 1);
    const int code = bin - 1 + (fmaf(-fmaf(e, e, -.5f), unit, x) > 0);
    return code < 0 ? 0 : code;
  }
};

// The value of an unsigned code at scale 2^16.
SIMT_DEVICE float unsigned_value(uint32_t code) {
  const float j = static_cast<float>(code + 1), square = j * j;
  return square * square;
}

// The values of the signed codes, for look-ups in shared memory: 16 floats in 16 banks, so never a conflict.
SIMT_DEVICE float signed_value(int code) {
  constexpr Magnitudes book = kMagnitudes;
  float value = 0;
#pragma unroll
  for (int i = 1; i < 9; i++) {
    if (code == kZeroCode + i) value = book.value[i];
    if (code == kZeroCode - i) value = -book.value[i];
  }
  return value;
}

SIMT_DEVICE float signed_scale(float absmax) {
  return fmaxf(warp_max(absmax, kQuad), kMinSignedScale);
}
SIMT_DEVICE float unsigned_scale(float max) {
  return fmaxf(warp_max(max, kQuad), kMinUnsignedScale);
}

// What kernels are templates over. `Lane<Run>` says which elements of a block a lane holds and moves their codes; a
// decoder and an encoder are made once per block. Tables are filled by the whole thread block, before a sync_block.
struct Codec4 {
  static constexpr int kBits = 4, kElements = kBlock, kBytes = kCodeBytes, kLanes = kQuad;
  template <int Run>
  using Lane = Quad<Run>;

  struct Tables {
    float signed_values[16];

    SIMT_DEVICE void fill() {
      if (thread_id() < 16) signed_values[thread_id()] = signed_value(thread_id());
    }
  };
  struct SignedDecoder {
    const Tables& tables;
    float factor;
    SIMT_DEVICE SignedDecoder(const Tables& t, float f) : tables(t), factor(f) {}
    SIMT_DEVICE float decode(uint32_t code) const { return tables.signed_values[code] * factor; }
  };
  struct UnsignedDecoder {
    float unit;
    SIMT_DEVICE UnsignedDecoder(const Tables&, float factor) : unit(factor * kFourthPowerUnit) {}
    SIMT_DEVICE float decode(uint32_t code) const { return unsigned_value(code) * unit; }
  };
  struct SignedEncoder : SignedCodec {
    SIMT_DEVICE SignedEncoder(const Tables&, float scale) : SignedCodec(scale) {}
  };
  struct UnsignedEncoder : UnsignedCodec {
    SIMT_DEVICE UnsignedEncoder(const Tables&, float scale) : UnsignedCodec(scale) {}
  };
  // Of the largest magnitude of each lane; every lane of the warp takes part.
  SIMT_DEVICE static float signed_scale(float absmax) { return optim::signed_scale(absmax); }
  SIMT_DEVICE static float unsigned_scale(float max) { return optim::unsigned_scale(max); }
};

// The values of a lane, from its codes and back to them.
template <class Lane, class Decoder>
SIMT_DEVICE void decode_lane(typename Lane::Values& x, const Lane& lane, const typename Lane::Codes& codes,
                             const Decoder& decoder) {
#pragma unroll
  for (int c = 0; c < Lane::kChunks; c++) {
#pragma unroll
    for (int i = 0; i < Lane::kRun; i++) x[c][i] = decoder.decode(lane.code(codes, c, i));
  }
}
template <class Lane, class Encoder>
SIMT_DEVICE void encode_lane(typename Lane::Codes& codes, const Lane& lane, const typename Lane::Values& x,
                             const Encoder& encoder) {
  lane.clear(codes);
#pragma unroll
  for (int c = 0; c < Lane::kChunks; c++) {
#pragma unroll
    for (int i = 0; i < Lane::kRun; i++) lane.put(codes, c, i, encoder.encode(x[c][i]));
  }
}

}  // namespace tilewise::optim

// What the rows of a page hold: value(row, d, dim) of one channel, and store(x, ...), by which a warp writes a row
// whose channels lane + 32 i stand in x[i]. The bytes are those of cpu/source.h.
#pragma once
#include "common/paged/cuda/pages.h"

namespace tilewise::paged {

constexpr int kPerLane = kMaxHeadDim / kWarp;

SIMT_DEVICE float load_float(const float* p) {
  return *p;
}
SIMT_DEVICE float load_float(const bf16* p) {
  return to_f32(*p);
}
SIMT_DEVICE float load_float(const fp16* p) {
  return to_f32(*p);
}
SIMT_DEVICE void store_float(float* p, float v) {
  *p = v;
}
SIMT_DEVICE void store_float(bf16* p, float v) {
  *p = bf16{(uint16_t)pack2<bf16>(v, 0.f)};
}
SIMT_DEVICE void store_float(fp16* p, float v) {
  *p = fp16{(uint16_t)pack2<fp16>(v, 0.f)};
}

// Shared memory of a warp that writes a row.
struct RowCodes {
  uint8_t codes[kMaxHeadDim];
};

template <class T>
struct FloatSource {
  static constexpr int kItem = sizeof(T);

  SIMT_DEVICE static float value(const char* row, int d, int) {
    return load_float(reinterpret_cast<const T*>(row) + d);
  }
  SIMT_DEVICE static void store(const float (&x)[kPerLane], char* row, int dim, RowCodes&) {
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
      if (const int d = lane_id() + i * kWarp; d < dim) store_float(reinterpret_cast<T*>(row) + d, x[i]);
  }
};

template <int Bits>
struct CodeLayout {
  static constexpr int kItem = 1, kBits = Bits, kFields = 8 / Bits, kGroup = 16 * kFields, kMask = (1 << Bits) - 1;

  SIMT_DEVICE static int groups(int dim) { return ceil_div(dim, kGroup); }
  SIMT_DEVICE static int code(const char* row, int d) {
    constexpr int kHalf = 1 << (Bits - 1);
    const int in = d % kGroup, byte = (uint8_t)row[d / kGroup * 16 + in % 16];
    return ((byte >> (Bits * (in / 16)) & kMask) ^ kHalf) - kHalf;
  }
  // Writes the codes in shared memory as bytes.
  SIMT_DEVICE static void pack(const RowCodes& s, char* row, int dim) {
    for (int at = lane_id(); at < groups(dim) * 16; at += kWarp) {
      int byte = 0;
#pragma unroll
      for (int v = 0; v < kFields; v++) {
        const int d = at / 16 * kGroup + v * 16 + at % 16;
        if (d < dim) byte |= s.codes[d] << (Bits * v);
      }
      row[at] = (char)byte;
    }
  }
};

template <int Bits>
struct CodeSource : CodeLayout<Bits> {
  using Layout = CodeLayout<Bits>;
  static constexpr bool kScaled = true;

  SIMT_DEVICE static float half(const char* row, int dim, int which) {
    const uint8_t* at = reinterpret_cast<const uint8_t*>(row) + Layout::groups(dim) * 16 + 2 * which;
    return bits_f32((uint32_t)at[0] << 16 | (uint32_t)at[1] << 24);
  }
  SIMT_DEVICE static float value(const char* row, int d, int dim) {
    return Layout::code(row, d) * half(row, dim, 0) + half(row, dim, 1);
  }
  SIMT_DEVICE static void store(const float (&x)[kPerLane], char* row, int dim, RowCodes& s) {
    constexpr float kLeast = -(float)(1 << (Bits - 1)), kMost = -kLeast - 1.f;
    constexpr float kShare = -kLeast / (kMost - kLeast);  // of the range that lies below code 0
    float low = INFINITY, high = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; i++)
      if (lane_id() + i * kWarp < dim) {
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
        sum += x[i] * 0.f;
      }
    low = -warp_max(-low);
    high = warp_max(high);
    sum = warp_sum(sum);
    uint32_t zero_bits = pack2<bf16>(0.f, low * (1.f - kShare) + high * kShare) & 0xffff0000u;
    const float zero = bits_f32(zero_bits);
    const float needed = fmaxf(fmaxf((low - zero) / kLeast, (high - zero) / kMost), 0.f);
    uint32_t scale_bits = (f32_bits(needed) + 0xffffu) & 0xffff0000u;  // the next bf16 above
    const float scale = bits_f32(scale_bits);
    const bool finite = sum == 0.f && scale < INFINITY && zero - zero == 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const float nearest = finite && scale > 0.f ? ((x[i] - zero) / scale + 12582912.f) - 12582912.f : 0.f;
      const int d = lane_id() + i * kWarp;
      if (d < dim) s.codes[d] = (uint8_t)((int)fminf(fmaxf(nearest, kLeast), kMost) & Layout::kMask);
    }
    sync_warp();
    Layout::pack(s, row, dim);
    if (!finite) zero_bits = 0x7fc00000u, scale_bits = 0;
    const uint32_t pair = scale_bits >> 16 | zero_bits;
    if (lane_id() < 4) row[Layout::groups(dim) * 16 + lane_id()] = (char)(pair >> (8 * lane_id()));
    sync_warp();
  }
};

struct Bfp12Source : CodeLayout<4> {
  static constexpr bool kScaled = false;

  SIMT_DEVICE static float scale(int exponent) { return bits_f32((uint32_t)exponent << 23) * 0.125f; }
  SIMT_DEVICE static float value(const char* row, int d, int dim) {
    const int exponent = (uint8_t)row[groups(dim) * 16 + d / kGroup];
    return code(row, d) * scale(exponent);
  }
  SIMT_DEVICE static void store(const float (&x)[kPerLane], char* row, int dim, RowCodes& s) {
    static_assert(kGroup == kWarp);
#pragma unroll
    for (int i = 0; i < kPerLane; i++) {
      const int d = lane_id() + i * kWarp;
      const uint32_t magnitude = redux_max(d < dim ? f32_bits(x[i]) & 0x7fffffffu : 0u) >> 23;
      const int wanted = magnitude + 1 < 254 ? (int)magnitude + 1 : 254;
      const int exponent = magnitude == 255 ? 255 : magnitude < 4 ? 0 : wanted;
      if (i * kWarp < dim && lane_id() == 0) row[groups(dim) * 16 + i] = (char)exponent;
      float nearest = 0.f;
      if (exponent > 0 && exponent < 255) nearest = (x[i] * (1.f / scale(exponent)) + 12582912.f) - 12582912.f;
      if (d < dim) s.codes[d] = (uint8_t)((int)fminf(fmaxf(nearest, -8.f), 7.f) & 15);
    }
    sync_warp();
    pack(s, row, dim);
    sync_warp();
  }
};

}  // namespace tilewise::paged

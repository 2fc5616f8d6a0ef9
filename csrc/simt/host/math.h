// Approximations, conversions, packed 16-bit arithmetic and bit operations: twin of device/math.h.
#pragma once
#include <string.h>

#include "runtime.h"

namespace simt {

SIMT_DEVICE uint32_t f32_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
SIMT_DEVICE float bits_f32(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

namespace rt {
inline float flush(float v) {
  return fabsf(v) < 1.17549435e-38f ? copysignf(0.f, v) : v;
}  // .ftz
}  // namespace rt

// The approximations are correctly rounded here; a GPU differs in the last bits.
SIMT_DEVICE float exp2_approx(float x) {
  return rt::flush(exp2f(rt::flush(x)));
}
SIMT_DEVICE float log2_approx(float x) {
  return log2f(rt::flush(x));
}
SIMT_DEVICE float rcp_approx(float x) {
  return rt::flush(1.f / rt::flush(x));
}
SIMT_DEVICE float rsqrt_approx(float x) {
  return 1.f / sqrtf(rt::flush(x));
}
SIMT_DEVICE float sqrt_approx(float x) {
  return sqrtf(rt::flush(x));
}
SIMT_DEVICE float tanh_approx(float x) {
  return tanhf(x);
}

SIMT_DEVICE float max_nan(float a, float b) {
  if (a != a || b != b) return bits_f32(0x7fffffffu);
  return a > b || (a == b && signbit(b)) ? a : b;
}

SIMT_DEVICE float2 cos_sin_pi(float x) {
  const double angle = 3.14159265358979323846 * x;
  return {static_cast<float>(cos(angle)), static_cast<float>(sin(angle))};
}

SIMT_DEVICE float to_f32(bf16 v) {
  return bits_f32(static_cast<uint32_t>(v.bits) << 16);
}
SIMT_DEVICE float to_f32(fp16 v) {
  return rt::fp16_to_f32(v.bits);
}
template <class T>
SIMT_DEVICE T from_f32(float v) {
  return T{is_same_v<T, bf16> ? rt::f32_to_bf16(v) : rt::f32_to_fp16(v)};
}
template <class T>
SIMT_DEVICE uint32_t pack2(float lo, float hi) {
  return from_f32<T>(lo).bits | static_cast<uint32_t>(from_f32<T>(hi).bits) << 16;
}
template <class T>
SIMT_DEVICE float2 unpack2(uint32_t v) {
  return {to_f32(T{static_cast<uint16_t>(v)}), to_f32(T{static_cast<uint16_t>(v >> 16)})};
}
SIMT_DEVICE uint32_t to_tf32(float v) {
  const uint32_t bits = f32_bits(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

template <class T = fp16>
SIMT_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  const auto fma = is_same_v<T, bf16> ? rt::fma_bf16 : rt::fma_fp16;
  const auto lo = [](uint32_t v) { return static_cast<uint16_t>(v); };
  const auto hi = [](uint32_t v) { return static_cast<uint16_t>(v >> 16); };
  return fma(lo(a), lo(b), lo(c)) | static_cast<uint32_t>(fma(hi(a), hi(b), hi(c))) << 16;
}
template <class T = fp16>
SIMT_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
  return hfma2<T>(a, b, 0x80008000u);
}
template <class T = fp16>
SIMT_DEVICE uint32_t hadd2(uint32_t a, uint32_t b) {
  return hfma2<T>(a, is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u, b);
}
SIMT_DEVICE uint32_t hneg2(uint32_t a) {
  return a ^ 0x80008000u;
}

SIMT_DEVICE int popc(uint32_t v) {
  return __builtin_popcount(v);
}
SIMT_DEVICE int clz(uint32_t v) {
  return v ? __builtin_clz(v) : 32;
}
SIMT_DEVICE int find_first_set(uint32_t v) {
  return __builtin_ffs(static_cast<int>(v));
}
SIMT_DEVICE uint32_t bit_reverse(uint32_t v) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
  return r;
}
SIMT_DEVICE uint32_t funnel_shift_left(uint32_t lo, uint32_t hi, uint32_t shift) {
  const uint64_t v = static_cast<uint64_t>(hi) << 32 | lo;
  return static_cast<uint32_t>(v << (shift & 31) >> 32);
}
SIMT_DEVICE uint32_t funnel_shift_right(uint32_t lo, uint32_t hi, uint32_t shift) {
  const uint64_t v = static_cast<uint64_t>(hi) << 32 | lo;
  return static_cast<uint32_t>(v >> (shift & 31));
}
SIMT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}
template <int Table>
SIMT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0;
  for (int i = 0; i < 8; i++) {
    if (Table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return r;
}

}  // namespace simt

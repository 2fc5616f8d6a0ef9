// Approximations, conversions, packed 16-bit arithmetic and bit operations.
#pragma once

namespace simt {

// ---- one-instruction approximations; all but tanh flush denormals to zero ----
SIMT_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SIMT_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger; NaN if either is NaN, where fmaxf takes the other.
SIMT_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// (cos(pi x), sin(pi x)) to 2 ulp; no range reduction, so no local memory.
SIMT_DEVICE float2 cos_sin_pi(float x) {
  float2 r;
  sincospif(x, &r.y, &r.x);
  return r;
}

// ---- conversions: to nearest, ties to even ----
SIMT_DEVICE float to_f32(bf16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
SIMT_DEVICE float to_f32(fp16 v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
  return r;
}
template <class T>
SIMT_DEVICE T from_f32(float v) {
  T r;
  if constexpr (is_same_v<T, bf16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
  }
  return r;
}
// Two values in one register, `lo` in the low half.
template <class T>
SIMT_DEVICE uint32_t pack2(float lo, float hi) {
  uint32_t r;
  if constexpr (is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  }
  return r;
}
template <class T>
SIMT_DEVICE float2 unpack2(uint32_t v) {
  return make_float2(to_f32(T{static_cast<uint16_t>(v)}), to_f32(T{static_cast<uint16_t>(v >> 16)}));
}
// Rounds to the 10-bit mantissa of tf32, ties away from zero; the result is what the tf32 mma expects.
SIMT_DEVICE uint32_t to_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}
SIMT_DEVICE uint32_t f32_bits(float v) {
  return __float_as_uint(v);
}
SIMT_DEVICE float bits_f32(uint32_t v) {
  return __uint_as_float(v);
}

// ---- packed arithmetic on two fp16 (default) or bf16 values; each half rounds once ----
template <class T = fp16>
SIMT_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  if constexpr (is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  }
  return r;
}
// sm_80 has no bf16 mul and add; a * b - 0 and a * 1 + b are the same numbers.
template <class T = fp16>
SIMT_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
  if constexpr (is_same_v<T, bf16>) return hfma2<bf16>(a, b, 0x80008000u);
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <class T = fp16>
SIMT_DEVICE uint32_t hadd2(uint32_t a, uint32_t b) {
  if constexpr (is_same_v<T, bf16>) return hfma2<bf16>(a, 0x3f803f80u, b);
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
SIMT_DEVICE uint32_t hneg2(uint32_t a) {
  return a ^ 0x80008000u;
}

// ---- bits ----
SIMT_DEVICE int popc(uint32_t v) {
  return __popc(v);
}
SIMT_DEVICE int clz(uint32_t v) {
  return __clz(static_cast<int>(v));
}
// 1 + the index of the lowest set bit; 0 for 0.
SIMT_DEVICE int find_first_set(uint32_t v) {
  return __ffs(static_cast<int>(v));
}
SIMT_DEVICE uint32_t bit_reverse(uint32_t v) {
  return __brev(v);
}
// The high (left) or low (right) word of hi:lo shifted by shift % 32.
SIMT_DEVICE uint32_t funnel_shift_left(uint32_t lo, uint32_t hi, uint32_t shift) {
  return __funnelshift_l(lo, hi, shift);
}
SIMT_DEVICE uint32_t funnel_shift_right(uint32_t lo, uint32_t hi, uint32_t shift) {
  return __funnelshift_r(lo, hi, shift);
}
// Byte i of the result is byte (selector >> 4 i) & 7 of b:a; bit 3 of the nibble spreads that byte's sign instead.
SIMT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
// Any bitwise function of three words: Table = f(0xf0, 0xcc, 0xaa).
template <int Table>
SIMT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(Table));
  return r;
}

}  // namespace simt

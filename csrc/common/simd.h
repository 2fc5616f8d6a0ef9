// Vectors of the instruction set this file is compiled for: arithmetic is the compiler's own vector extensions; what
// they express badly (16-bit conversions, partial loads, table lookups) is wrapped here.
//
// VF holds W floats, VI as many int32; comparisons give VI masks of 0 / -1. `set1` is spelt with an intrinsic because a
// broadcast written as arithmetic on a zero vector compiles to two instructions on the wrong port.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TILEWISE_INLINE inline __attribute__((always_inline))

namespace tilewise {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float VF __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef float VFu __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t VIu __attribute__((vector_size(W * 4), aligned(4), may_alias));

template <class T>
constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
constexpr float kInfinity = __builtin_huge_valf();

// ---- scalar conversions (round to nearest even; NaN stays NaN) ----
TILEWISE_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
TILEWISE_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}
TILEWISE_INLINE float to_float(float x) {
  return x;
}
TILEWISE_INLINE float to_float(Bf16 x) {
  return bits_to_float(uint32_t(x.bits) << 16);
}
TILEWISE_INLINE float to_float(Fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // 2^112 moves the exponent bias from 15 to 127, and makes subnormals come out right.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}
template <class T>
T from_float(float x);
template <>
TILEWISE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
TILEWISE_INLINE Bf16 from_float<Bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if (x != x) return {0x7fc0};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
TILEWISE_INLINE Fp16 from_float<Fp16>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (rest < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded result in the low mantissa bits
    const uint32_t r = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000;
    return {uint16_t(sign | r)};
  }
  return {uint16_t(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13)};
#endif
}

// ---- splat, loads and stores; `n` gives the number of valid lanes, the rest load as zero and are not stored ----
TILEWISE_INLINE VF set1(float x) {
#if defined(__AVX512F__)
  return (VF)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (VF)_mm256_set1_ps(x);
#else
  return VF{x, x, x, x};
#endif
}
TILEWISE_INLINE VI set1i(int32_t x) {
#if defined(__AVX512F__)
  return (VI)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
  return (VI)_mm256_set1_epi32(x);
#else
  return VI{x, x, x, x};
#endif
}
TILEWISE_INLINE VI iota() {
  VI r;
  for (int i = 0; i < W; i++) r[i] = i;
  return r;
}
// -1 in lanes below n.
TILEWISE_INLINE VI first_lanes(int64_t n) {
  return iota() < set1i(n < W ? int32_t(n) : W);
}

TILEWISE_INLINE VF load(const float* p) {
  return *reinterpret_cast<const VFu*>(p);
}
TILEWISE_INLINE void store(float* p, VF v) {
  *reinterpret_cast<VFu*>(p) = v;
}
TILEWISE_INLINE VI load(const int32_t* p) {
  return *reinterpret_cast<const VIu*>(p);
}
TILEWISE_INLINE void store(int32_t* p, VI v) {
  *reinterpret_cast<VIu*>(p) = v;
}

#if defined(__AVX512F__)
TILEWISE_INLINE __mmask16 lane_mask(int64_t n) {
  return __mmask16(n >= 16 ? 0xffff : (1u << n) - 1);
}
TILEWISE_INLINE VF widen(__m256i h, Bf16) {
  return (VF)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
TILEWISE_INLINE VF widen(__m256i h, Fp16) {
  return (VF)_mm512_cvtph_ps(h);
}
TILEWISE_INLINE __m256i narrow(VF v, Bf16) {
  __m512i u = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(u);
}
TILEWISE_INLINE __m256i narrow(VF v, Fp16) {
  return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
template <class H>
TILEWISE_INLINE VF load_half(const H* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), H{});
}
template <class H>
TILEWISE_INLINE VF load_half(const H* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(lane_mask(n), p), H{});
}
template <class H>
TILEWISE_INLINE void store_half(H* p, VF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, H{}));
}
template <class H>
TILEWISE_INLINE void store_half(H* p, VF v, int64_t n) {
  _mm256_mask_storeu_epi16(p, lane_mask(n), narrow(v, H{}));
}
TILEWISE_INLINE VF load(const float* p, int64_t n) {
  return (VF)_mm512_maskz_loadu_ps(lane_mask(n), p);
}
TILEWISE_INLINE void store(float* p, VF v, int64_t n) {
  _mm512_mask_storeu_ps(p, lane_mask(n), (__m512)v);
}
#elif defined(__AVX2__)
TILEWISE_INLINE VF widen(__m128i h, Bf16) {
  return (VF)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
TILEWISE_INLINE VF widen(__m128i h, Fp16) {
  return (VF)_mm256_cvtph_ps(h);
}
TILEWISE_INLINE __m128i narrow(VF v, Bf16) {
  __m256i u = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  u = _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08));
}
TILEWISE_INLINE __m128i narrow(VF v, Fp16) {
  return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
template <class H>
TILEWISE_INLINE VF load_half(const H* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), H{});
}
template <class H>
TILEWISE_INLINE VF load_half(const H* p, int64_t n) {
  H full[W] = {};
  for (int i = 0; i < W && i < n; i++) full[i] = p[i];
  return load_half(full);
}
template <class H>
TILEWISE_INLINE void store_half(H* p, VF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, H{}));
}
template <class H>
TILEWISE_INLINE void store_half(H* p, VF v, int64_t n) {
  H full[W];
  store_half(full, v);
  for (int i = 0; i < W && i < n; i++) p[i] = full[i];
}
TILEWISE_INLINE VF load(const float* p, int64_t n) {
  return (VF)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
}
TILEWISE_INLINE void store(float* p, VF v, int64_t n) {
  _mm256_maskstore_ps(p, (__m256i)first_lanes(n), (__m256)v);
}
#else
TILEWISE_INLINE VF load(const float* p, int64_t n) {
  VF v = {};
  for (int i = 0; i < W && i < n; i++) v[i] = p[i];
  return v;
}
TILEWISE_INLINE void store(float* p, VF v, int64_t n) {
  for (int i = 0; i < W && i < n; i++) p[i] = v[i];
}
template <class H>
TILEWISE_INLINE VF load_half(const H* p, int64_t n = W) {
  VF v = {};
  for (int i = 0; i < W && i < n; i++) v[i] = to_float(p[i]);
  return v;
}
template <class H>
TILEWISE_INLINE void store_half(H* p, VF v, int64_t n = W) {
  for (int i = 0; i < W && i < n; i++) p[i] = from_float<H>(v[i]);
}
#endif
TILEWISE_INLINE VF load(const Bf16* p) {
  return load_half(p);
}
TILEWISE_INLINE VF load(const Fp16* p) {
  return load_half(p);
}
TILEWISE_INLINE VF load(const Bf16* p, int64_t n) {
  return load_half(p, n);
}
TILEWISE_INLINE VF load(const Fp16* p, int64_t n) {
  return load_half(p, n);
}
TILEWISE_INLINE void store(Bf16* p, VF v) {
  store_half(p, v);
}
TILEWISE_INLINE void store(Fp16* p, VF v) {
  store_half(p, v);
}
TILEWISE_INLINE void store(Bf16* p, VF v, int64_t n) {
  store_half(p, v, n);
}
TILEWISE_INLINE void store(Fp16* p, VF v, int64_t n) {
  store_half(p, v, n);
}

// ---- arithmetic ----
TILEWISE_INLINE VF select(VI mask, VF a, VF b) {
  return mask ? a : b;
}
TILEWISE_INLINE VI select(VI mask, VI a, VI b) {
  return mask ? a : b;
}
TILEWISE_INLINE VF abs(VF v) {
  return (VF)((VI)v & 0x7fffffff);
}
// max and min return b when either operand is NaN, as the hardware instruction does.
TILEWISE_INLINE VF max(VF a, VF b) {
#if defined(__AVX512F__)
  return (VF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
TILEWISE_INLINE VF min(VF a, VF b) {
#if defined(__AVX512F__)
  return (VF)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
TILEWISE_INLINE VF sqrt(VF v) {
#if defined(__AVX512F__)
  return (VF)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (VF)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; i++) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
TILEWISE_INLINE float reduce_add(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
#endif
}
TILEWISE_INLINE float reduce_max(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s = v[0];
  for (int i = 1; i < W; i++) s = s > v[i] ? s : v[i];
  return s;
#endif
}
TILEWISE_INLINE bool any(VI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  return mask[0] | mask[1] | mask[2] | mask[3];
#endif
}

// 2^t for t <= 127, within 1 ulp (the polynomial itself within 2e-9); zero below 2^-126, so that no denormals arise.
// NaN gives NaN, -inf gives 0.
TILEWISE_INLINE VF exp2(VF t) {
  const VF shifted = t + 12582912.f;  // 1.5 * 2^23: the nearest integer stands in the low mantissa bits
  const VF n = shifted - 12582912.f, f = t - n;
  VF p = set1(1.53533620e-4f);
  p = p * f + 1.33988745e-3f;
  p = p * f + 9.61843736e-3f;
  p = p * f + 5.55033247e-2f;
  p = p * f + 2.40226479e-1f;
  p = p * f + 6.93147203e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (VF)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  p *= (VF)(((VI)shifted << 23) + (127 << 23));
  return (VF)((VI)p & ~(t < -126.f));
#endif
}

}  // namespace
}  // namespace tilewise

#include "numbers.h"

#include <math.h>
#include <string.h>

namespace simt {
namespace rt {

namespace {

constexpr uint16_t kCanonicalNan = 0x7fff;  // what the conversion instructions give

uint64_t bits_of(double v) {
  uint64_t bits;
  memcpy(&bits, &v, 8);
  return bits;
}

// a * b + c, rounded to odd: of the two neighbours of an inexact result the one with the odd mantissa. Rounding that to
// a type at least two bits shorter gives the same as rounding the exact value once. The product of two 16-bit floats is
// exact in a double.
double fma_to_odd(double a, double b, double c) {
  const double product = a * b;
  const double sum = product + c;
  if (!isfinite(sum)) return sum;
  const double c_part = sum - product;
  const double error = (product - (sum - c_part)) + (c - c_part);
  if (error == 0 || (bits_of(sum) & 1)) return sum;
  return nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

float to_odd(double v) {
  const float f = static_cast<float>(v);
  if (!isfinite(f) || static_cast<double>(f) == v || (f32_bits(f) & 1)) return f;
  return nextafterf(f, static_cast<double>(f) < v ? INFINITY : -INFINITY);
}

}  // namespace

float fp16_to_f32(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}

uint16_t f32_to_fp16(float v) {
  if (v != v) return kCanonicalNan;
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}

uint16_t f32_to_bf16(float v) {
  if (v != v) return kCanonicalNan;
  const uint32_t bits = f32_bits(v);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t fma_fp16(uint16_t a, uint16_t b, uint16_t c) {
  return f32_to_fp16(to_odd(fma_to_odd(fp16_to_f32(a), fp16_to_f32(b), fp16_to_f32(c))));
}

uint16_t fma_bf16(uint16_t a, uint16_t b, uint16_t c) {
  return f32_to_bf16(to_odd(fma_to_odd(to_f32(bf16{a}), to_f32(bf16{b}), to_f32(bf16{c}))));
}

}  // namespace rt
}  // namespace simt

// A block of a parameter and its gradient as floats, and back: conversions, float32 masters, stochastic rounding.
#pragma once
#include "common/philox.h"
#include "optim/cpu/codec.h"

namespace tilewise {
namespace {

constexpr int kStage = kBlock8;  // the largest block

// body(first, lanes) for vectors of `count` elements; only the last one has fewer than W lanes.
template <class Body>
TILEWISE_INLINE void for_each_vector(int count, const Body& body) {
  int i = 0;
  for (; i + W <= count; i += W) body(i, W);
  if (i < count) body(i, count - i);
}

template <class T>
void widen(const void* from, int64_t element, int count, float* to) {
  const T* x = static_cast<const T*>(from) + element;
  for_each_vector(count, [&](int i, int lanes) { store(to + i, load(x + i, lanes), lanes); });
}
template <class T>
void narrow(const float* from, void* to, int64_t element, int count) {
  T* x = static_cast<T*>(to) + element;
  for_each_vector(count, [&](int i, int lanes) { store(x + i, load(from + i, lanes), lanes); });
}
inline void widen(Float type, const void* from, int64_t element, int count, float* to) {
  constexpr decltype(&widen<float>) by_type[] = {&widen<float>, &widen<Bf16>, &widen<Fp16>};
  by_type[int(type)](from, element, count, to);
}
inline void narrow(Float type, const float* from, void* to, int64_t element, int count) {
  constexpr decltype(&narrow<float>) by_type[] = {&narrow<float>, &narrow<Bf16>, &narrow<Fp16>};
  by_type[int(type)](from, to, element, count);
}

// ---- a bf16 parameter with the rest of its float32 master ----
inline void load_master(const StepTensor& t, int64_t element, int count, float* to) {
  const uint16_t* high = static_cast<const uint16_t*>(t.param) + element;
  const int16_t* rest = t.residual + element;
  for (int i = 0; i < count; i++) to[i] = bits_to_float((uint32_t(high[i]) << 16) + uint32_t(int32_t(rest[i])));
}
inline void store_master(const float* from, const StepTensor& t, int64_t element, int count) {
  uint16_t* high = static_cast<uint16_t*>(t.param) + element;
  int16_t* rest = t.residual + element;
  for (int i = 0; i < count; i++) {
    const uint32_t bits = float_to_bits(from[i]);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    const uint32_t rounded = nan ? 0x7fc0 : (bits + 0x8000) >> 16;
    high[i] = uint16_t(rounded);
    rest[i] = nan ? 0 : int16_t(bits - (rounded << 16));
  }
}

// ---- stochastic rounding: away from zero with the probability of what truncation drops ----
constexpr int kGroup = 8;  // elements that share four random words, the low half of a word before its high half

struct RandomKey {
  uint32_t seed, stream, step;
};

// 16 bits for each of `count` elements from `element` on, a multiple of 8.
inline void random_bits(RandomKey key, int64_t element, int count, uint32_t* to) {
  const Philox philox(key.seed | uint64_t(key.stream) << 32);
  for (int64_t first = element / kGroup; count > 0; first += W, count -= W * kGroup, to += W * kGroup) {
    VU low, high, words[4];
    for (int i = 0; i < W; i++) {
      low[i] = uint32_t(first + i);
      high[i] = uint32_t(uint64_t(first + i) >> 32);
    }
    philox.words(low, high, (VU)set1i(int32_t(key.step)), words);
    for (int i = 0; i < min_of(W, (count + kGroup - 1) / kGroup); i++) {
      for (int w = 0; w < 4; w++) {
        to[i * kGroup + 2 * w] = words[w][i] & 0xffff;
        to[i * kGroup + 2 * w + 1] = words[w][i] >> 16;
      }
    }
  }
}

inline void round_stochastically(Bf16*, const uint32_t* random, int count, float* x) {
  for (int i = 0; i < count; i++) {
    const uint32_t bits = float_to_bits(x[i]), rounded = (bits + random[i]) & 0xffff0000;
    x[i] = bits_to_float((bits & 0x7fffffff) >= 0x7f800000 ? bits : rounded);
  }
}
inline void round_stochastically(Fp16*, const uint32_t* random, int count, float* x) {
  constexpr float kSmallestNormal = 0x1p-14f, kLargest = 65504;
  for (int i = 0; i < count; i++) {
    const uint32_t bits = float_to_bits(x[i]), sign = bits & 0x80000000;
    const float a = bits_to_float(bits ^ sign);
    const float normal = bits_to_float((bits + (random[i] >> 3)) & 0xffffe000);
    const float units = float(int32_t(min_of(a, kSmallestNormal) * 0x1p24f + float(int32_t(random[i])) * 0x1p-16f));
    const float subnormal = bits_to_float(float_to_bits(units * 0x1p-24f) | sign);
    const float rounded = a < kSmallestNormal ? subnormal : normal;
    x[i] = a < kLargest ? rounded : x[i];  // also infinity and NaN
  }
}
template <class T>
void store_stochastically(float* from, const StepTensor& t, int64_t element, int count, RandomKey key) {
  uint32_t random[kStage];
  random_bits(key, element, count, random);
  round_stochastically(static_cast<T*>(t.param), random, count, from);
  narrow<T>(from, t.param, element, count);
}

// ---- a whole parameter ----
inline void load_param(const StepTensor& t, int64_t element, int count, float* to) {
  if (t.residual) return load_master(t, element, count, to);
  widen(t.param_type, t.param, element, count, to);
}
inline void store_param(float* from, const StepParams& p, const StepTensor& t, int64_t element, int count) {
  const RandomKey key = {p.seed, t.stream, t.step_number};
  const bool stochastic = p.stochastic_rounding && !t.residual;
  if (stochastic && t.param_type == Float::bf16) return store_stochastically<Bf16>(from, t, element, count, key);
  if (stochastic && t.param_type == Float::f16) return store_stochastically<Fp16>(from, t, element, count, key);
  if (t.residual) return store_master(from, t, element, count);
  narrow(t.param_type, from, t.param, element, count);
}

// grad_factor * grad + l2 * param; the param is looked at only where l2 is not zero.
inline void load_grad(const StepParams& p, const StepTensor& t, int64_t element, int count, const float* param,
                      float* to) {
  widen(t.grad_type, t.grad, element, count, to);
  const VF factor = set1(p.grad_factor), l2 = set1(p.l2);
  if (p.grad_factor != 1)
    for_each_vector(count, [&](int i, int lanes) { store(to + i, load(to + i, lanes) * factor, lanes); });
  if (p.l2 != 0)
    for_each_vector(count,
                    [&](int i, int lanes) { store(to + i, load(param + i, lanes) * l2 + load(to + i, lanes), lanes); });
}

}  // namespace
}  // namespace tilewise

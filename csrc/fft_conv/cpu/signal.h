// What the first pass reads and the last one writes: rows of u, gates and gradients in their own dtype, fp32 inside.
#pragma once
#include "common/isa.h"

namespace tilewise {
namespace {

// Lanes i .. i + W - 1 of a row of `length`; zero outside it.
template <class T>
TILEWISE_INLINE VF load_clipped(const T* row, int64_t i, int64_t length) {
  if (i + W <= length) return load(row + i);
  return i < length ? load(row + i, length - i) : set1(0.f);
}
template <class T>
TILEWISE_INLINE void store_clipped(T* row, int64_t i, int64_t length, VF v) {
  if (i + W <= length)
    store(row + i, v);
  else if (i < length)
    store(row + i, v, length - i);
}

// a * gate, as the transforms see it.
template <class T>
struct Signal {
  const T* a;     // [l]
  const T* gate;  // [l] or null
  int64_t length;

  TILEWISE_INLINE VF full(int64_t i) const { return gate ? load(a + i) * load(gate + i) : load(a + i); }
  TILEWISE_INLINE VF clipped(int64_t i) const {
    const VF v = load_clipped(a, i, length);
    return gate ? v * load_clipped(gate, i, length) : v;
  }
};

// Where a result v of the last pass goes: out = gate * (v + skip * bypass), twice with different gates if need be.
template <class T>
struct Sink {
  T* out;         // [l] or null
  const T* gate;  // [l] or null
  int64_t length;
  float skip = 0;
  Signal<T> bypass = {};  // read only where skip_used
  bool skip_used = false;
  T* second_out = nullptr;
  const T* second_gate = nullptr;

  TILEWISE_INLINE void full(int64_t i, VF v) const {
    if (skip_used) v += set1(skip) * bypass.full(i);
    if (out) store(out + i, gate ? v * load(gate + i) : v);
    if (second_out) store(second_out + i, v * load(second_gate + i));
  }
  TILEWISE_INLINE void clipped(int64_t i, VF v) const {
    if (i >= length) return;
    if (skip_used) v += set1(skip) * bypass.clipped(i);
    if (out) store_clipped(out, i, length, gate ? v * load_clipped(gate, i, length) : v);
    if (second_out) store_clipped(second_out, i, length, v * load_clipped(second_gate, i, length));
  }
};

// sum a_i b_i of two signals, in blocks short enough for fp32.
template <class T>
inline double dot(const Signal<T>& a, const Signal<T>& b) {
  constexpr int64_t kBlock = 32 * W;
  double sum = 0;
  for (int64_t begin = 0; begin < a.length; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, a.length);
    VF even = set1(0.f), odd = set1(0.f);
    for (int64_t i = begin; i < end; i += 2 * W) {
      even += a.clipped(i) * b.clipped(i);
      odd += a.clipped(i + W) * b.clipped(i + W);
    }
    sum += reduce_add(even + odd);
  }
  return sum;
}

}  // namespace
}  // namespace tilewise

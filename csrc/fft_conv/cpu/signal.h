// What the first pass reads and the last one writes: rows of u, gates and gradients in their own dtype, fp32 inside.
//
// The passes know rows only through `count` vectors, `step` samples apart, that a row's own function fetches or puts;
// whole vectors of a plain fp32 row they read and write themselves. That keeps one instance of a pass per radix.
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
struct Signal {
  const void* a;     // [l]
  const void* gate;  // [l] or null
  int64_t length;
  void (*fetch)(const Signal&, int64_t i, int64_t step, int count, float* to);
  bool plain;  // fp32 and no gate

  const float* floats() const { return static_cast<const float*>(a); }
};

template <class T>
TILEWISE_INLINE VF sample(const Signal& s, int64_t i) {
  const VF v = load_clipped(static_cast<const T*>(s.a), i, s.length);
  return s.gate ? v * load_clipped(static_cast<const T*>(s.gate), i, s.length) : v;
}
template <class T>
void fetch(const Signal& s, int64_t i, int64_t step, int count, float* to) {
  for (int c = 0; c < count; c++) store(to + c * W, sample<T>(s, i + c * step));
}
template <class T>
constexpr bool is_float(const T*) {
  return false;
}
constexpr bool is_float(const float*) {
  return true;
}
template <class T>
inline Signal signal(const T* a, const T* gate, int64_t length) {
  return {a, gate, length, &fetch<T>, is_float(a) && !gate};
}

// Where a result v of the last pass goes: out = gate * (v + skip * bypass), and once more with another gate.
struct Sink {
  void* out;         // [l] or null
  const void* gate;  // [l] or null
  int64_t length;
  void (*put)(const Sink&, int64_t i, int64_t step, int count, const float* from);
  bool plain = false;  // fp32, nothing to multiply or add
  const float* skip = nullptr;
  Signal bypass = {};  // read only if there is a skip
  void* second_out = nullptr;
  const void* second_gate = nullptr;

  float* floats() const { return static_cast<float*>(out); }
};

template <class T>
TILEWISE_INLINE void put_one(const Sink& s, int64_t i, VF v) {
  if (i >= s.length) return;
  if (s.skip) v += set1(*s.skip) * sample<T>(s.bypass, i);
  const VF first = s.gate ? v * load_clipped(static_cast<const T*>(s.gate), i, s.length) : v;
  if (s.out) store_clipped(static_cast<T*>(s.out), i, s.length, first);
  if (!s.second_out) return;
  const VF second = v * load_clipped(static_cast<const T*>(s.second_gate), i, s.length);
  store_clipped(static_cast<T*>(s.second_out), i, s.length, second);
}
template <class T>
void put(const Sink& s, int64_t i, int64_t step, int count, const float* from) {
  for (int c = 0; c < count; c++) put_one<T>(s, i + c * step, load(from + c * W));
}

template <class T>
inline Sink sink(T* out, const T* gate, int64_t length) {
  return {out, gate, length, &put<T>};
}

// sum a_i b_i of two signals, in blocks short enough for fp32.
template <class T>
inline double dot(const Signal& a, const Signal& b) {
  constexpr int64_t kBlock = 32 * W;
  double sum = 0;
  for (int64_t begin = 0; begin < a.length; begin += kBlock) {
    const int64_t end = min_of(begin + kBlock, a.length);
    VF even = set1(0.f), odd = set1(0.f);
    for (int64_t i = begin; i < end; i += 2 * W) {
      even += sample<T>(a, i) * sample<T>(b, i);
      odd += sample<T>(a, i + W) * sample<T>(b, i + W);
    }
    sum += reduce_add(even + odd);
  }
  return sum;
}

}  // namespace
}  // namespace tilewise

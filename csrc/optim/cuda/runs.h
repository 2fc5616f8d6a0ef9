// Runs of consecutive elements between global memory and registers: 16-byte accesses where the data is aligned and the
// run inside the n elements, single elements elsewhere. Missing elements read as zero.
#pragma once
#include "simt/simt.h"

namespace tilewise::optim {

using namespace simt;

template <class T>
SIMT_DEVICE float widen(T v) {
  if constexpr (is_same_v<T, float>)
    return v;
  else
    return to_f32(v);
}

// `Run` elements of T as 32-bit words.
template <class T, int Run>
struct RunWords {
  static constexpr int kCount = Run * static_cast<int>(sizeof(T)) / 4;
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  uint32_t word[kCount];

  SIMT_DEVICE uint32_t element(int i) const {
    if constexpr (kPerWord == 1)
      return word[i];
    else
      return word[i / 2] >> 16 * (i & 1) & 0xffff;
  }
};

template <class T, int Run>
SIMT_DEVICE void load_words(RunWords<T, Run>& out, const T* data, int64_t at, int64_t n, bool aligned) {
  constexpr int kCount = RunWords<T, Run>::kCount;
  static_assert(kCount == 2 || kCount % 4 == 0, "whole accesses");
  const T* from = data + at;
  if (aligned && at + Run <= n) {
    if constexpr (kCount == 2) {
      const uint2 v = load8(from);
      out.word[0] = v.x, out.word[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 v = load16_stream(reinterpret_cast<const uint32_t*>(from) + i);
        out.word[i] = v.x, out.word[i + 1] = v.y, out.word[i + 2] = v.z, out.word[i + 3] = v.w;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i++) out.word[i] = 0;
#pragma unroll
  for (int i = 0; i < Run; i++) {
    if (at + i >= n) continue;
    if constexpr (sizeof(T) == 4)
      out.word[i] = load4(from + i);
    else
      out.word[i / 2] |= static_cast<uint32_t>(load2(from + i)) << 16 * (i & 1);
  }
}

template <class T, int Run>
SIMT_DEVICE void store_words(const RunWords<T, Run>& x, T* data, int64_t at, int64_t n, bool aligned) {
  constexpr int kCount = RunWords<T, Run>::kCount;
  T* to = data + at;
  if (aligned && at + Run <= n) {
    if constexpr (kCount == 2) {
      store8(to, make_uint2(x.word[0], x.word[1]));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4)
        store16_stream(reinterpret_cast<uint32_t*>(to) + i,
                       make_uint4(x.word[i], x.word[i + 1], x.word[i + 2], x.word[i + 3]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < Run; i++) {
    if (at + i >= n) continue;
    if constexpr (sizeof(T) == 4)
      store4(to + i, x.element(i));
    else
      store2(to + i, static_cast<uint16_t>(x.element(i)));
  }
}

template <class T, int Run>
SIMT_DEVICE void load_run(float (&x)[Run], const T* data, int64_t at, int64_t n, bool aligned) {
  RunWords<T, Run> words;
  load_words(words, data, at, n, aligned);
#pragma unroll
  for (int i = 0; i < Run; i++) {
    if constexpr (is_same_v<T, float>)
      x[i] = bits_f32(words.word[i]);
    else
      x[i] = to_f32(T{static_cast<uint16_t>(words.element(i))});
  }
}

// Rounded to nearest.
template <class T, int Run>
SIMT_DEVICE void store_run(const float (&x)[Run], T* data, int64_t at, int64_t n, bool aligned) {
  RunWords<T, Run> words;
#pragma unroll
  for (int i = 0; i < RunWords<T, Run>::kCount; i++) {
    if constexpr (is_same_v<T, float>)
      words.word[i] = f32_bits(x[i]);
    else
      words.word[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  }
  store_words(words, data, at, n, aligned);
}

}  // namespace tilewise::optim

// A boolean mask as bits, 32 keys a word.
#pragma once
#include "attention/cpu/problem.h"

namespace tilewise {
namespace {

// Bytes of 0 or 1 as the bits of a number, the first lowest: the product brings the lowest bit of byte i to bit 56 + i.
inline uint32_t eight_bits(const uint8_t* bytes) {
  uint64_t x;
  __builtin_memcpy(&x, bytes, 8);
  return uint32_t((x * 0x0102040810204080) >> 56);
}

inline void pack_row(const uint8_t* from, int64_t stride, int64_t keys, uint32_t* to) {
  for (int64_t key = 0; key < keys; key += 32) {
    const int64_t count = min_of<int64_t>(32, keys - key);
    uint32_t word = 0;
    if (stride == 1 && count == 32)
      for (int i = 0; i < 32; i += 8) word |= eight_bits(from + key + i) << i;
    else
      for (int64_t i = 0; i < count; i++) word |= uint32_t(from[(key + i) * stride] != 0) << i;
    *to++ = word;
  }
}

const char* pack_mask(const PackMaskParams& p, const Runtime& rt) {
  const int64_t words = ceil_div(p.keys, 32), rows = p.sizes[0] * p.sizes[1] * p.sizes[2];
  parallel_for(rt, rows, ceil_div(65536, max_of<int64_t>(p.keys, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i % p.sizes[2], head = i / p.sizes[2] % p.sizes[1], batch = i / p.sizes[2] / p.sizes[1];
      pack_row(p.mask + batch * p.strides[0] + head * p.strides[1] + row * p.strides[2], p.key_stride, p.keys,
               p.words + i * words);
    }
  });
  return nullptr;
}

}  // namespace
}  // namespace tilewise

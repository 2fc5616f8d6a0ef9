// Block-wise quantisation of a whole tensor, and back.
#pragma once
#include "optim/cpu/codec.h"

namespace tilewise {
namespace {

// Runs body(values of block b, b) over all blocks; the last one through a copy padded with zeros.
template <class Body>
void for_each_block(const CodecParams& p, const Runtime& rt, bool write, const Body& body) {
  parallel_for(rt, ceil_div(p.n, kBlock), 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      float* values = p.values + b * kBlock;
      const int64_t count = p.n - b * kBlock;
      if (count >= kBlock) {
        body(values, b);
        continue;
      }
      float padded[kBlock] = {};
      __builtin_memcpy(padded, values, count * sizeof(float));
      body(padded, b);
      if (write) __builtin_memcpy(values, padded, count * sizeof(float));
    }
  });
}

// Values that are not finite count as zero, as in a step.
inline void quantize_block(const CodecParams& p, const float* values, int64_t b) {
  BlockValues x;
  for (int i = 0; i < kVectors; i++) {
    const VF value = load(values + i * W);
    x[i] = select((VI)(abs(value) < set1(kInfinity)), value, set1(0));
    if (!p.is_signed) x[i] = max(x[i], set1(0));
  }
  float& scale = p.scales[b * p.scale_stride];
  uint8_t* codes = p.codes + b * kCodeBytes;
  if (p.is_signed) {
    scale = signed_scale(x);
    encode_signed(x, scale, codes);
  } else {
    scale = unsigned_scale(max_bits(x));
    encode_unsigned(x, scale, codes);
  }
}

const char* quantize(const CodecParams& p, const Runtime& rt) {
  for_each_block(p, rt, false, [&](float* values, int64_t b) { quantize_block(p, values, b); });
  return nullptr;
}

const char* dequantize(const CodecParams& p, const Runtime& rt) {
  for_each_block(p, rt, true, [&](float* values, int64_t b) {
    BlockValues x;
    const float scale = p.scales[b * p.scale_stride];
    (p.is_signed ? decode_signed : decode_unsigned)(p.codes + b * kCodeBytes, scale, x);
    for (int i = 0; i < kVectors; i++) store(values + i * W, x[i]);
  });
  return nullptr;
}

}  // namespace
}  // namespace tilewise

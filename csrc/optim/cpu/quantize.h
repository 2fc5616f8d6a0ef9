// Block-wise quantisation of a whole tensor, and back.
#pragma once
#include "optim/cpu/codec8.h"

namespace tilewise {
namespace {

// Runs body(values of block b, b) over all blocks; the last one through a copy padded with zeros.
template <class Codec, class Body>
void for_each_block(const CodecParams& p, const Runtime& rt, bool write, const Body& body) {
  constexpr int kElements = Codec::kElements;
  parallel_for(rt, ceil_div(p.n, kElements), 8192 / kElements, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      float* values = p.values + b * kElements;
      const int64_t count = p.n - b * kElements;
      if (count >= kElements) {
        body(values, b);
        continue;
      }
      float padded[kElements] = {};
      __builtin_memcpy(padded, values, count * sizeof(float));
      body(padded, b);
      if (write) __builtin_memcpy(values, padded, count * sizeof(float));
    }
  });
}

// Values that are not finite count as zero, as in a step.
template <class Codec>
void quantize_block(const CodecParams& p, const float* values, int64_t b) {
  StateBlock<Codec> x;
  for (int i = 0; i < Codec::kPieces * kVectors; i++) {
    const VF value = load(values + i * W), usable = select((VI)(abs(value) < set1(kInfinity)), value, set1(0));
    x[i / kVectors][i % kVectors] = p.is_signed ? usable : max(usable, set1(0));
  }
  const float scale = p.is_signed ? signed_scale<Codec>(x) : unsigned_scale<Codec>(x);
  p.scales[b * p.scale_stride] = scale;
  for (int i = 0; i < Codec::kPieces; i++) {
    uint8_t* codes = p.codes + b * Codec::kBytes + i * Codec::kPieceBytes;
    p.is_signed ? encode<typename Codec::SignedEncoder>(x[i], scale, codes)
                : encode<typename Codec::UnsignedEncoder>(x[i], scale, codes);
  }
}

template <class Codec>
void dequantize_block(const CodecParams& p, float* values, int64_t b) {
  const float scale = p.scales[b * p.scale_stride];
  for (int i = 0; i < Codec::kPieces; i++) {
    const uint8_t* codes = p.codes + b * Codec::kBytes + i * Codec::kPieceBytes;
    BlockValues x;
    p.is_signed ? Codec::decode_signed(codes, scale, x) : Codec::decode_unsigned(codes, scale, x);
    for (int j = 0; j < kVectors; j++) store(values + i * kBlock + j * W, x[j]);
  }
}

template <class Codec>
void quantize_blocks(const CodecParams& p, const Runtime& rt) {
  for_each_block<Codec>(p, rt, false, [&](float* values, int64_t b) { quantize_block<Codec>(p, values, b); });
}

template <class Codec>
void dequantize_blocks(const CodecParams& p, const Runtime& rt) {
  for_each_block<Codec>(p, rt, true, [&](float* values, int64_t b) { dequantize_block<Codec>(p, values, b); });
}

const char* quantize(const CodecParams& p, const Runtime& rt) {
  p.bits == 4 ? quantize_blocks<Codec4>(p, rt) : quantize_blocks<Codec8>(p, rt);
  return nullptr;
}

const char* dequantize(const CodecParams& p, const Runtime& rt) {
  p.bits == 4 ? dequantize_blocks<Codec4>(p, rt) : dequantize_blocks<Codec8>(p, rt);
  return nullptr;
}

}  // namespace
}  // namespace tilewise

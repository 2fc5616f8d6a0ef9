// Writing a cache: new keys, rotated on the way in, and values; or keys that stand there already, rotated further.
#pragma once
#include "attention/params.h"
#include "common/isa.h"
#include "common/paged/cpu/attention.h"
#include "common/paged/cpu/encode.h"

namespace tilewise {
namespace {

using namespace attention;

// Rotary embedding (Su et al., arXiv:2104.09864) of the first `rotary` channels.
inline void rotate(float* x, const float* cos, const float* sin, int rotary, bool interleaved) {
  const int half = rotary / 2, step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
  for (int i = 0; i < half; i++) {
    float &a = x[i * step], &b = x[i * step + other];
    const float turned = a * cos[i] - b * sin[i];
    b = b * cos[i] + a * sin[i];
    a = turned;
  }
}

inline void divide(float* x, const float* channels, int dim) {
  if (channels)
    for (int d = 0; d < dim; d++) x[d] /= channels[d];
}

template <class Rows>
void write_rows(const Rows& rows, const CacheWriteParams& p, const Runtime& rt) {
  constexpr int item = Rows::kItem;
  const int dim = p.dim;
  const auto read = [&](const void* input, const paged::TokenStrides& s, int64_t b, int64_t i, int h, float* x) {
    paged::with_type(p.type, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(input) + b * s.batch + i * s.token + h * s.head;
      for (int d = 0; d < dim; d += W) store(x + d, load(from + d, dim - d), dim - d);
    });
  };
  parallel_for(rt, int64_t(p.batch) * p.tokens, 4, [&](int64_t begin, int64_t end) {
    float x[paged::kMaxHeadDim];
    for (int64_t at = begin; at < end; at++) {
      const int64_t b = at / p.tokens, i = at % p.tokens;
      const paged::PageCursor cursor(p.table, b, p.positions ? p.positions[at] : p.start[b] + i);
      const int64_t angles = b * p.rotary_batch + i * (p.rotary / 2);
      for (int h = 0; h < p.kv_heads; h++) {
        const float* channels = p.k_channels ? p.k_channels + int64_t(h) * dim : nullptr;
        char* row = static_cast<char*>(p.k_pages) + (cursor.offset(p.k_strides) + h * p.k_strides.head) * item;
        if (p.k) {
          read(p.k, p.k_input, b, i, h, x);
        } else {
          rows.widen(x, row);
          for (int d = 0; channels && d < dim; d++) x[d] *= channels[d];
        }
        if (p.cos) rotate(x, p.cos + angles, p.sin + angles, p.rotary, p.interleaved);
        divide(x, channels, dim);
        encode(rows, row, x);
        if (!p.v_pages) continue;
        read(p.v, p.v_input, b, i, h, x);
        divide(x, p.v_channels ? p.v_channels + int64_t(h) * dim : nullptr, dim);
        encode(rows, static_cast<char*>(p.v_pages) + (cursor.offset(p.v_strides) + h * p.v_strides.head) * item, x);
      }
    }
  });
}

const char* cache_write(const CacheWriteParams& p, const Runtime& rt) {
  if (p.format == paged::Format::native)
    paged::with_type(p.type, [&](auto type) { write_rows(paged::FloatRows<decltype(type)>(p.dim), p, rt); });
  else
    paged::with_codes(p.format, p.dim, [&](const auto& rows) { write_rows(rows, p, rt); });
  return nullptr;
}

}  // namespace
}  // namespace tilewise

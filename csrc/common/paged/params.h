// What attention over a paged cache receives on every machine, whatever decides who sees what. Plain C: the per-ISA
// objects include it too.
#pragma once
#include "common/runtime.h"

namespace tilewise::paged {

constexpr int kMaxHeadDim = 256;

enum class Type : int { f32, f16, bf16 };

// What a row of a page is: numbers of the queries' type, or codes (cpu/source.h describes the bytes).
enum class Format : int { native, int8, int4, int2, bfp12 };

// K and V of a layer in pages, and whose pages they are. Strides in elements (bytes of codes); rows are contiguous.
struct PageStrides {
  int64_t page, slot, head;
};
struct BlockTable {
  const int32_t* pages;  // [b, pages_per_row]
  int64_t row_stride;
  int pages_per_row, page_size;
  int pool;  // pages that exist
};
// Strides of one value per token and head, or of a row of them.
struct TokenStrides {
  int64_t batch, token, head;
};

struct AttentionParams {
  const void* q;                  // [b, tokens, hq, d]
  const void *k_pages, *v_pages;  // [p, page_size, hkv, d]
  BlockTable table;
  void* out;         // [b, tokens, hq, d]
  float* lse;        // [b, tokens, hq], natural logarithm
  float* workspace;  // CUDA only: [splits, b, tokens, hq, d] partial outputs, then [splits, b, tokens, hq] their lse
  TokenStrides q_strides, out_strides, lse_strides;
  PageStrides k_strides, v_strides;
  int batch, tokens, q_heads, kv_heads, dim;
  int splits;  // ranges of keys; 0: as the kernel sees fit
  float scale;
  float softcap;  // softcap * tanh(score / softcap); 0: none
  Type type;
  Format format;
  const float *k_channels, *v_channels;  // [hkv, d], what the rows of codes have been divided by; null: nothing
};

}  // namespace tilewise::paged

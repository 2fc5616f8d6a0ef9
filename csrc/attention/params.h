// What every backend of the family receives. Plain C: the per-ISA objects include it too.
#pragma once
#include "common/paged/params.h"
#include "common/runtime.h"

namespace tilewise::attention {

enum class Type : int { f32, f16, bf16 };

// Strides in elements of a [b, h, s, d] tensor; the head dimension is contiguous. Packed (varlen) tensors [t, h, d]
// use `head` and `row` only.
struct Strides {
  int64_t batch, head, row;
};

// What a query sees beside causality, and what changes its scores and weights; zeros and null pointers: nothing. Query
// i of a sequence stands at key i + (sk - s), its diagonal; distances are measured from there. With x = scale * q k^T:
//
//   score = softcap * tanh(x / softcap) + bias - slope * |distance|, -inf where hidden
//   out   = sum_j keep_j * 65536 / (65536 - dropout_threshold) * exp(score_j - lse) v_j,  lse = log(exp(sink) + sum_j
//   exp(score_j))
//
// Batch indices count sequences, rows and keys count within a sequence, for packed tensors too.
struct Rules {
  int window_left, window_right;  // keys from diagonal - left to diagonal + right are seen; kUnlimited
  int global_tokens;              // the first keys of a sequence, whatever window_left says
  float softcap;
  const float* alibi_slopes;  // [b, hq]
  int64_t alibi_batch;        // stride; 0: one row for all
  const void* bias;           // [b, hq, s, sk], a stride of 0 where it has size 1
  int64_t bias_batch, bias_head, bias_row, bias_key;
  Type bias_type;
  const uint32_t* mask;  // [b, hq, s, words]: bit j % 32 of word j / 32 lets the query see key j
  int64_t mask_batch, mask_head, mask_row;
  const uint8_t* blocks;  // [b, hq, ceil(s / block_q), ceil(sk / block_k)], 0 or 1; rows contiguous
  int64_t blocks_batch, blocks_head, blocks_row;
  int block_q, block_k;
  const float* sink_logits;  // [hq]
  // Dropout drops a weight iff its 16 random bits, as a number, are below this: 0 keeps all, 65536 none. They come from
  // Philox4x32-10 (Salmon et al., 2011) with key *dropout_seed and counter (key / 8, query, sequence * hq + head, 0):
  // bits [16 i, 16 i + 16) of the 128, from the lowest of the first word on, belong to key 8 n + i.
  int dropout_threshold;
  const int64_t* dropout_seed;  // [1]
};
constexpr int kUnlimited = -1;

// Whether causality is the only rule.
inline bool causal_or_dense(const Rules& r) {
  return r.window_left == kUnlimited && r.window_right == kUnlimited && r.softcap == 0 && !r.alibi_slopes && !r.bias &&
         !r.mask && !r.blocks && !r.sink_logits && r.dropout_threshold == 0;
}

struct ForwardParams {
  const void* q;  // [b, hq, s, d]  | packed [tq, hq, d]
  const void* k;  // [b, hkv, sk, d] | packed [tk, hkv, d]
  const void* v;  // [b, hkv, sk, dv] | packed [tk, hkv, dv]
  void* out;      // [b, hq, s, dv]  | packed [tq, hq, dv]
  float* lse;  // [b, hq, s] contiguous | packed [hq, tq]; natural logarithm, -inf for a row with nothing to attend to
  Strides q_strides, k_strides, v_strides, out_strides;
  const int32_t* cu_seqlens_q;  // [b + 1], or null: not packed
  const int32_t* cu_seqlens_k;  // [b + 1], or null
  int batch, q_heads, kv_heads;
  int seq_q, seq_k;          // lengths; for packed tensors the longest sequence
  int64_t total_q, total_k;  // rows of the packed tensors
  int dim, v_dim;
  float scale;
  bool causal;  // bottom-right aligned: key j is seen by query i iff j <= i + (sk - s)
  Type type;
  Rules rules;  // window_right is at most 0 if causal and some other rule holds
};

struct BackwardParams {
  ForwardParams forward;  // out and lse as the forward pass left them
  const void* dout;       // as out
  void *dq, *dk, *dv;     // as q, k, v
  Strides dout_strides, dq_strides, dk_strides, dv_strides;
  const float* dlse;  // as lse, or null: zeros
  float* delta;       // workspace, as lse: rowsum(dout * out) - dlse
  void* dbias;        // of rules.bias's type, contiguous, with its sizes: [b|1, hq|1, s|1, sk|1]; null: not wanted
  int64_t dbias_sizes[4];
  float* dsink;  // [hq], or null
  bool deterministic;
};

struct PackMaskParams {
  const uint8_t* mask;  // [sizes, keys], 0 or 1
  uint32_t* words;      // [sizes, ceil(keys / 32)], contiguous
  int64_t sizes[3], strides[3], key_stride, keys;
};

// Token i of `tokens` stands at key seq_lens[b] - tokens + i, its diagonal.
struct PagedParams : paged::AttentionParams {
  const int32_t* seq_lens;        // [b], all keys of a sequence, those of the new tokens among them
  int window_left, window_right;  // keys from diagonal - left to diagonal + right are seen; kUnlimited
};

// Writes rows of a cache: those of new tokens, or with `k` null the keys that stand there, rotated.
struct CacheWriteParams {
  void *k_pages, *v_pages;  // [p, page_size, hkv, d]; v_pages null: keys only
  paged::BlockTable table;
  const int32_t* start;      // [b], position of a sequence's first token; or null
  const int32_t* positions;  // [b, tokens], of each token; or null
  const void *k, *v;         // [b, hkv, tokens, d]
  const float *cos, *sin;    // [b, tokens, rotary / 2] of keys, or null; a batch stride of 0: one for all
  paged::TokenStrides k_input, v_input;
  paged::PageStrides k_strides, v_strides;
  int64_t rotary_batch;
  int batch, tokens, kv_heads, dim, rotary;
  bool interleaved;  // pairs are neighbours, not halves
  paged::Type type;  // of k and v
  paged::Format format;
  const float *k_channels, *v_channels;  // [hkv, d], what codes are divided by; null: nothing
};

// Partial results over disjoint sets of keys, joined. Rows count through (b, h, s) in that order; lse and its like are
// contiguous.
constexpr int kMaxParts = 16;
struct MergeParams {
  const void* outs[kMaxParts];  // [b, h, s, dv] each
  Strides outs_strides[kMaxParts];
  const float* lses[kMaxParts];  // [b, h, s] each
  void* out;                     // [b, h, s, dv]
  Strides out_strides;
  float* lse;  // [b, h, s]
  int parts, batch, heads, rows, dim;
  Type type;
};
struct MergeBackwardParams {
  MergeParams forward;
  const void* dout;  // [b, h, s, dv]
  Strides dout_strides;
  const float* dlse;       // [b, h, s]
  void* douts[kMaxParts];  // [b, h, s, dv] each
  Strides douts_strides[kMaxParts];
  float* dlses[kMaxParts];  // [b, h, s] each
};

// Rotary position embedding: pairs (x0, x1) of the first 2 * pairs channels become (x0 cos - x1 sin, x1 cos + x0 sin).
struct RopeParams {
  const void* x;  // [b, h, s, d]
  void* out;      // [b, h, s, d]; may be x itself
  Strides x_strides, out_strides;
  const float *cos, *sin;          // [b, s, pairs], rows contiguous
  int64_t table_batch, table_row;  // strides
  int batch, heads, rows, dim, pairs;
  bool interleaved;  // a pair is channels 2 i and 2 i + 1, else i and i + pairs
  bool inverse;      // turns back: sin is negated
  Type type;
};

// What attention weighed, recomputed from lse: exp(scale * q k^T - lse), 0 for keys behind a query's last one.
struct ScoresParams {
  const void* q;            // [b, hq, r, d]
  const void* k;            // [b, hkv, sk, d]
  const float* lse;         // [b, hq, r] contiguous
  const int32_t* last_key;  // [r]: the last key that a query sees; null: all
  float* sums;              // [b, hq, sk]: over the queries
  float* maxima;            // [b, hq, ceil(r / block_q), ceil(sk / block_k)]: over the block
  Strides q_strides, k_strides;
  int batch, q_heads, kv_heads, rows, keys, dim;
  int block_q, block_k;
  float scale;
  Type type;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<ForwardParams> forward;
  KernelFn<BackwardParams> backward;
  KernelFn<PackMaskParams> pack_mask;
  KernelFn<PagedParams> paged;
  KernelFn<PagedParams> paged_codes;  // pages of another format than native
  KernelFn<CacheWriteParams> cache_write;
  KernelFn<MergeParams> merge;
  KernelFn<MergeBackwardParams> merge_backward;
  KernelFn<RopeParams> rope;
  KernelFn<ScoresParams> column_sums;
  KernelFn<ScoresParams> block_max;
};

}  // namespace tilewise::attention

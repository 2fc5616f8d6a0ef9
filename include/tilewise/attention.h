// Scaled dot-product attention. B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), S queries, Sk
// keys, D head dim, Dv that of v, T packed tokens.
//
//   out = softmax(scale * q k^T) v      lse = log(sum(exp(scale * q k^T)))
//
// Causal attention is bottom-right aligned: query i sees keys up to its diagonal, i + Sk - S. A query that sees no key
// gets out 0 and lse -inf. Elements are f32, f16 or bf16, arithmetic is in f32; any strides whose last dimension is
// contiguous.
#pragma once
#include <optional>

#include "tilewise/cache.h"

namespace tilewise {

// Everything composes with everything; a null pointer is the absence of a tensor. Tensors that have B, Hq, S or Sk in
// their shape may have 1 there instead. For packed sequences B counts sequences, S and Sk are the longest lengths, and
// rows and keys are counted from a sequence's first.
struct AttentionOptions {
  bool causal = false;
  std::optional<double> scale;  // default: 1 / sqrt(D)
  bool deterministic = false;   // backward: the same bits in every run, also where atomics would be faster
  // Keys from diagonal - left to diagonal + right are seen; left open: no limit.
  std::optional<int64_t> window_left, window_right;
  int64_t global_tokens = 0;             // the first keys, seen whatever window_left says
  double softcap = 0;                    // softcap * tanh(score / softcap), before anything is added; 0: none
  double dropout_p = 0;                  // in units of 1 / 65536
  int64_t block_q = 0, block_k = 0;      // queries and keys of a block of `blocks`
  const Tensor* bias = nullptr;          // f32 or as q, [B, Hq, S, Sk]: added to the scores
  const Tensor* mask = nullptr;          // i32 [B, Hq, S, ceil(Sk / 32)]: see attention_pack_mask
  const Tensor* blocks = nullptr;        // boolean [B, Hq, ceil(S / block_q), ceil(Sk / block_k)]: true = attend
  const Tensor* sink_logits = nullptr;   // f32 [Hq]: a further score of every row, without a value
  const Tensor* alibi_slopes = nullptr;  // f32 [B, Hq]: slope * |key - diagonal| is subtracted
  const Tensor* dropout_seed = nullptr;  // i64 [1]: the same seed drops the same weights, on every device
  const Tensor* workspace = nullptr;     // forward on CUDA: of attention_workspace floats; without, keys are not split
};

// How many floats of workspace let few queries share out their keys over the GPU; 0 on CPU, and where they do not.
int64_t attention_workspace(const Tensor& q, const Tensor& k);

// A boolean mask [B, Hq, S, Sk] (true = attend; any of the sizes may be 1) as bits: words [B, Hq, S, ceil(keys / 32)]
// with bit j % 32 of word j / 32 for key j. Where the mask has 1 in place of Sk, it holds for all `keys`.
void attention_pack_mask(const Tensor& mask, int64_t keys, const Tensor& words, void* stream = nullptr);

// q [B, Hq, S, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv] -> out [B, Hq, S, Dv], lse f32 [B, Hq, S] contiguous.
void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                       const AttentionOptions& options = {}, void* stream = nullptr);

// Gradients of what the options added; null: not wanted.
struct AttentionOptionGradients {
  const Tensor* bias = nullptr;         // as the bias, contiguous
  const Tensor* sink_logits = nullptr;  // f32 [Hq]
};

// Gradients of sum(out * dout) + sum(lse * dlse): dq, dk, dv as q, k, v. dlse is as lse, or null: zeros. `delta` is a
// workspace, f32 as lse.
void attention_backward(const Tensor& dout, const Tensor* dlse, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& out, const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                        const Tensor& delta, const AttentionOptions& options = {},
                        const AttentionOptionGradients& gradients = {}, void* stream = nullptr);

// Packed sequences: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. The longest lengths may be left open: then
// they are read from cu_seqlens on CPU, and bounded by the number of tokens elsewhere.
struct PackedSequences {
  const Tensor& cu_seqlens_q;  // i32 [B + 1]
  const Tensor& cu_seqlens_k;  // i32 [B + 1]
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
};

// q [Tq, Hq, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, Hq, Dv], lse f32 [Hq, Tq] contiguous.
void attention_varlen_forward(const Tensor& q, const Tensor& k, const Tensor& v, const PackedSequences& sequences,
                              const Tensor& out, const Tensor& lse, const AttentionOptions& options = {},
                              void* stream = nullptr);

// As attention_backward.
void attention_varlen_backward(const Tensor& dout, const Tensor* dlse, const Tensor& q, const Tensor& k,
                               const Tensor& v, const PackedSequences& sequences, const Tensor& out, const Tensor& lse,
                               const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& delta,
                               const AttentionOptions& options = {}, const AttentionOptionGradients& gradients = {},
                               void* stream = nullptr);

// What a row of a cache (one token, one key head) is. native: D numbers of the queries' type. The others are rows of
// bytes, u8 [P, page_size, Hkv, cache_row_bytes(format, D)]:
//   int8, int4, int2: channel-separable tokenwise quantisation (He et al., ZipCache, arXiv:2405.14256). x / channel =
//                     scale * code + zero, the codes of a row first, then bf16 scale and bf16 zero of the row
//   bfp12: 4-bit two's complement mantissas, then an 8-bit exponent for each block of 32 channels
enum class CacheFormat { native, int8, int4, int2, bfp12 };
int64_t cache_row_bytes(CacheFormat format, int64_t dim);

struct PagedAttentionOptions {
  bool causal = true;
  std::optional<double> scale;                       // default: 1 / sqrt(D)
  std::optional<int64_t> window_left, window_right;  // as in AttentionOptions
  double softcap = 0;                                // as in AttentionOptions
  std::optional<int64_t> num_splits;                 // ranges of keys worked on at a time; default: as shapes suggest
  CacheFormat format = CacheFormat::native;
  const Tensor* k_channels = nullptr;  // f32 [Hkv, D] of the formats int8 to int2; null: ones
  const Tensor* v_channels = nullptr;
};

// How many floats of workspace paged_attention needs for these shapes; 0 on CPU.
int64_t paged_attention_workspace(const Tensor& q, const Cache& cache, const PagedAttentionOptions& options = {});

// Attention of S new tokens of each sequence to its keys in the cache, of which there are seq_lens i32 [B], those of
// the new tokens included: query i stands at key seq_lens[b] - S + i. q, out [B, Hq, S, D] of the pages' type; lse f32
// [B, Hq, S] contiguous. A query that sees no key gets out 0 and lse -inf. On CPU the same bits for any number of
// threads.
void paged_attention(const Tensor& q, const Cache& cache, const Tensor& seq_lens, const Tensor& out, const Tensor& lse,
                     const PagedAttentionOptions& options = {}, const Tensor* workspace = nullptr,
                     void* stream = nullptr);

struct CacheWriteOptions {
  CacheFormat format = CacheFormat::native;
  const Tensor* k_channels = nullptr;  // as in PagedAttentionOptions
  const Tensor* v_channels = nullptr;
  const Tensor* cos = nullptr;  // f32 [B or 1, S, R / 2]: keys are rotated (RoPE), channels R and up stay
  const Tensor* sin = nullptr;
  bool interleaved = false;  // pairs are channels 2 i, 2 i + 1 rather than i, i + R / 2
};

// Writes k, v [B, Hkv, S, D] to positions start[b] + i (start i32 [B]), quantised on the way in.
void cache_append(const Cache& cache, const Tensor& start, const Tensor& k, const Tensor& v,
                  const CacheWriteOptions& options = {}, void* stream = nullptr);

// Rotates the keys at `positions` i32 [B, S] of heads of D channels by cos and sin, in place. Codes are made anew.
void cache_rotate(const Tensor& k_pages, const Tensor& block_table, const Tensor& positions, int64_t dim,
                  const CacheWriteOptions& options, void* stream = nullptr);

// Partial results over disjoint sets of keys, joined as if one call had seen all of them:
//
//   lse = log(sum_i exp(lses[i]))      out = sum_i exp(lses[i] - lse) outs[i]
//
// outs [B, H, S, Dv] with lses f32 [B, H, S], or packed [T, H, Dv] with [H, T]; 1 to 16 of each. lses and lse are
// contiguous.
void merge_attention(const Tensor* const* outs, const Tensor* const* lses, int parts, const Tensor& out,
                     const Tensor& lse, void* stream = nullptr);

// Gradients of sum(out * dout) + sum(lse * dlse): douts and dlses as outs and lses.
void merge_attention_backward(const Tensor& dout, const Tensor& dlse, const Tensor* const* outs,
                              const Tensor* const* lses, int parts, const Tensor& out, const Tensor& lse,
                              const Tensor* const* douts, const Tensor* const* dlses, void* stream = nullptr);

// Rotary position embedding (Su et al., arXiv:2104.09864): in each row of x [B, H, S, D] the pairs (x0, x1) of the
// first 2 P channels turn to (x0 cos - x1 sin, x1 cos + x0 sin), the others are copied. cos and sin are f32 [B or 1, S,
// P]. A pair is channels (i, i + P), or (2 i, 2 i + 1) if `interleaved`; `inverse` turns the other way. `out` may be x.
void rope_apply(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out, bool interleaved = false,
                bool inverse = false, void* stream = nullptr);

// What attention weighed, recomputed from its lse; p[i, j] = exp(scale * q_i k_j - lse[i]). q [B, Hq, R, D] are all
// queries or some of them, with their lse f32 [B, Hq, R] contiguous; k [B, Hkv, Sk, D]. `last_key` i32 [R] is the last
// key that each query sees; null: all. scale defaults to 1 / sqrt(D).
struct ScoreOptions {
  const Tensor* last_key = nullptr;
  std::optional<double> scale;
};

// sums f32 [B, Hq, Sk] contiguous: of p over the queries.
void attention_column_sums(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& sums,
                           const ScoreOptions& options = {}, void* stream = nullptr);

// maxima f32 [B, Hq, ceil(R / block_q), ceil(Sk / block_k)] contiguous: of p over blocks, whose sizes are multiples of
// 16 from 16 to 128.
void attention_block_max(const Tensor& q, const Tensor& k, const Tensor& lse, int64_t block_q, int64_t block_k,
                         const Tensor& maxima, const ScoreOptions& options = {}, void* stream = nullptr);

}  // namespace tilewise

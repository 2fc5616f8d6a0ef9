// Speculative decoding with token trees. B batch, N nodes per tree (N <= 256), W = ceil(N / 64) words of ancestor bits,
// V vocabulary, Hq query heads, Hkv key heads (Hq a multiple of Hkv), D head dim, P pages.
//
// A tree is `parent` i32[B, N]: node 0 is the root (parent -1), every other node's parent precedes it, slots from
// n_nodes[b] on are padding (-2). Node 0 stands for the last committed token. K and V live in pages
// [P, page_size, Hkv, D]; block_table i32[B, pages] names the pages of a sequence in order. The committed tokens before
// the root fill positions [0, prefix_len[b]); node i of the tree stands at position prefix_len[b] + i until compact_kv.
//
// Integer tensors are i32 and contiguous unless said otherwise; float tensors may have any strides whose last dimension
// is contiguous.
#pragma once
#include "tilewise/cache.h"

namespace tilewise {

constexpr int kMaxTreeNodes = 256;

// Derives from `parent` what the other operators read:
//   positions     i32[B, N]     seq_lens[b] + depth; -1 for padding
//   first_child   i32[B, N]     smallest child index, or -1
//   next_sibling  i32[B, N]     next node with the same parent, or -1
//   ancestor_bits u64|i64[B, N, W]  bit j: node j is an ancestor of the node, or the node itself
void tree_finalize(const Tensor& parent, const Tensor& n_nodes, const Tensor& seq_lens, const Tensor& positions,
                   const Tensor& first_child, const Tensor& next_sibling, const Tensor& ancestor_bits,
                   void* stream = nullptr);

// A tree that a builder writes; unused slots have parent -2 and token 0.
struct NewTreeTensors {
  const Tensor& parent;   // i32[B, N]
  const Tensor& tokens;   // i32[B, N]
  const Tensor& n_nodes;  // i32[B]
};

// Node i of the template (parent i32[N], rank i32[N]) becomes the candidate table[token of its parent, rank[i]];
// table i32[V, C], root_tokens i32[B]. A candidate outside [0, V) drops its node and the subtree below it.
void tree_from_template(const Tensor& parent, const Tensor& rank, const Tensor& table, const Tensor& root_tokens,
                        const NewTreeTensors& tree, void* stream = nullptr);

// Merges sequences i32[B, width, length] (each ends at its first negative token) into one prefix tree below
// root_tokens i32[B], in order, until its N slots are full.
void tree_from_sequences(const Tensor& sequences, const Tensor& root_tokens, const NewTreeTensors& tree,
                         void* stream = nullptr);

// table[tokens[b, i]] = topk[b, i] for table i32[V, C], tokens i32[B, N], topk i32[B, N, C] and i < n_nodes[b] (null:
// all). Of several rows for one token the last in (b, i) order stays.
void table_update(const Tensor& table, const Tensor& tokens, const Tensor& topk, const Tensor* n_nodes,
                  void* stream = nullptr);

// How many floats of workspace tree_attention needs for these shapes; 0 on CPU.
int64_t tree_attention_workspace(const Tensor& q, const Tensor& k_pages, const Tensor& block_table);

// out = softmax(scale q K^T) V, where node i sees the prefix and the nodes named by its ancestor bits. q, out
// [B, N, Hq, D]; lse f32[B, N, Hq], natural logarithm; prefix_len i32[B]. A node without bits gives 0 and -inf.
void tree_attention(const Tensor& q, const Cache& cache, const Tensor& prefix_len, const Tensor& ancestor_bits,
                    double scale, const Tensor& out, const Tensor& lse, const Tensor* workspace,
                    void* stream = nullptr);

// Writes k, v [B, N, Hkv, D] to positions start[b] + i of the pages, for i < n_nodes[b] (null: all).
void append_kv(const Cache& cache, const Tensor& start, const Tensor& k, const Tensor& v, const Tensor* n_nodes,
               void* stream = nullptr);

// Moves the K and V of the accepted nodes, in every layer, to positions prefix_len[b] + 1 .. prefix_len[b] +
// accept_len[b]. All caches have one shape, one dtype and the same strides. path i32[B, length], accept_len i32[B].
void compact_kv(const Tensor* const* k_pages, const Tensor* const* v_pages, int layers, const Tensor& block_table,
                const Tensor& prefix_len, const Tensor& path, const Tensor& accept_len, void* stream = nullptr);

// Follows the target's greedy choices down the tree. `logits` [B, N, V] (f32, f16, bf16), or their argmax i32[B, N].
// With L = max_depth: accept_len i32[B] accepted drafts; path i32[B, L + 1] node indices from the root, -1 pads;
// out_tokens i32[B, L + 1] the accepted tokens and then the target's own next token, -1 pads.
void verify_greedy(const Tensor& parent, const Tensor& tokens, const Tensor& logits, const Tensor& n_nodes,
                   const Tensor& accept_len, const Tensor& path, const Tensor& out_tokens, void* stream = nullptr);

}  // namespace tilewise

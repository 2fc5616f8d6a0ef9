// What every backend of the family receives. Plain C: the per-ISA objects include it too.
#pragma once
#include "common/paged/params.h"

namespace tilewise::speculative {

constexpr int kMaxNodes = 256;
constexpr int kWordBits = 64;
constexpr int kMaxLayers = 128;  // caches that one launch of compact_kv moves

using paged::BlockTable, paged::kMaxHeadDim, paged::PageStrides, paged::Type;

struct TreeFinalizeParams {
  const int32_t* parent;    // [b, n]
  const int32_t* n_nodes;   // [b]
  const int32_t* seq_lens;  // [b]
  int32_t* positions;       // [b, n]
  int32_t* first_child;     // [b, n]
  int32_t* next_sibling;    // [b, n]
  uint64_t* ancestor_bits;  // [b, n, words]
  int batch, nodes, words;
};

// The tree that a builder writes.
struct NewTree {
  int32_t* parent;   // [b, n]
  int32_t* tokens;   // [b, n]
  int32_t* n_nodes;  // [b]
};

struct TreeFromTemplateParams {
  const int32_t* parent;       // [n], the template
  const int32_t* rank;         // [n], which of its parent token's candidates a node takes
  const int32_t* table;        // [vocab, candidates], negative: no candidate
  const int32_t* root_tokens;  // [b]
  NewTree tree;
  int batch, nodes, vocab, candidates;
};

struct TreeFromSequencesParams {
  const int32_t* sequences;    // [b, width, length], a sequence ends at its first negative token
  const int32_t* root_tokens;  // [b]
  NewTree tree;
  int batch, width, length, nodes;
};

struct TableUpdateParams {
  int32_t* table;          // [vocab, candidates]
  const int32_t* tokens;   // [b, n]
  const int32_t* topk;     // [b, n, candidates]
  const int32_t* n_nodes;  // [b], or null: all n
  int batch, nodes, vocab, candidates;
};

struct TreeAttentionParams : paged::AttentionParams {  // tokens are nodes
  const int32_t* prefix_len;                           // [b]
  const uint64_t* ancestor_bits;                       // [b, n, words]; a node without bits is padding
  int words;
};

struct AppendParams {
  void *k_pages, *v_pages;  // [p, page_size, hkv, d]
  BlockTable table;
  const int32_t* start;    // [b]
  const int32_t* n_nodes;  // [b], or null: all n
  const void *k, *v;       // [b, n, hkv, d]
  PageStrides k_strides, v_strides;
  int64_t k_batch, k_node, k_head, v_batch, v_node, v_head;
  int batch, nodes, kv_heads;
  int row_bytes, item_bytes;  // of one head's row, of one element
};

struct CompactParams {
  void* pages[2 * kMaxLayers];  // every layer's k_pages [p, page_size, hkv, d], then every layer's v_pages
  BlockTable table;
  const int32_t* prefix_len;  // [b]
  const int32_t* path;        // [b, path_length]
  const int32_t* accept_len;  // [b]
  PageStrides strides;        // all caches alike
  int tensors;                // 2 * layers
  int batch, path_length, kv_heads;
  int row_bytes, item_bytes;
};

struct VerifyGreedyParams {
  const int32_t* parent;   // [b, n]
  const int32_t* tokens;   // [b, n]
  const int32_t* n_nodes;  // [b]
  const void* logits;      // [b, n, vocab], or null
  const int32_t* argmax;   // [b, n] where logits is null
  int64_t logits_batch, logits_node;
  int32_t* accept_len;  // [b]
  int32_t* path;        // [b, max_depth + 1]
  int32_t* out_tokens;  // [b, max_depth + 1]
  int batch, nodes, vocab, max_depth;
  Type type;
};

// The family's kernels on one machine; null = not available there.
struct Kernels {
  KernelFn<TreeFinalizeParams> tree_finalize;
  KernelFn<TreeFromTemplateParams> tree_from_template;
  KernelFn<TreeFromSequencesParams> tree_from_sequences;
  KernelFn<TableUpdateParams> table_update;
  KernelFn<TreeAttentionParams> tree_attention;
  KernelFn<AppendParams> append_kv;
  KernelFn<CompactParams> compact_kv;
  KernelFn<VerifyGreedyParams> verify_greedy;
};

}  // namespace tilewise::speculative

// The family's only argument checks, and the choice of its kernels.
#include "tilewise/speculative.h"

#include <algorithm>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/paged/checks.h"
#include "speculative/params.h"

namespace tilewise {

TILEWISE_KERNEL_SET(speculative)

namespace {

using namespace speculative;

using paged::check_block_table, paged::check_cache, paged::check_pages, paged::kMaxExtent, paged::page_strides;
using paged::type_of;

// Index tensors are small and dense: i32, contiguous, on `like`'s device.
void check_indices(const Check& check, const Tensor& t, const char* name, std::initializer_list<int64_t> shape,
                   const Tensor& like, const char* like_name) {
  check.dtype(t, name, {DType::i32});
  check.shape(t, name, shape);
  check.same_device(t, name, like, like_name);
  check.contiguous(t, name);
}

void check_bits(const Check& check, const Tensor& t, int64_t batch, int64_t nodes, const Tensor& like,
                const char* like_name) {
  check.dtype(t, "ancestor_bits", {DType::u64, DType::i64});
  check.shape(t, "ancestor_bits", {batch, nodes, (nodes + 63) / 64});
  check.same_device(t, "ancestor_bits", like, like_name);
  check.contiguous(t, "ancestor_bits");
}

void check_node_limit(const Check& check, const char* name, int64_t nodes) {
  check.that(nodes <= kMaxTreeNodes, name, "has %ld nodes, expected at most %d", nodes, kMaxTreeNodes);
}

// ---- values that only the host can see: checked before a CPU kernel follows them ----

void check_counts(const Check& check, const Tensor& n_nodes, int64_t nodes, int least) {
  for (int64_t b = 0; b < n_nodes.shape[0]; b++) {
    const int32_t count = n_nodes.ptr<int32_t>()[b];
    check.that(count >= least && count <= nodes, "n_nodes", "[%ld] is %d, expected %d <= n_nodes <= %ld", b, count,
               least, nodes);
  }
}

void check_parents(const Check& check, const int32_t* row, int64_t count) {
  check.that(row[0] == -1, "parent", "of node 0 is %d, expected -1 (the root)", row[0]);
  for (int32_t i = 1; i < count; i++)
    check.that(row[i] >= 0 && row[i] < i, "parent", "of node %d is %d, expected 0 <= parent < %d", i, row[i], i);
}

void check_tree(const Check& check, const Tensor& parent, const Tensor& n_nodes) {
  check_counts(check, n_nodes, parent.shape[1], 1);
  for (int64_t b = 0; b < parent.shape[0]; b++)
    check_parents(check, parent.ptr<int32_t>() + b * parent.shape[1], n_nodes.ptr<int32_t>()[b]);
}

void check_tokens(const Check& check, const Tensor& tokens, const char* name, int64_t vocab) {
  for (int64_t i = 0; i < tokens.numel(); i++) {
    const int32_t token = tokens.ptr<int32_t>()[i];
    check.that(token >= 0 && token < vocab, name, "holds %d at %ld, expected 0 <= token < %ld", token, i, vocab);
  }
}

// ---- paged caches ----

int row_bytes(const Tensor& pages) {
  return int(pages.shape[3]) * item_size(pages.dtype);
}

// Nodes below this index are seen by some node of tree b.
int64_t nodes_in_use(const Tensor& bits, int64_t b) {
  const int64_t nodes = bits.shape[1], words = bits.shape[2];
  const uint64_t* row = bits.ptr<uint64_t>() + b * nodes * words;
  int64_t used = 0;
  for (int64_t i = 0; i < nodes * words; i++)
    if (row[i]) used = std::max(used, i % words * 64 + 64 - __builtin_clzll(row[i]));
  return used;
}

void check_new_tree(const Check& check, const NewTreeTensors& tree, int64_t batch, int64_t nodes, const Tensor& like,
                    const char* like_name) {
  check_indices(check, tree.parent, "tree parent", {batch, nodes}, like, like_name);
  check_indices(check, tree.tokens, "tree tokens", {batch, nodes}, like, like_name);
  check_indices(check, tree.n_nodes, "tree n_nodes", {batch}, like, like_name);
}

NewTree new_tree(const NewTreeTensors& tree) {
  return {tree.parent.ptr<int32_t>(), tree.tokens.ptr<int32_t>(), tree.n_nodes.ptr<int32_t>()};
}

}  // namespace

void tree_finalize(const Tensor& parent, const Tensor& n_nodes, const Tensor& seq_lens, const Tensor& positions,
                   const Tensor& first_child, const Tensor& next_sibling, const Tensor& ancestor_bits, void* stream) {
  const Check check("tree_finalize");
  check.dims(parent, "parent", 2);
  const int64_t batch = parent.shape[0], nodes = parent.shape[1], words = (nodes + 63) / 64;
  check_node_limit(check, "parent", nodes);
  check_indices(check, parent, "parent", {batch, nodes}, parent, "parent");
  check_indices(check, n_nodes, "n_nodes", {batch}, parent, "parent");
  check_indices(check, seq_lens, "seq_lens", {batch}, parent, "parent");
  check_indices(check, positions, "positions", {batch, nodes}, parent, "parent");
  check_indices(check, first_child, "first_child", {batch, nodes}, parent, "parent");
  check_indices(check, next_sibling, "next_sibling", {batch, nodes}, parent, "parent");
  check_bits(check, ancestor_bits, batch, nodes, parent, "parent");
  if (batch == 0 || nodes == 0) return;
  if (host_checks_indices(parent.device)) check_tree(check, parent, n_nodes);

  const TreeFinalizeParams params = {parent.ptr<int32_t>(),
                                     n_nodes.ptr<int32_t>(),
                                     seq_lens.ptr<int32_t>(),
                                     positions.ptr<int32_t>(),
                                     first_child.ptr<int32_t>(),
                                     next_sibling.ptr<int32_t>(),
                                     ancestor_bits.ptr<uint64_t>(),
                                     int(batch),
                                     int(nodes),
                                     int(words)};
  run_kernel("tree_finalize", kKernels, parent.device, &Kernels::tree_finalize, params, stream);
}

void tree_from_template(const Tensor& parent, const Tensor& rank, const Tensor& table, const Tensor& root_tokens,
                        const NewTreeTensors& tree, void* stream) {
  const Check check("tree_from_template");
  check.dims(parent, "parent", 1);
  const int64_t nodes = parent.shape[0];
  check_node_limit(check, "parent", nodes);
  check.that(nodes >= 1, "parent", "has no nodes, expected at least the root");
  check_indices(check, table, "table", {kAny, kAny}, table, "table");
  const int64_t vocab = table.shape[0], candidates = table.shape[1];
  check.that(vocab <= kMaxExtent && candidates <= kMaxExtent, "table", "has shape (%ld, %ld), expected less than 2^31",
             vocab, candidates);
  check_indices(check, parent, "parent", {nodes}, table, "table");
  check_indices(check, rank, "rank", {nodes}, table, "table");
  check_indices(check, root_tokens, "root_tokens", {kAny}, table, "table");
  const int64_t batch = root_tokens.shape[0];
  check_new_tree(check, tree, batch, nodes, table, "table");
  if (batch == 0) return;
  if (host_checks_indices(table.device)) {
    check_parents(check, parent.ptr<int32_t>(), nodes);
    for (int64_t i = 1; i < nodes; i++) {
      const int32_t r = rank.ptr<int32_t>()[i];
      check.that(r >= 0 && r < candidates, "rank", "of node %ld is %d, expected 0 <= rank < %ld (table)", i, r,
                 candidates);
    }
    check_tokens(check, root_tokens, "root_tokens", vocab);
  }
  const TreeFromTemplateParams params = {
      parent.ptr<int32_t>(), rank.ptr<int32_t>(), table.ptr<int32_t>(), root_tokens.ptr<int32_t>(),
      new_tree(tree),        int(batch),          int(nodes),           int(vocab),
      int(candidates)};
  run_kernel("tree_from_template", kKernels, table.device, &Kernels::tree_from_template, params, stream);
}

void tree_from_sequences(const Tensor& sequences, const Tensor& root_tokens, const NewTreeTensors& tree, void* stream) {
  const Check check("tree_from_sequences");
  check_indices(check, sequences, "sequences", {kAny, kAny, kAny}, sequences, "sequences");
  const int64_t batch = sequences.shape[0], width = sequences.shape[1], length = sequences.shape[2];
  check.that(width <= kMaxExtent && length <= kMaxExtent, "sequences", "has shape (%ld, %ld, %ld), expected below 2^31",
             batch, width, length);
  check_indices(check, root_tokens, "root_tokens", {batch}, sequences, "sequences");
  check.dims(tree.parent, "tree parent", 2);
  const int64_t nodes = tree.parent.shape[1];
  check.that(nodes >= 1 && nodes <= kMaxTreeNodes, "max_nodes", "is %ld, expected 1 to %d", nodes, kMaxTreeNodes);
  check_new_tree(check, tree, batch, nodes, sequences, "sequences");
  if (batch == 0) return;
  const TreeFromSequencesParams params = {sequences.ptr<int32_t>(),
                                          root_tokens.ptr<int32_t>(),
                                          new_tree(tree),
                                          int(batch),
                                          int(width),
                                          int(length),
                                          int(nodes)};
  run_kernel("tree_from_sequences", kKernels, sequences.device, &Kernels::tree_from_sequences, params, stream);
}

void table_update(const Tensor& table, const Tensor& tokens, const Tensor& topk, const Tensor* n_nodes, void* stream) {
  const Check check("table_update");
  check_indices(check, table, "table", {kAny, kAny}, table, "table");
  check.output(table, "table");
  const int64_t vocab = table.shape[0], candidates = table.shape[1];
  check_indices(check, tokens, "tokens", {kAny, kAny}, table, "table");
  const int64_t batch = tokens.shape[0], nodes = tokens.shape[1];
  check.that(vocab <= kMaxExtent && batch * nodes <= kMaxExtent && candidates <= kMaxExtent, "tokens",
             "has shape (%ld, %ld), expected less than 2^31 elements", batch, nodes);
  check_indices(check, topk, "topk", {batch, nodes, candidates}, table, "table");
  check.no_overlap(table, "table", topk, "topk");
  check.no_overlap(table, "table", tokens, "tokens");
  if (n_nodes) check_indices(check, *n_nodes, "n_nodes", {batch}, table, "table");
  if (batch == 0 || nodes == 0 || candidates == 0) return;
  if (host_checks_indices(table.device)) {
    if (n_nodes) check_counts(check, *n_nodes, nodes, 0);
    for (int64_t b = 0; b < batch; b++)
      for (int64_t i = 0; i < (n_nodes ? n_nodes->ptr<int32_t>()[b] : nodes); i++) {
        const int32_t token = tokens.ptr<int32_t>()[b * nodes + i];
        check.that(token >= 0 && token < vocab, "tokens", "[%ld, %ld] is %d, expected 0 <= token < %ld", b, i, token,
                   vocab);
      }
  }
  const TableUpdateParams params = {table.ptr<int32_t>(), tokens.ptr<int32_t>(),
                                    topk.ptr<int32_t>(),  n_nodes ? n_nodes->ptr<int32_t>() : nullptr,
                                    int(batch),           int(nodes),
                                    int(vocab),           int(candidates)};
  run_kernel("table_update", kKernels, table.device, &Kernels::table_update, params, stream);
}

namespace {

void check_attention_shapes(const Check& check, const Tensor& q, const Tensor& k_pages) {
  check.dims(q, "q", 4);
  check.last_dim_contiguous(q, "q");
  check_node_limit(check, "q", q.shape[1]);
  check.that(q.shape[3] == k_pages.shape[3], "q", "has head dim %ld, expected %ld (k_pages's)", q.shape[3],
             k_pages.shape[3]);
  check.that(q.shape[2] % k_pages.shape[2] == 0, "q", "has %ld heads, expected a multiple of %ld (k_pages's)",
             q.shape[2], k_pages.shape[2]);
  check.same_dtype(q, "q", k_pages, "k_pages");
  check.same_device(q, "q", k_pages, "k_pages");
}

}  // namespace

int64_t tree_attention_workspace(const Tensor& q, const Tensor& k_pages, const Tensor& block_table) {
  if (host_checks_indices(q.device) || q.ndim != 4 || k_pages.ndim != 4 || block_table.ndim != 2) return 0;
  if (k_pages.shape[2] == 0 || q.numel() == 0) return 0;
  paged::AttentionParams p = {};
  p.batch = int(q.shape[0]), p.tokens = int(q.shape[1]), p.q_heads = int(q.shape[2]);
  p.kv_heads = int(k_pages.shape[2]), p.dim = int(q.shape[3]);
  p.type = type_of(q);
  p.table.pages_per_row = int(block_table.shape[1]), p.table.page_size = int(k_pages.shape[1]);
  return paged::workspace_floats(paged::cuda_splits(p), q.numel() / q.shape[3], q.shape[3]);
}

void tree_attention(const Tensor& q, const Cache& cache, const Tensor& prefix_len, const Tensor& ancestor_bits,
                    double scale, const Tensor& out, const Tensor& lse, const Tensor* workspace, void* stream) {
  const Check check("tree_attention");
  const Tensor &k_pages = cache.k_pages, &v_pages = cache.v_pages;
  check_cache(check, k_pages, v_pages);
  check_attention_shapes(check, q, k_pages);
  const int64_t batch = q.shape[0], nodes = q.shape[1], heads = q.shape[2], dim = q.shape[3];
  TreeAttentionParams p = {};
  p.table = check_block_table(check, cache.block_table, k_pages, batch);
  check_indices(check, prefix_len, "prefix_len", {batch}, q, "q");
  check_bits(check, ancestor_bits, batch, nodes, q, "q");
  check.shape(out, "out", {batch, nodes, heads, dim});
  check.same_dtype(out, "out", q, "q");
  check.same_device(out, "out", q, "q");
  check.contiguous(out, "out");
  check.dtype(lse, "lse", {DType::f32});
  check.shape(lse, "lse", {batch, nodes, heads});
  check.same_device(lse, "lse", q, "q");
  check.contiguous(lse, "lse");
  p.scale = check.number(scale, "scale");
  if (q.numel() == 0) return;
  const bool host = host_checks_indices(q.device);
  if (host)
    for (int64_t b = 0; b < batch; b++) {
      const int64_t prefix = prefix_len.ptr<int32_t>()[b], used = nodes_in_use(ancestor_bits, b);
      check.that(used <= nodes, "ancestor_bits", "of sequence %ld name node %ld, expected nodes below %ld", b, used - 1,
                 nodes);
      check_pages(check, p.table, b, "prefix_len", prefix, prefix + used);
    }
  p.q = q.data, p.k_pages = k_pages.data, p.v_pages = v_pages.data, p.out = out.data, p.lse = lse.ptr<float>();
  p.q_strides = {q.strides[0], q.strides[1], q.strides[2]};
  p.out_strides = {nodes * heads * dim, heads * dim, dim};
  p.lse_strides = {nodes * heads, heads, 1};
  p.k_strides = page_strides(k_pages), p.v_strides = page_strides(v_pages);
  p.batch = int(batch), p.tokens = int(nodes), p.q_heads = int(heads), p.dim = int(dim);
  p.kv_heads = int(k_pages.shape[2]);
  p.type = type_of(q);
  p.prefix_len = prefix_len.ptr<int32_t>();
  p.ancestor_bits = ancestor_bits.ptr<uint64_t>();
  p.words = int(ancestor_bits.shape[2]);
  if (!host) {
    p.splits = paged::cuda_splits(p);
    p.workspace = paged::check_workspace(check, workspace, tree_attention_workspace(q, k_pages, cache.block_table), q);
  }
  run_kernel("tree_attention", kKernels, q.device, &Kernels::tree_attention, p, stream);
}

void append_kv(const Cache& cache, const Tensor& start, const Tensor& k, const Tensor& v, const Tensor* n_nodes,
               void* stream) {
  const Check check("append_kv");
  const Tensor &k_pages = cache.k_pages, &v_pages = cache.v_pages;
  check_cache(check, k_pages, v_pages);
  check.output(k_pages, "k_pages");
  check.output(v_pages, "v_pages");
  check.that(k_pages.data != v_pages.data || k_pages.numel() == 0, "v_pages",
             "is the same memory as k_pages, expected separate memory");
  check.shape(k, "k", {kAny, kAny, k_pages.shape[2], k_pages.shape[3]});
  const int64_t batch = k.shape[0], nodes = k.shape[1];
  check.shape(v, "v", {batch, nodes, k_pages.shape[2], k_pages.shape[3]});
  const struct {
    const Tensor& t;
    const char* name;
  } sources[] = {{k, "k"}, {v, "v"}};
  for (const auto& s : sources) {
    check.same_dtype(s.t, s.name, k_pages, "k_pages");
    check.same_device(s.t, s.name, k_pages, "k_pages");
    check.last_dim_contiguous(s.t, s.name);
    check.no_overlap(k_pages, "k_pages", s.t, s.name);
    check.no_overlap(v_pages, "v_pages", s.t, s.name);
  }
  const BlockTable table = check_block_table(check, cache.block_table, k_pages, batch);
  check_indices(check, start, "start", {batch}, k_pages, "k_pages");
  if (n_nodes) check_indices(check, *n_nodes, "n_nodes", {batch}, k_pages, "k_pages");
  check.that(nodes <= kMaxExtent, "k", "has %ld nodes, expected less than 2^31", nodes);
  if (k.numel() == 0) return;
  if (host_checks_indices(k.device)) {
    if (n_nodes) check_counts(check, *n_nodes, nodes, 0);
    for (int64_t b = 0; b < batch; b++) {
      const int64_t first = start.ptr<int32_t>()[b];
      check_pages(check, table, b, "start", first, first + (n_nodes ? n_nodes->ptr<int32_t>()[b] : nodes));
    }
  }
  const AppendParams params = {k_pages.data,
                               v_pages.data,
                               table,
                               start.ptr<int32_t>(),
                               n_nodes ? n_nodes->ptr<int32_t>() : nullptr,
                               k.data,
                               v.data,
                               page_strides(k_pages),
                               page_strides(v_pages),
                               k.strides[0],
                               k.strides[1],
                               k.strides[2],
                               v.strides[0],
                               v.strides[1],
                               v.strides[2],
                               int(batch),
                               int(nodes),
                               int(k_pages.shape[2]),
                               row_bytes(k_pages),
                               item_size(k_pages.dtype)};
  run_kernel("append_kv", kKernels, k_pages.device, &Kernels::append_kv, params, stream);
}

namespace {

void check_same_layout(const Check& check, const Tensor& t, const char* name, const Tensor& first) {
  check.shape(t, name, {first.shape[0], first.shape[1], first.shape[2], first.shape[3]});
  check.same_dtype(t, name, first, "the first cache");
  check.same_device(t, name, first, "the first cache");
  check.last_dim_contiguous(t, name);
  check.output(t, name);
  for (int i = 0; i < 3; i++)
    check.that(t.shape[i] <= 1 || t.strides[i] == first.strides[i], name,
               "has stride %ld in dimension %d, expected %ld (the first cache's)", t.strides[i], i, first.strides[i]);
}

void check_path(const Check& check, const Tensor& path, const Tensor& accept_len, int64_t b) {
  const int32_t accepted = accept_len.ptr<int32_t>()[b];
  const int32_t* row = path.ptr<int32_t>() + b * path.shape[1];
  check.that(accepted >= 0 && accepted < path.shape[1], "accept_len", "[%ld] is %d, expected 0 <= accept_len < %ld", b,
             accepted, path.shape[1]);
  check.that(row[0] == 0, "path", "[%ld, 0] is %d, expected 0 (the root)", b, row[0]);
  for (int32_t j = 1; j <= accepted; j++)
    check.that(row[j] > row[j - 1] && row[j] < kMaxTreeNodes, "path", "[%ld, %d] is %d, expected %d < node < %d", b, j,
               row[j], row[j - 1], kMaxTreeNodes);
}

}  // namespace

void compact_kv(const Tensor* const* k_pages, const Tensor* const* v_pages, int layers, const Tensor& block_table,
                const Tensor& prefix_len, const Tensor& path, const Tensor& accept_len, void* stream) {
  const Check check("compact_kv");
  check.dims(path, "path", 2);
  const int64_t batch = path.shape[0];
  if (layers == 0) return;
  const Tensor& first = *k_pages[0];
  if (first.dtype == DType::u8 && first.ndim == 4)  // rows of codes move like others
    paged::check_pools(check, first, *v_pages[0]);
  else
    check_cache(check, first, *v_pages[0]);
  for (int i = 0; i < layers; i++) {
    check_same_layout(check, *k_pages[i], "k_pages", first);
    check_same_layout(check, *v_pages[i], "v_pages", first);
  }
  const BlockTable table = check_block_table(check, block_table, first, batch);
  check_indices(check, path, "path", {batch, kAny}, first, "k_pages");
  check_indices(check, prefix_len, "prefix_len", {batch}, first, "k_pages");
  check_indices(check, accept_len, "accept_len", {batch}, first, "k_pages");
  check.that(path.shape[1] >= 1 && path.shape[1] <= kMaxTreeNodes, "path", "has length %ld, expected 1 to %d",
             path.shape[1], kMaxTreeNodes);
  if (batch == 0) return;
  if (host_checks_indices(first.device))
    for (int64_t b = 0; b < batch; b++) {
      check_path(check, path, accept_len, b);
      const int64_t prefix = prefix_len.ptr<int32_t>()[b];
      const int32_t last = path.ptr<int32_t>()[b * path.shape[1] + accept_len.ptr<int32_t>()[b]];
      check_pages(check, table, b, "prefix_len", prefix, prefix + last + 1);
    }
  for (int done = 0; done < layers; done += kMaxLayers) {
    const int count = std::min(kMaxLayers, layers - done);
    CompactParams params = {{},
                            table,
                            prefix_len.ptr<int32_t>(),
                            path.ptr<int32_t>(),
                            accept_len.ptr<int32_t>(),
                            page_strides(first),
                            2 * count,
                            int(batch),
                            int(path.shape[1]),
                            int(first.shape[2]),
                            row_bytes(first),
                            item_size(first.dtype)};
    for (int i = 0; i < count; i++) {
      params.pages[i] = k_pages[done + i]->data;
      params.pages[count + i] = v_pages[done + i]->data;
    }
    run_kernel("compact_kv", kKernels, first.device, &Kernels::compact_kv, params, stream);
  }
}

void verify_greedy(const Tensor& parent, const Tensor& tokens, const Tensor& logits, const Tensor& n_nodes,
                   const Tensor& accept_len, const Tensor& path, const Tensor& out_tokens, void* stream) {
  const Check check("verify_greedy");
  check.dims(parent, "parent", 2);
  const int64_t batch = parent.shape[0], nodes = parent.shape[1];
  check_node_limit(check, "parent", nodes);
  check_indices(check, parent, "parent", {batch, nodes}, parent, "parent");
  check_indices(check, tokens, "tokens", {batch, nodes}, parent, "parent");
  check_indices(check, n_nodes, "n_nodes", {batch}, parent, "parent");
  const bool given = logits.dtype == DType::i32;  // the argmax, not the logits
  if (given) {
    check_indices(check, logits, "logits", {batch, nodes}, parent, "parent");
  } else {
    check.dtype(logits, "logits", {DType::f32, DType::f16, DType::bf16, DType::i32});
    check.shape(logits, "logits", {batch, nodes, kAny});
    check.same_device(logits, "logits", parent, "parent");
    check.last_dim_contiguous(logits, "logits");
    check.that(logits.shape[2] >= 1 && logits.shape[2] <= kMaxExtent, "logits",
               "has %ld tokens in its last dimension, expected 1 to 2^31 - 1", logits.shape[2]);
  }
  check_indices(check, accept_len, "accept_len", {batch}, parent, "parent");
  check_indices(check, path, "path", {batch, kAny}, parent, "parent");
  const int64_t max_depth = path.shape[1] - 1;
  check.that(max_depth >= 0 && max_depth < kMaxTreeNodes, "max_depth", "is %ld, expected 0 to %d", max_depth,
             kMaxTreeNodes - 1);
  check_indices(check, out_tokens, "out_tokens", {batch, max_depth + 1}, parent, "parent");
  if (batch == 0) return;
  check.that(nodes >= 1, "parent", "has no nodes, expected at least the root");
  if (host_checks_indices(parent.device)) check_tree(check, parent, n_nodes);
  const VerifyGreedyParams params = {parent.ptr<int32_t>(),
                                     tokens.ptr<int32_t>(),
                                     n_nodes.ptr<int32_t>(),
                                     given ? nullptr : logits.data,
                                     given ? logits.ptr<int32_t>() : nullptr,
                                     given ? 0 : logits.strides[0],
                                     given ? 0 : logits.strides[1],
                                     accept_len.ptr<int32_t>(),
                                     path.ptr<int32_t>(),
                                     out_tokens.ptr<int32_t>(),
                                     int(batch),
                                     int(nodes),
                                     given ? 0 : int(logits.shape[2]),
                                     int(max_depth),
                                     given ? Type::f32 : type_of(logits)};
  run_kernel("verify_greedy", kKernels, parent.device, &Kernels::verify_greedy, params, stream);
}

}  // namespace tilewise

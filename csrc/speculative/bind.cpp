// Python names of the family's functions; no logic.
#include "binding/families.h"
#include "binding/operator.h"
#include "tilewise/speculative.h"

namespace py = pybind11;

namespace tilewise {
void bind_speculative(py::module_& m) {
  m.def("tree_finalize",
        [](const PyTensor& parent, const PyTensor& n_nodes, const PyTensor& seq_lens, const PyTensor& positions,
           const PyTensor& first_child, const PyTensor& next_sibling, const PyTensor& ancestor_bits) {
          void* stream = parent.stream();
          const Release release;
          tree_finalize(parent, n_nodes, seq_lens, positions, first_child, next_sibling, ancestor_bits, stream);
        });
  m.def("tree_from_template",
        [](const PyTensor& parent, const PyTensor& rank, const PyTensor& table, const PyTensor& root_tokens,
           const PyTensor& new_parent, const PyTensor& tokens, const PyTensor& n_nodes) {
          void* stream = table.stream();
          const Release release;
          tree_from_template(parent, rank, table, root_tokens, {new_parent, tokens, n_nodes}, stream);
        });
  m.def("tree_from_sequences", [](const PyTensor& sequences, const PyTensor& root_tokens, const PyTensor& new_parent,
                                  const PyTensor& tokens, const PyTensor& n_nodes) {
    void* stream = sequences.stream();
    const Release release;
    tree_from_sequences(sequences, root_tokens, {new_parent, tokens, n_nodes}, stream);
  });
  def_operator(m, "table_update",
               [](const PyTensor& table, const PyTensor& tokens, const PyTensor& topk, const OptionalTensor& n_nodes) {
                 void* stream = table.stream();
                 const Release release;
                 table_update(table, tokens, topk, pointer_to(n_nodes), stream);
               });
  m.def("tree_attention_workspace", [](const PyTensor& q, const PyTensor& k_pages, const PyTensor& block_table) {
    return tree_attention_workspace(q, k_pages, block_table);
  });
  m.def("tree_attention", [](const PyTensor& q, const PyTensor& k_pages, const PyTensor& v_pages,
                             const PyTensor& block_table, const PyTensor& prefix_len, const PyTensor& ancestor_bits,
                             double scale, const PyTensor& out, const PyTensor& lse, const OptionalTensor& workspace) {
    void* stream = q.stream();
    const Release release;
    tree_attention(q, {k_pages, v_pages, block_table}, prefix_len, ancestor_bits, scale, out, lse,
                   pointer_to(workspace), stream);
  });
  def_operator(m, "append_kv",
               [](const PyTensor& k_pages, const PyTensor& v_pages, const PyTensor& block_table, const PyTensor& start,
                  const PyTensor& k, const PyTensor& v, const OptionalTensor& n_nodes) {
                 void* stream = k_pages.stream();
                 const Release release;
                 append_kv({k_pages, v_pages, block_table}, start, k, v, pointer_to(n_nodes), stream);
               });
  def_operator(m, "compact_kv",
               [](const Tensors& k_pages, const Tensors& v_pages, const PyTensor& block_table,
                  const PyTensor& prefix_len, const PyTensor& path, const PyTensor& accept_len) {
                 void* stream = path.stream();
                 const auto k = pointers_to(k_pages), v = pointers_to(v_pages);
                 const Release release;
                 compact_kv(k.data(), v.data(), static_cast<int>(k.size()), block_table, prefix_len, path, accept_len,
                            stream);
               });
  m.def("verify_greedy",
        [](const PyTensor& parent, const PyTensor& tokens, const PyTensor& logits, const PyTensor& n_nodes,
           const PyTensor& accept_len, const PyTensor& path, const PyTensor& out_tokens) {
          void* stream = parent.stream();
          const Release release;
          verify_greedy(parent, tokens, logits, n_nodes, accept_len, path, out_tokens, stream);
        });
}

}  // namespace tilewise

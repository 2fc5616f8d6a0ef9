// Python names of the family's functions; no logic.
#include "binding/families.h"
#include "binding/operator.h"
#include "tilewise/attention.h"

namespace py = pybind11;

namespace tilewise {
namespace {

// AttentionOptions as Python passes them: one tuple, in the order of the fields below.
struct Options {
  OptionalTensor bias, mask, blocks, sink_logits, alibi_slopes, dropout_seed;
  AttentionOptions value;

  explicit Options(const py::tuple& from) {
    size_t i = 0;
    const auto take = [&](auto& to) { to = from[i++].cast<std::decay_t<decltype(to)>>(); };
    for (OptionalTensor* t : {&bias, &mask, &blocks, &sink_logits, &alibi_slopes, &dropout_seed}) take(*t);
    take(value.causal);
    take(value.scale);
    take(value.window_left);
    take(value.window_right);
    take(value.global_tokens);
    take(value.softcap);
    take(value.dropout_p);
    take(value.block_q);
    take(value.block_k);
    take(value.deterministic);
    value.bias = pointer_to(bias);
    value.mask = pointer_to(mask);
    value.blocks = pointer_to(blocks);
    value.sink_logits = pointer_to(sink_logits);
    value.alibi_slopes = pointer_to(alibi_slopes);
    value.dropout_seed = pointer_to(dropout_seed);
  }
  Options(const Options&) = delete;
};

}  // namespace

void bind_attention(py::module_& m) {
  using Scale = std::optional<double>;
  using Length = std::optional<int64_t>;
  using T = const PyTensor&;
  using OptionalT = const OptionalTensor&;
  // Writes into given memory: what a call costs at least.
  def_operator(
      m, "attention_out",
      [](T q, T k, T v, T out, T lse, bool causal, Scale scale) {
        void* stream = q.stream();
        AttentionOptions options;
        options.causal = causal;
        options.scale = scale;
        const Release release;
        attention_forward(q, k, v, out, lse, options, stream);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("causal") = false, py::arg("scale") = py::none());
  m.def("attention_workspace", [](T q, T k) { return attention_workspace(q, k); });
  m.def("attention_forward", [](T q, T k, T v, T out, T lse, const py::tuple& options, OptionalT workspace) {
    void* stream = q.stream();
    Options o(options);
    o.value.workspace = pointer_to(workspace);
    const Release release;
    attention_forward(q, k, v, out, lse, o.value, stream);
  });
  m.def("attention_backward", [](T dout, OptionalT dlse, T q, T k, T v, T out, T lse, T dq, T dk, T dv, T delta,
                                 OptionalT dbias, OptionalT dsink, const py::tuple& options) {
    void* stream = q.stream();
    const Options o(options);
    const Release release;
    attention_backward(dout, pointer_to(dlse), q, k, v, out, lse, dq, dk, dv, delta, o.value,
                       {pointer_to(dbias), pointer_to(dsink)}, stream);
  });
  m.def("attention_varlen_forward", [](T q, T k, T v, T cu_seqlens_q, T cu_seqlens_k, T out, T lse, Length max_seqlen_q,
                                       Length max_seqlen_k, const py::tuple& options) {
    void* stream = q.stream();
    const Options o(options);
    const Release release;
    attention_varlen_forward(q, k, v, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, out, lse, o.value,
                             stream);
  });
  m.def("attention_varlen_backward", [](T dout, OptionalT dlse, T q, T k, T v, T cu_seqlens_q, T cu_seqlens_k, T out,
                                        T lse, T dq, T dk, T dv, T delta, OptionalT dbias, OptionalT dsink,
                                        Length max_seqlen_q, Length max_seqlen_k, const py::tuple& options) {
    void* stream = q.stream();
    const Options o(options);
    const Release release;
    attention_varlen_backward(dout, pointer_to(dlse), q, k, v, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                              out, lse, dq, dk, dv, delta, o.value, {pointer_to(dbias), pointer_to(dsink)}, stream);
  });
  m.def("merge_attention", [](const Tensors& outs, const Tensors& lses, T out, T lse) {
    void* stream = out.stream();
    const auto o = pointers_to(outs), l = pointers_to(lses);
    const Release release;
    merge_attention(o.data(), l.data(), static_cast<int>(o.size()), out, lse, stream);
  });
  m.def("merge_attention_backward", [](T dout, T dlse, const Tensors& outs, const Tensors& lses, T out, T lse,
                                       const Tensors& douts, const Tensors& dlses) {
    void* stream = out.stream();
    const auto o = pointers_to(outs), l = pointers_to(lses), d = pointers_to(douts), e = pointers_to(dlses);
    const Release release;
    merge_attention_backward(dout, dlse, o.data(), l.data(), static_cast<int>(o.size()), out, lse, d.data(), e.data(),
                             stream);
  });
  m.def("rope_apply", [](T x, T cos, T sin, T out, bool interleaved, bool inverse) {
    void* stream = x.stream();
    const Release release;
    rope_apply(x, cos, sin, out, interleaved, inverse, stream);
  });
  m.def("attention_column_sums", [](T q, T k, T lse, T sums, OptionalT last_key, Scale scale) {
    void* stream = q.stream();
    const Release release;
    attention_column_sums(q, k, lse, sums, {pointer_to(last_key), scale}, stream);
  });
  m.def("attention_block_max",
        [](T q, T k, T lse, int64_t block_q, int64_t block_k, T maxima, OptionalT last_key, Scale scale) {
          void* stream = q.stream();
          const Release release;
          attention_block_max(q, k, lse, block_q, block_k, maxima, {pointer_to(last_key), scale}, stream);
        });
  m.def("attention_pack_mask", [](T mask, int64_t keys, T words) {
    void* stream = mask.stream();
    const Release release;
    attention_pack_mask(mask, keys, words, stream);
  });
  m.def("paged_attention_workspace", [](T q, T k_pages, T v_pages, T block_table, Length num_splits, int format) {
    PagedAttentionOptions options;
    options.num_splits = num_splits;
    options.format = static_cast<CacheFormat>(format);
    return paged_attention_workspace(q, {k_pages, v_pages, block_table}, options);
  });
  m.def("paged_attention", [](T q, T k_pages, T v_pages, T block_table, T seq_lens, bool causal, Scale scale,
                              Length left, Length right, double softcap, Length num_splits, int format,
                              OptionalT k_channels, OptionalT v_channels, T out, T lse, OptionalT workspace) {
    void* stream = q.stream();
    const Release release;
    paged_attention(q, {k_pages, v_pages, block_table}, seq_lens, out, lse,
                    {causal, scale, left, right, softcap, num_splits, static_cast<CacheFormat>(format),
                     pointer_to(k_channels), pointer_to(v_channels)},
                    pointer_to(workspace), stream);
  });
  m.def("cache_row_bytes",
        [](int format, int64_t dim) { return cache_row_bytes(static_cast<CacheFormat>(format), dim); });
  def_operator(m, "cache_append",
               [](T k_pages, T v_pages, T block_table, T start, T k, T v, int format, OptionalT k_channels,
                  OptionalT v_channels, OptionalT cos, OptionalT sin, bool interleaved) {
                 void* stream = k_pages.stream();
                 const Release release;
                 cache_append({k_pages, v_pages, block_table}, start, k, v,
                              {static_cast<CacheFormat>(format), pointer_to(k_channels), pointer_to(v_channels),
                               pointer_to(cos), pointer_to(sin), interleaved},
                              stream);
               });
  def_operator(m, "cache_rotate",
               [](T k_pages, T block_table, T positions, int64_t dim, int format, OptionalT k_channels, T cos, T sin,
                  bool interleaved) {
                 void* stream = k_pages.stream();
                 const Release release;
                 cache_rotate(
                     k_pages, block_table, positions, dim,
                     {static_cast<CacheFormat>(format), pointer_to(k_channels), nullptr, &cos, &sin, interleaved},
                     stream);
               });
}

}  // namespace tilewise

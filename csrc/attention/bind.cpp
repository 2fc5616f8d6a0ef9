// Python names of the family's functions; no logic.
#include "binding/families.h"
#include "binding/tensor_caster.h"
#include "tilewise/attention.h"

namespace py = pybind11;

namespace tilewise {

void bind_attention(py::module_& m) {
  using Scale = std::optional<double>;
  using Length = std::optional<int64_t>;
  using T = const PyTensor&;
  m.def(
      "attention_forward",
      [](T q, T k, T v, T out, T lse, bool causal, Scale scale) {
        void* stream = q.stream();
        const py::gil_scoped_release release;
        attention_forward(q, k, v, out, lse, {causal, scale, false}, stream);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("causal") = false, py::arg("scale") = py::none());
  m.def("attention_backward", [](T dout, T q, T k, T v, T out, T lse, T dq, T dk, T dv, T delta, bool causal,
                                 Scale scale, bool deterministic) {
    void* stream = q.stream();
    const py::gil_scoped_release release;
    attention_backward(dout, q, k, v, out, lse, dq, dk, dv, delta, {causal, scale, deterministic}, stream);
  });
  m.def("attention_varlen_forward", [](T q, T k, T v, T cu_seqlens_q, T cu_seqlens_k, T out, T lse, Length max_seqlen_q,
                                       Length max_seqlen_k, bool causal, Scale scale) {
    void* stream = q.stream();
    const py::gil_scoped_release release;
    attention_varlen_forward(q, k, v, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, out, lse,
                             {causal, scale, false}, stream);
  });
  m.def("attention_varlen_backward",
        [](T dout, T q, T k, T v, T cu_seqlens_q, T cu_seqlens_k, T out, T lse, T dq, T dk, T dv, T delta,
           Length max_seqlen_q, Length max_seqlen_k, bool causal, Scale scale, bool deterministic) {
          void* stream = q.stream();
          const py::gil_scoped_release release;
          attention_varlen_backward(dout, q, k, v, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, out, lse,
                                    dq, dk, dv, delta, {causal, scale, deterministic}, stream);
        });
}

}  // namespace tilewise

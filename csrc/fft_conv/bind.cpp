// Python names of the family's functions; no logic.
#include "binding/families.h"
#include "binding/tensor_caster.h"
#include "tilewise/fft_conv.h"

namespace py = pybind11;

namespace tilewise {
namespace {

// What every function of the family starts with, in the operators' order.
FftConvInputs inputs(const PyTensor& u, const PyTensor& k, const OptionalTensor& pregate,
                     const OptionalTensor& postgate, const OptionalTensor& skip, bool causal,
                     const OptionalTensor* workspace = nullptr) {
  return {u,
          k,
          pointer_to(pregate),
          pointer_to(postgate),
          pointer_to(skip),
          causal,
          workspace ? pointer_to(*workspace) : nullptr};
}

}  // namespace

void bind_fft_conv(py::module_& m) {
  m.def("fft_conv",
        [](const PyTensor& u, const PyTensor& k, const OptionalTensor& pregate, const OptionalTensor& postgate,
           const OptionalTensor& skip, bool causal, const OptionalTensor& workspace, const PyTensor& y) {
          void* stream = u.stream();
          const py::gil_scoped_release release;
          fft_conv_forward(inputs(u, k, pregate, postgate, skip, causal, &workspace), y, stream);
        });
  m.def("fft_conv_backward",
        [](const PyTensor& u, const PyTensor& k, const OptionalTensor& pregate, const OptionalTensor& postgate,
           const OptionalTensor& skip, bool causal, const OptionalTensor& workspace, const PyTensor& dy,
           const OptionalTensor& du, const OptionalTensor& dk, const OptionalTensor& dpregate,
           const OptionalTensor& dpostgate, const OptionalTensor& dskip) {
          void* stream = u.stream();
          const FftConvGradients out = {pointer_to(du), pointer_to(dk), pointer_to(dpregate), pointer_to(dpostgate),
                                        pointer_to(dskip)};
          const py::gil_scoped_release release;
          fft_conv_backward(inputs(u, k, pregate, postgate, skip, causal, &workspace), dy, out, stream);
        });
  m.def("fft_conv_workspace", [](const PyTensor& u, const PyTensor& k, const OptionalTensor& pregate,
                                 const OptionalTensor& postgate, const OptionalTensor& skip, bool causal) {
    return fft_conv_forward_workspace(inputs(u, k, pregate, postgate, skip, causal));
  });
  m.def("fft_conv_backward_workspace",
        [](const PyTensor& u, const PyTensor& k, const OptionalTensor& pregate, const OptionalTensor& postgate,
           const OptionalTensor& skip, bool causal, const OptionalTensor& du, const OptionalTensor& dk,
           const OptionalTensor& dpregate, const OptionalTensor& dpostgate, const OptionalTensor& dskip) {
          const FftConvGradients out = {pointer_to(du), pointer_to(dk), pointer_to(dpregate), pointer_to(dpostgate),
                                        pointer_to(dskip)};
          return fft_conv_backward_workspace(inputs(u, k, pregate, postgate, skip, causal), out);
        });
}

}  // namespace tilewise

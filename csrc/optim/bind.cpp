// Python names of the family's functions; no logic.
#include "binding/families.h"
#include "binding/tensor_caster.h"
#include "common/check.h"
#include "tilewise/optim.h"

namespace py = pybind11;

namespace tilewise {
namespace {

using Tensors = std::vector<PyTensor>;

void check_lengths(size_t expected, std::initializer_list<std::pair<const char*, const Tensors*>> lists) {
  for (const auto& [name, list] : lists)
    Check("adamw_step")
        .that(list->size() == expected, name, "has %zu tensors, expected %zu (params')", list->size(), expected);
}

void adamw_step_lists(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                      const Tensors& scales, const Tensors& steps, double lr, double beta1, double beta2, double eps,
                      double weight_decay, bool maximize) {
  check_lengths(params.size(), {{"grads", &grads},
                                {"exp_avgs", &exp_avgs},
                                {"exp_avg_sqs", &exp_avg_sqs},
                                {"scales", &scales},
                                {"steps", &steps}});
  std::vector<AdamWSlot> slots(params.size());
  for (size_t i = 0; i < slots.size(); i++)
    slots[i] = {params[i], grads[i], exp_avgs[i], exp_avg_sqs[i], scales[i], steps[i]};
  void* stream = params.empty() ? nullptr : params[0].stream();
  const py::gil_scoped_release release;
  adamw_step(slots.data(), slots.size(), {lr, beta1, beta2, eps, weight_decay, maximize}, stream);
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("adamw_step", &adamw_step_lists);
  m.def("quantize_state",
        [](const PyTensor& values, const PyTensor& codes, const PyTensor& scales, bool is_signed, int bits) {
          void* stream = values.stream();
          const py::gil_scoped_release release;
          quantize_state(values, codes, scales, is_signed, bits, stream);
        });
  m.def("dequantize_state",
        [](const PyTensor& codes, const PyTensor& scales, const PyTensor& values, bool is_signed, int bits) {
          void* stream = values.stream();
          const py::gil_scoped_release release;
          dequantize_state(codes, scales, values, is_signed, bits, stream);
        });
}

}  // namespace tilewise

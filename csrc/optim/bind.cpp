// Python names of the family's functions; no logic.
#include <array>

#include "binding/families.h"
#include "binding/tensor_caster.h"
#include "common/check.h"
#include "tilewise/optim.h"

namespace py = pybind11;

namespace tilewise {
namespace {

// The columns of OptimizerSlot, as Python passes them; a column may be empty where no slot has such a tensor.
struct Columns {
  Tensors params, grads, first, first_scales, second, second_scales, residuals, steps;
  std::vector<int64_t> rows, streams;

  template <class List>
  void check_length(const List& list, const char* name, bool optional) const {
    Check("optimizer_step")
        .that(list.size() == params.size() || (optional && list.empty()), name,
              "has %zu entries, expected %zu (params')", list.size(), params.size());
  }

  std::vector<OptimizerSlot> slots() const {
    check_length(grads, "grads", false);
    check_length(steps, "steps", false);
    for (const auto& [list, name] :
         {std::pair(&first, "first"), std::pair(&first_scales, "first_scales"), std::pair(&second, "second"),
          std::pair(&second_scales, "second_scales"), std::pair(&residuals, "residuals")})
      check_length(*list, name, true);
    check_length(rows, "rows", true);
    check_length(streams, "streams", true);
    const auto at = [](const auto& list, size_t i) {
      return i < list.size() ? list[i] : typename std::decay_t<decltype(list)>::value_type{};
    };
    std::vector<OptimizerSlot> out;
    for (size_t i = 0; i < params.size(); i++)
      out.push_back({params[i], grads[i], at(first, i), at(first_scales, i), at(second, i), at(second_scales, i),
                     at(residuals, i), steps[i], at(rows, i), at(streams, i)});
    return out;
  }
};

OptimizerRule rule_of(const std::string& name) {
  constexpr const char* names[] = {"adam", "sgd", "lion", "rmsprop", "adagrad"};
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return static_cast<OptimizerRule>(i);
  throw Error(ErrorKind::value, "optimizer_step: rule is " + name + ", expected adam, sgd, lion, rmsprop or adagrad");
}

// `numbers` and `flags` in the order of OptimizerOptions' fields.
OptimizerOptions options_of(const std::string& rule, const std::array<double, 7>& numbers,
                            const std::array<bool, 5>& flags, int64_t seed,
                            const std::array<OptionalTensor, 4>& tensors) {
  OptimizerOptions o;
  o.rule = rule_of(rule);
  size_t i = 0, j = 0, k = 0;
  for (double* field : {&o.lr, &o.beta1, &o.beta2, &o.eps, &o.weight_decay, &o.dampening, &o.lr_decay})
    *field = numbers[i++];
  for (bool* field : {&o.decoupled_weight_decay, &o.nesterov, &o.maximize, &o.stochastic_rounding, &o.capturable})
    *field = flags[j++];
  o.seed = seed;
  for (Tensor* field : {&o.lr_tensor, &o.found_inf, &o.grad_scale, &o.workspace}) {
    if (tensors[k]) *field = *tensors[k];
    k++;
  }
  return o;
}

}  // namespace

void bind_optim(py::module_& m) {
  m.def("optimizer_workspace", [](int64_t numel, int64_t rows) {
    OptimizerSlot slot;
    slot.param = Tensor(nullptr, DType::f32, {numel});
    slot.rows = rows;
    return optimizer_workspace(&slot, 1);
  });
  m.def("optimizer_step", [](Tensors params, Tensors grads, Tensors first, Tensors first_scales, Tensors second,
                             Tensors second_scales, Tensors residuals, Tensors steps, std::vector<int64_t> rows,
                             std::vector<int64_t> streams, const std::string& rule,
                             const std::array<double, 7>& numbers, const std::array<bool, 5>& flags, int64_t seed,
                             const std::array<OptionalTensor, 4>& tensors) {
    const Columns columns = {std::move(params), std::move(grads),         std::move(first),     std::move(first_scales),
                             std::move(second), std::move(second_scales), std::move(residuals), std::move(steps),
                             std::move(rows),   std::move(streams)};
    const OptimizerOptions options = options_of(rule, numbers, flags, seed, tensors);
    void* stream = columns.params.empty() ? nullptr : columns.params[0].stream();
    const py::gil_scoped_release release;
    const std::vector<OptimizerSlot> slots = columns.slots();
    optimizer_step(slots.data(), slots.size(), options, stream);
  });
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
  m.def("quantize_matrix",
        [](const PyTensor& values, const PyTensor& codes, const PyTensor& scales, const OptionalTensor& diagonal) {
          void* stream = values.stream();
          const py::gil_scoped_release release;
          quantize_matrix(values, codes, scales, pointer_to(diagonal), stream);
        });
  m.def("dequantize_matrix",
        [](const PyTensor& codes, const PyTensor& scales, const OptionalTensor& diagonal, const PyTensor& values) {
          void* stream = values.stream();
          const py::gil_scoped_release release;
          dequantize_matrix(codes, scales, pointer_to(diagonal), values, stream);
        });
  m.def("orthonormalize", [](const PyTensor& rows, const PyTensor& defect, const PyTensor& out) {
    void* stream = rows.stream();
    const py::gil_scoped_release release;
    orthonormalize(rows, defect, out, stream);
  });
}

}  // namespace tilewise

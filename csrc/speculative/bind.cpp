// Python names of the family's functions; no logic.
#include "binding/families.h"
#include "binding/tensor_caster.h"
#include "tilewise/speculative.h"

namespace py = pybind11;

namespace tilewise {

void bind_speculative(py::module_& m) {
  m.def("tree_finalize",
        [](const PyTensor& parent, const PyTensor& n_nodes, const PyTensor& seq_lens, const PyTensor& positions,
           const PyTensor& first_child, const PyTensor& next_sibling, const PyTensor& ancestor_bits) {
          void* stream = parent.stream();
          const py::gil_scoped_release release;
          tree_finalize(parent, n_nodes, seq_lens, positions, first_child, next_sibling, ancestor_bits, stream);
        });
}

}  // namespace tilewise

// Python names of the family's functions; no logic.
#include "binding/families.h"
#include "binding/tensor_caster.h"
#include "tilewise/sparse.h"

namespace py = pybind11;

namespace tilewise {

void bind_sparse(py::module_& m) {
  m.def("nm_linear", [](const PyTensor& x, const PyTensor& values, const PyTensor& indices, const OptionalTensor& bias,
                        const PyTensor& y) {
    void* stream = x.stream();
    const py::gil_scoped_release release;
    nm_linear(x, values, indices, pointer_to(bias), y, stream);
  });
  m.def("nm_linear_dx", [](const PyTensor& dy, const PyTensor& values, const PyTensor& indices, const PyTensor& dx) {
    void* stream = dy.stream();
    const py::gil_scoped_release release;
    nm_linear_dx(dy, values, indices, dx, stream);
  });
  m.def("nm_linear_dvalues",
        [](const PyTensor& dy, const PyTensor& x, const PyTensor& indices, const PyTensor& dvalues) {
          void* stream = dy.stream();
          const py::gil_scoped_release release;
          nm_linear_dvalues(dy, x, indices, dvalues, stream);
        });
  m.def("column_sum", [](const PyTensor& dy, const PyTensor& total) {
    void* stream = dy.stream();
    const py::gil_scoped_release release;
    column_sum(dy, total, stream);
  });
  m.def("csr_linear",
        [](const PyTensor& x, const PyTensor& values, const PyTensor& crow, const PyTensor& col, int64_t columns,
           int64_t tile, const PyTensor& tile_ptr, const PyTensor& records, const PyTensor& within,
           const OptionalTensor& order, const OptionalTensor& bias, const PyTensor& y) {
          void* stream = x.stream();
          const py::gil_scoped_release release;
          csr_linear(x, values, {crow, col, columns, tile, tile_ptr, records, within}, pointer_to(order),
                     pointer_to(bias), y, stream);
        });
  m.def("csr_linear_dvalues", [](const PyTensor& dy, const PyTensor& x, const PyTensor& crow, const PyTensor& col,
                                 int64_t columns, int64_t tile, const PyTensor& tile_ptr, const PyTensor& records,
                                 const PyTensor& within, const PyTensor& dvalues) {
    void* stream = dy.stream();
    const py::gil_scoped_release release;
    csr_linear_dvalues(dy, x, {crow, col, columns, tile, tile_ptr, records, within}, dvalues, stream);
  });
}

}  // namespace tilewise

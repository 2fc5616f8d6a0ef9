// The extension module tilewise._C: a thin layer over libtilewise. Python code calls it through registered operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding/errors.h"
#include "binding/families.h"
#include "binding/operator.h"
#include "common/dispatch.h"
#include "tilewise/runtime.h"

namespace py = pybind11;

namespace tilewise {
namespace {

void translate(std::exception_ptr e) {
  try {
    if (e) std::rethrow_exception(e);
  } catch (const Error& error) {
    PyErr_SetString(python_type(error.kind()), error.what());
  }
}

py::list device_list() {
  py::list list;
  for (const CudaDevice& d : cuda_devices()) {
    py::dict entry;
    entry["name"] = d.name;
    entry["compute_capability"] = d.compute_capability;
    entry["memory_bytes"] = d.memory_bytes;
    list.append(entry);
  }
  return list;
}

void bind_runtime(py::module_& m) {
  m.def("version", &version);
  m.def("cuda_architectures", &cuda_architectures);
  m.def("cuda_devices", &device_list);
  m.def("isa", &isa);
  m.def("isa_levels", &isa_levels);
  m.def("set_isa", &set_isa);
  m.def("thread_backend", &thread_backend);
  m.def("num_threads", &num_threads);
  m.def("attach_torch_threads", &attach_torch_threads);
  m.def("emulate", [](std::optional<std::string> path) { emulate(path ? path->c_str() : nullptr); });
  m.def("emulating", &emulating);
  m.def("forget_buffers", &forget_buffers);
  m.def("register_operator", &register_operator);
}

}  // namespace
}  // namespace tilewise

PYBIND11_MODULE(_C, m) {
  py::register_exception_translator(&tilewise::translate);
  tilewise::bind_runtime(m);
  tilewise::bind_families(m);
}

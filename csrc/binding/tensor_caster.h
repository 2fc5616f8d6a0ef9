// From a Python array (torch, NumPy, CuPy, JAX) to a tilewise::Tensor view, through DLPack's C exchange API where the
// type offers it (no Python call, no reference counting: about 30 ns), else through __dlpack__.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "binding/dlpack_abi.h"
#include "common/dispatch.h"
#include "tilewise/tensor.h"

namespace tilewise {

// What bound functions take: a view that is valid for the duration of the call.
struct PyTensor : Tensor {
  const dlpack::ExchangeApi* api = nullptr;
  pybind11::object owner;  // the capsule of the slow path

  // The stream on which the caller works on this tensor's device; null on CPU.
  void* stream() const;
};

// What every way into a view asks: no more dimensions than it holds; memory, which an emulator is told of.
void check_dimensions(int64_t dimensions);
void check_view(const Tensor& t, const void* memory);

// Null where the type has no exchange API. Looked up once per type.
const dlpack::ExchangeApi* exchange_api_of(PyTypeObject* type);
// Fills `out`; false if the object is no array. Throws when the array has a layout that Tensor cannot hold.
bool load_tensor(PyObject* object, PyTensor& out);

// Optional arguments: None arrives as null.
using OptionalTensor = std::optional<PyTensor>;
inline const Tensor* pointer_to(const OptionalTensor& t) {
  return t ? &*t : nullptr;
}

// Lists of tensors.
using Tensors = std::vector<PyTensor>;
inline std::vector<const Tensor*> pointers_to(const Tensors& list) {
  std::vector<const Tensor*> out;
  for (const PyTensor& t : list) out.push_back(&t);
  return out;
}

}  // namespace tilewise

namespace pybind11::detail {
template <>
struct type_caster<tilewise::PyTensor> {
  PYBIND11_TYPE_CASTER(tilewise::PyTensor, const_name("Tensor"));
  bool load(handle source, bool) { return tilewise::load_tensor(source.ptr(), value); }
};
}  // namespace pybind11::detail

#include "binding/tensor_caster.h"

#include "tilewise/error.h"

namespace tilewise {
namespace {

namespace py = pybind11;

DType dtype_of(dlpack::DataType t) {
  if (t.lanes != 1) return DType::unsupported;
  switch (t.code << 8 | t.bits) {
    case dlpack::kFloat << 8 | 16: return DType::f16;
    case dlpack::kBfloat << 8 | 16: return DType::bf16;
    case dlpack::kFloat << 8 | 32: return DType::f32;
    case dlpack::kFloat << 8 | 64: return DType::f64;
    case dlpack::kInt << 8 | 8: return DType::i8;
    case dlpack::kUInt << 8 | 8: return DType::u8;
    case dlpack::kInt << 8 | 16: return DType::i16;
    case dlpack::kInt << 8 | 32: return DType::i32;
    case dlpack::kInt << 8 | 64: return DType::i64;
    case dlpack::kUInt << 8 | 16: return DType::u16;
    case dlpack::kUInt << 8 | 32: return DType::u32;
    case dlpack::kUInt << 8 | 64: return DType::u64;
    case dlpack::kBool << 8 | 8: return DType::boolean;
    default: return DType::unsupported;
  }
}

Device device_of(dlpack::Device d) {
  switch (d.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost: return {DeviceType::cpu, 0};
    case dlpack::kCuda:
    case dlpack::kCudaManaged: return {DeviceType::cuda, d.index};
    default: return {DeviceType::other, d.index};
  }
}

void fill_view(const dlpack::Tensor& t, Tensor& out) {
  check_dimensions(t.ndim);
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  out.ndim = t.ndim;
  out.dtype = dtype_of(t.dtype);
  out.device = device_of(t.device);
  int64_t contiguous_stride = 1;
  for (int i = t.ndim - 1; i >= 0; i--) {
    out.shape[i] = t.shape[i];
    out.strides[i] = t.strides ? t.strides[i] : contiguous_stride;
    contiguous_stride *= t.shape[i];
  }
  check_view(out, t.data);
}

bool load_through_capsule(PyObject* object, PyTensor& out) {
  static PyObject* name = PyUnicode_InternFromString("__dlpack__");
  static PyObject* keyword = Py_BuildValue("(s)", "max_version");
  static PyObject* version = Py_BuildValue("(ii)", 1, 0);
  auto method = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!method) {
    PyErr_Clear();
    return false;
  }
  PyObject* arguments[1] = {version};
  PyObject* capsule = PyObject_Vectorcall(method.ptr(), arguments, 0, keyword);
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer from before version 1
    PyErr_Clear();
    capsule = PyObject_CallNoArgs(method.ptr());
  }
  if (!capsule) throw py::error_already_set();
  out.owner = py::reinterpret_steal<py::object>(capsule);  // its own destructor frees what was never consumed
  if (void* p = PyCapsule_IsValid(capsule, "dltensor_versioned") ? PyCapsule_GetPointer(capsule, "dltensor_versioned")
                                                                 : nullptr) {
    fill_view(static_cast<dlpack::ManagedTensorVersioned*>(p)->tensor, out);
    return true;
  }
  if (void* p = PyCapsule_IsValid(capsule, "dltensor") ? PyCapsule_GetPointer(capsule, "dltensor") : nullptr) {
    fill_view(static_cast<dlpack::ManagedTensor*>(p)->tensor, out);
    return true;
  }
  return false;
}

const dlpack::ExchangeApi* find_exchange_api(PyTypeObject* type) {
  auto capsule = py::reinterpret_steal<py::object>(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  void* p = capsule ? PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api") : nullptr;
  PyErr_Clear();
  auto* header = static_cast<const dlpack::ExchangeHeader*>(p);
  while (header && header->version.major != dlpack::kMajorVersion) header = header->previous;
  auto* api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api && api->view_of_object ? api : nullptr;
}

}  // namespace

void check_dimensions(int64_t dimensions) {
  if (dimensions > Tensor::kMaxDims)
    throw Error(ErrorKind::value, "tensor has " + std::to_string(dimensions) + " dimensions, expected at most " +
                                      std::to_string(Tensor::kMaxDims));
}

void check_view(const Tensor& t, const void* memory) {
  if (t.numel() == 0) return;
  // A FakeTensor passes as an array without memory: a kernel must never see it.
  if (!memory) throw Error(ErrorKind::value, "tensor has no memory (a fake or meta tensor?), expected a real one");
  if (!emulating() || t.device.type != DeviceType::cpu) return;
  int64_t extent = 1;
  for (int i = 0; i < t.ndim; i++) extent += (t.shape[i] - 1) * t.strides[i];
  note_buffer(t.data, static_cast<size_t>(extent) * item_size(t.dtype), "tensor");
}

void* PyTensor::stream() const {
  if (!api || device.type != DeviceType::cuda) return nullptr;
  void* stream = nullptr;
  if (!api->current_stream(dlpack::kCuda, device.index, &stream)) return stream;
  const py::gil_scoped_acquire interpreter;  // an operator's kernel runs without it
  PyErr_Clear();
  throw Error(ErrorKind::runtime, "no current stream on cuda:" + std::to_string(device.index));
}

const dlpack::ExchangeApi* exchange_api_of(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static Entry cache[8];  // guarded by the GIL
  static int used = 0;
  for (int i = 0; i < used; i++)
    if (cache[i].type == type) return cache[i].api;
  const dlpack::ExchangeApi* api = find_exchange_api(type);
  if (used < 8) {
    Py_INCREF(type);
    cache[used++] = {type, api};
  }
  return api;
}

bool load_tensor(PyObject* object, PyTensor& out) {
  out.api = exchange_api_of(Py_TYPE(object));
  if (!out.api) return load_through_capsule(object, out);
  dlpack::Tensor view;
  if (out.api->view_of_object(object, &view)) throw py::error_already_set();
  fill_view(view, out);
  return true;
}

}  // namespace tilewise

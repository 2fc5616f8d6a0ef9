#include "binding/operator.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

#include "binding/errors.h"
#include "common/torch_library.h"

namespace tilewise {
namespace {

namespace py = pybind11;
using torch_abi::Failed;

constexpr int kDtypeCodes = 64;  // torch's numbers of dtypes are below

// All that kernels ask of torch. Filled once, under the GIL, before the first kernel is registered.
struct Torch {
  torch_abi::Functions functions;
  DType dtypes[kDtypeCodes];
  int32_t cpu, cuda;
  const dlpack::ExchangeApi* exchange;  // of torch.Tensor: knows the current stream
};
Torch torch;

template <class Function>
bool find(Function*& out, void* library, const char* name) {
  out = reinterpret_cast<Function*>(dlsym(library, name));
  return out;
}

bool find_functions(torch_abi::Functions& f, void* library) {
  return find(f.open_library, library, "aoti_torch_library_init_impl") &&
         find(f.add_kernel, library, "torch_library_impl") &&
         find(f.delete_tensor, library, "aoti_torch_delete_tensor_object") &&
         find(f.data_pointer, library, "aoti_torch_get_data_ptr") &&
         find(f.dimensions, library, "aoti_torch_get_dim") && find(f.sizes, library, "aoti_torch_get_sizes") &&
         find(f.strides, library, "aoti_torch_get_strides") && find(f.dtype, library, "aoti_torch_get_dtype") &&
         find(f.device_type, library, "aoti_torch_get_device_type") &&
         find(f.device_index, library, "aoti_torch_get_device_index") &&
         find(f.list_size, library, "torch_list_size") && find(f.list_item, library, "torch_list_get_item") &&
         find(f.delete_list, library, "torch_delete_list");
}

bool find_number(int32_t& out, void* library, const char* name) {
  int32_t (*function)() = nullptr;
  if (!find(function, library, name)) return false;
  out = function();
  return true;
}

bool find_dtypes(DType* out, void* library) {
  constexpr std::pair<const char*, DType> kNames[] = {
      {"float16", DType::f16}, {"bfloat16", DType::bf16}, {"float32", DType::f32}, {"float64", DType::f64},
      {"int8", DType::i8},     {"uint8", DType::u8},      {"int16", DType::i16},   {"int32", DType::i32},
      {"int64", DType::i64},   {"uint16", DType::u16},    {"uint32", DType::u32},  {"uint64", DType::u64},
      {"bool", DType::boolean}};
  std::fill_n(out, kDtypeCodes, DType::unsupported);
  for (const auto& [name, dtype] : kNames) {
    int32_t code;
    if (!find_number(code, library, (std::string("aoti_torch_dtype_") + name).c_str())) return false;
    if (code < 0 || code >= kDtypeCodes) return false;
    out[code] = dtype;
  }
  return true;
}

bool find_torch(const py::type& tensor_type) {
  void* library = torch_library();
  torch.exchange = exchange_api_of(reinterpret_cast<PyTypeObject*>(tensor_type.ptr()));
  return library && torch.exchange && find_functions(torch.functions, library) && find_dtypes(torch.dtypes, library) &&
         find_number(torch.cpu, library, "aoti_torch_device_type_cpu") &&
         find_number(torch.cuda, library, "aoti_torch_device_type_cuda");
}

std::map<std::string, torch_abi::Kernel>& kernels() {
  static std::map<std::string, torch_abi::Kernel> all;
  return all;
}

// Never closed: kernels stay as long as the process.
torch_abi::Library library_of(const std::string& key) {
  static std::map<std::string, torch_abi::Library> open;
  torch_abi::Library& library = open[key];
  if (!library && torch.functions.open_library("tilewise", key.c_str(), __FILE__, __LINE__, &library))
    library = nullptr;
  return library;
}

void check(Failed failed) {
  if (failed) throw Error(ErrorKind::runtime, "an argument cannot be read through torch's C interface");
}

DeviceType device_of(int32_t type) {
  if (type == torch.cpu) return DeviceType::cpu;
  return type == torch.cuda ? DeviceType::cuda : DeviceType::other;
}

// Thrown without the interpreter; torch's own pybind11 has it set the error once it holds the interpreter again.
class PythonError : public py::builtin_exception {
 public:
  explicit PythonError(const Error& error) : builtin_exception(error.what()), kind_(error.kind()) {}
  void set_error() const override { PyErr_SetString(python_type(kind_), what()); }

 private:
  ErrorKind kind_;
};

}  // namespace

namespace operators {

void load(torch_abi::TensorHandle from, PyTensor& to) {
  const torch_abi::Functions& f = torch.functions;
  int64_t dimensions, *sizes, *strides;
  int32_t dtype, device, index;
  check(f.dimensions(from, &dimensions) || f.sizes(from, &sizes) || f.strides(from, &strides) ||
        f.data_pointer(from, &to.data) || f.dtype(from, &dtype) || f.device_type(from, &device) ||
        f.device_index(from, &index));
  check_dimensions(dimensions);
  to.ndim = static_cast<int>(dimensions);
  to.dtype = dtype >= 0 && dtype < kDtypeCodes ? torch.dtypes[dtype] : DType::unsupported;
  to.device = {device_of(device), device == torch.cpu ? 0 : index};
  std::copy_n(sizes, dimensions, to.shape);
  std::copy_n(strides, dimensions, to.strides);
  to.api = torch.exchange;
  check_view(to, to.data);
}

void drop(torch_abi::TensorHandle tensor) noexcept {
  torch.functions.delete_tensor(tensor);
}

size_t size_of(torch_abi::ListHandle list) {
  uint64_t size;
  check(torch.functions.list_size(list, &size));
  return size;
}

Value item_of(torch_abi::ListHandle list, size_t index) {
  Value item;
  check(torch.functions.list_item(list, index, &item));
  return item;
}

void drop(torch_abi::ListHandle list) noexcept {
  torch.functions.delete_list(list);
}

void raise(const Error& error) {
  throw PythonError(error);
}

void raise_arguments(uint64_t got, size_t expected) {
  throw Error(ErrorKind::runtime,
              "operator has " + std::to_string(got) + " arguments, its kernel expected " + std::to_string(expected));
}

void remember(const char* name, torch_abi::Kernel kernel) {
  kernels()[name] = kernel;
}

}  // namespace operators

bool register_operator(const std::string& name, const std::string& key, const py::type& tensor_type) {
  static const bool found = find_torch(tensor_type);
  const auto kernel = kernels().find(name);
  if (!found || kernel == kernels().end()) return false;
  torch_abi::Library library = library_of(key);
  return library && !torch.functions.add_kernel(library, name.c_str(), kernel->second, torch_abi::kVersion);
}

}  // namespace tilewise

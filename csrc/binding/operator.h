// Functions that are operators as they stand: bound for Python, and given to torch's dispatcher as C++ kernels, so that
// no call of them runs Python code. torch's stable C interface is looked up at run time (torch_abi.h); where it is not
// there, Python registers the bound function instead.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "binding/tensor_caster.h"
#include "binding/torch_abi.h"
#include "tilewise/error.h"

namespace tilewise {

// Lets other Python threads run, where this one holds the interpreter: the dispatcher has let it go already.
class Release {
 public:
  Release() {
    if (PyGILState_Check()) released_.emplace();
  }

 private:
  std::optional<pybind11::gil_scoped_release> released_;
};

namespace operators {

using torch_abi::Value;

void load(torch_abi::TensorHandle from, PyTensor& to);
void drop(torch_abi::TensorHandle tensor) noexcept;
size_t size_of(torch_abi::ListHandle list);
Value item_of(torch_abi::ListHandle list, size_t index);
void drop(torch_abi::ListHandle list) noexcept;
[[noreturn]] void raise(const Error& error);
[[noreturn]] void raise_arguments(uint64_t got, size_t expected);

template <class T>
T low_bytes(Value value) {
  T out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

// What a kernel is given, and owns until it is done. The constructor cannot fail: whatever happens to one argument,
// all are released.
template <class T>
struct Argument {
  static_assert(std::is_arithmetic_v<T>);
  using Wide =
      std::conditional_t<std::is_same_v<T, bool>, bool, std::conditional_t<std::is_integral_v<T>, int64_t, double>>;
  T value;
  explicit Argument(Value from) noexcept : value(static_cast<T>(low_bytes<Wide>(from))) {}
  T get() const { return value; }
};

template <>
struct Argument<PyTensor> {
  torch_abi::TensorHandle handle;
  PyTensor value;
  explicit Argument(Value from) noexcept : handle(low_bytes<torch_abi::TensorHandle>(from)) {}
  Argument(const Argument&) = delete;
  ~Argument() { drop(handle); }
  const PyTensor& get() {
    load(handle, value);
    return value;
  }
};

template <class T>
struct Argument<std::optional<T>> {
  std::optional<Argument<T>> inner;
  std::optional<T> value;
  explicit Argument(Value from) noexcept {
    auto* box = low_bytes<Value*>(from);
    if (box) inner.emplace(*box);
    delete box;
  }
  const std::optional<T>& get() {
    if (inner) value = inner->get();
    return value;
  }
};

template <>
struct Argument<Tensors> {
  torch_abi::ListHandle handle;
  std::vector<std::unique_ptr<Argument<PyTensor>>> items;
  Tensors value;
  explicit Argument(Value from) noexcept : handle(low_bytes<torch_abi::ListHandle>(from)) {}
  Argument(const Argument&) = delete;
  ~Argument() { drop(handle); }
  const Tensors& get() {
    for (size_t i = 0; i < size_of(handle); i++) {
      items.push_back(std::make_unique<Argument<PyTensor>>(item_of(handle, i)));
      value.push_back(items.back()->get());
    }
    return value;
  }
};

// The kernel that the dispatcher calls for a function without state: a lambda.
template <class Function>
struct Boxed {
  inline static const Function* function = nullptr;

  template <class... Parameters, size_t... Index>
  static void call(Value* stack, void (Function::*)(Parameters...) const, std::index_sequence<Index...>) {
    std::tuple<Argument<std::decay_t<Parameters>>...> arguments{stack[Index]...};
    (*function)(std::get<Index>(arguments).get()...);
  }
  template <class... Parameters>
  static void call(Value* stack, uint64_t given, void (Function::*signature)(Parameters...) const) {
    if (given != sizeof...(Parameters)) raise_arguments(given, sizeof...(Parameters));
    call(stack, signature, std::index_sequence_for<Parameters...>());
  }
  static void kernel(Value* stack, uint64_t given, uint64_t /*results*/) {
    try {
      call(stack, given, &Function::operator());
    } catch (const Error& error) {
      raise(error);
    }
  }
};

void remember(const char* name, torch_abi::Kernel kernel);

}  // namespace operators

// m.def, and a kernel for the operator of the same name, whose schema has the same arguments and no result.
template <class Function, class... Extra>
void def_operator(pybind11::module_& m, const char* name, Function function, const Extra&... extra) {
  static const Function kept = function;
  operators::Boxed<Function>::function = &kept;
  operators::remember(name, &operators::Boxed<Function>::kernel);
  m.def(name, function, extra...);
}

// Gives tilewise::<name> its C++ kernel for a dispatch key of torch; false where there is none, or no interface for it.
// `tensor_type` is torch.Tensor.
bool register_operator(const std::string& name, const std::string& key, const pybind11::type& tensor_type);

}  // namespace tilewise

// Compiled, never run: the binding declares torch's stable C interface as the headers that torch ships do.
#include "binding/torch_abi.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/version.h>

#include <type_traits>

using tilewise::torch_abi::Functions;

template <class Ours, class Theirs>
constexpr bool same(Ours Functions::*, Theirs*) {
  return std::is_same_v<Ours, Theirs*>;
}

static_assert(tilewise::torch_abi::kVersion == TORCH_VERSION_2_10_0);
static_assert(same(&Functions::open_library, &aoti_torch_library_init_impl));
static_assert(same(&Functions::add_kernel, &torch_library_impl));
static_assert(same(&Functions::delete_tensor, &aoti_torch_delete_tensor_object));
static_assert(same(&Functions::data_pointer, &aoti_torch_get_data_ptr));
static_assert(same(&Functions::dimensions, &aoti_torch_get_dim));
static_assert(same(&Functions::sizes, &aoti_torch_get_sizes));
static_assert(same(&Functions::strides, &aoti_torch_get_strides));
static_assert(same(&Functions::dtype, &aoti_torch_get_dtype));
static_assert(same(&Functions::device_type, &aoti_torch_get_device_type));
static_assert(same(&Functions::device_index, &aoti_torch_get_device_index));
static_assert(same(&Functions::list_size, &torch_list_size));
static_assert(same(&Functions::list_item, &torch_list_get_item));
static_assert(same(&Functions::delete_list, &torch_delete_list));

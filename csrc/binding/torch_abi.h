// The parts of torch's stable C interface (as of 2.10, and of every release since) that operators with a C++ kernel
// need, declared here so that no header of torch is needed and nothing is linked: the functions are looked up in the
// process, once. tests/test_binding.py asserts the declarations against the headers that torch ships.
#pragma once
#include <cstdint>

class TorchLibraryOpaque;
struct AtenTensorOpaque;
struct StableListOpaque;

namespace tilewise::torch_abi {

constexpr uint64_t kVersion = uint64_t{2} << 56 | uint64_t{10} << 48;

using Failed = int32_t;  // 0: no
using Library = TorchLibraryOpaque*;
using TensorHandle = AtenTensorOpaque*;
using ListHandle = StableListOpaque*;
// One argument of a kernel: a number or bool in its low bytes, or a handle that the kernel owns. An optional one is a
// pointer to a value from operator new, or null.
using Value = uint64_t;
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t results);

struct Functions {
  Failed (*open_library)(const char* name_space, const char* key, const char* file, uint32_t line, Library* out);
  Failed (*add_kernel)(Library library, const char* name, Kernel kernel, uint64_t version);
  Failed (*delete_tensor)(TensorHandle tensor);
  Failed (*data_pointer)(TensorHandle tensor, void** out);
  Failed (*dimensions)(TensorHandle tensor, int64_t* out);
  Failed (*sizes)(TensorHandle tensor, int64_t** out);  // borrowed, as are strides
  Failed (*strides)(TensorHandle tensor, int64_t** out);
  Failed (*dtype)(TensorHandle tensor, int32_t* out);
  Failed (*device_type)(TensorHandle tensor, int32_t* out);
  Failed (*device_index)(TensorHandle tensor, int32_t* out);
  Failed (*list_size)(ListHandle list, uint64_t* out);
  Failed (*list_item)(ListHandle list, uint64_t index, Value* out);
  Failed (*delete_list)(ListHandle list);
};

}  // namespace tilewise::torch_abi

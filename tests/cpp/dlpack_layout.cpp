// Compiled, never run: the binding's DLPack structs have the layout of the header that torch ships.
#include <ATen/dlpack.h>

#include <cstddef>

#include "binding/dlpack_abi.h"

namespace abi = tilewise::dlpack;

static_assert(sizeof(abi::Tensor) == sizeof(DLTensor));
static_assert(offsetof(abi::Tensor, data) == offsetof(DLTensor, data));
static_assert(offsetof(abi::Tensor, device) == offsetof(DLTensor, device));
static_assert(offsetof(abi::Tensor, ndim) == offsetof(DLTensor, ndim));
static_assert(offsetof(abi::Tensor, dtype) == offsetof(DLTensor, dtype));
static_assert(offsetof(abi::Tensor, shape) == offsetof(DLTensor, shape));
static_assert(offsetof(abi::Tensor, strides) == offsetof(DLTensor, strides));
static_assert(offsetof(abi::Tensor, byte_offset) == offsetof(DLTensor, byte_offset));
static_assert(offsetof(abi::ManagedTensor, tensor) == offsetof(DLManagedTensor, dl_tensor));
static_assert(offsetof(abi::ManagedTensorVersioned, tensor) == offsetof(DLManagedTensorVersioned, dl_tensor));
static_assert(sizeof(abi::ExchangeApi) == sizeof(DLPackExchangeAPI));
static_assert(offsetof(abi::ExchangeApi, view_of_object) ==
              offsetof(DLPackExchangeAPI, dltensor_from_py_object_no_sync));
static_assert(offsetof(abi::ExchangeApi, current_stream) == offsetof(DLPackExchangeAPI, current_work_stream));
static_assert(abi::kMajorVersion == DLPACK_MAJOR_VERSION);
static_assert(abi::kCuda == kDLCUDA && abi::kCudaHost == kDLCUDAHost && abi::kCudaManaged == kDLCUDAManaged);
static_assert(int(abi::kInt) == kDLInt && int(abi::kUInt) == kDLUInt && int(abi::kFloat) == kDLFloat);
static_assert(int(abi::kBfloat) == kDLBfloat && int(abi::kBool) == kDLBool);

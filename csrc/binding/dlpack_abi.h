// The parts of DLPack's C ABI (major version 1) that the binding reads, declared here so that no framework header is
// needed; tests/test_binding.py asserts the layout against the header that torch ships.
#pragma once
#include <cstdint>

namespace tilewise::dlpack {

constexpr uint32_t kMajorVersion = 1;

enum DeviceCode : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;  // strides in elements; null for contiguous before version 1.2
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};
struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};
// What `type(tensor).__dlpack_c_exchange_api__` points to.
struct ExchangeApi {
  ExchangeHeader header;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, Tensor* out);                        // may be null; borrows
  int (*current_stream)(DeviceCode device, int32_t index, void** stream);  // never null
};

}  // namespace tilewise::dlpack

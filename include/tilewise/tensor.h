// A non-owning view of an array: what every public function takes. No framework, no allocation.
#pragma once
#include <cstdint>
#include <initializer_list>

namespace tilewise {

enum class DType : uint8_t { f16, bf16, f32, f64, i8, u8, i16, i32, i64, u16, u32, u64, boolean, unsupported };
enum class DeviceType : uint8_t { cpu, cuda, other };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;
  bool operator==(const Device& o) const { return type == o.type && index == o.index; }
  bool operator!=(const Device& o) const { return !(*this == o); }
};

// Bytes of one element; 0 for DType::unsupported.
constexpr int item_size(DType t) {
  constexpr int sizes[] = {2, 2, 4, 8, 1, 1, 2, 4, 8, 2, 4, 8, 1, 0};
  return sizes[static_cast<int>(t)];
}

struct Tensor {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  int ndim = 0;
  DType dtype = DType::f32;
  Device device;

  Tensor() = default;
  // A contiguous, row-major array.
  Tensor(void* data, DType dtype, std::initializer_list<int64_t> dims, Device device = {})
      : data(data), ndim(static_cast<int>(dims.size())), dtype(dtype), device(device) {
    int i = 0;
    for (int64_t d : dims) shape[i++] = d;
    int64_t stride = 1;
    for (i = ndim - 1; i >= 0; i--) {
      strides[i] = stride;
      stride *= shape[i];
    }
  }

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= shape[i];
    return n;
  }
  // Whether the elements lie in row-major order without gaps; dimensions of size 1 do not count.
  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; i--) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

}  // namespace tilewise

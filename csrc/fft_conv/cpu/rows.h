// Rows of the tensors, and this thread's buffers.
#pragma once
#include "fft_conv/cpu/walk.h"
#include "fft_conv/params.h"

namespace tilewise {
namespace {

using fft_conv::BackwardParams;
using fft_conv::ForwardParams;
using fft_conv::Strides;
using fft_conv::Type;

// Where one row of a [b, h, l] tensor starts; null stays null.
template <class T>
inline T* row_of(const void* data, const Strides& strides, int64_t b, int64_t h) {
  return data ? static_cast<T*>(const_cast<void*>(data)) + b * strides.batch + h * strides.head : nullptr;
}

template <class T>
inline Signal input_row(const ForwardParams& p, int64_t b, int64_t h) {
  return signal(row_of<T>(p.u, p.u_strides, b, h), row_of<T>(p.pregate, p.pregate_strides, b, h), p.length);
}
inline Signal filter_row(const ForwardParams& p, int64_t h) {
  return signal<float>(p.k + h * p.k_stride, nullptr, p.filter_length);
}
// Adds skip * bypass to what the sink is given, and notes whether nothing at all is left to do with it.
template <class T>
inline void complete(const ForwardParams& p, int64_t h, const Signal& bypass, Sink& out) {
  out.skip = p.skip ? p.skip + h : nullptr;
  out.bypass = bypass;
  out.plain = is_float(static_cast<T*>(nullptr)) && out.out && !out.gate && !out.skip && !out.second_out;
}

// `count` transform buffers, and one more for both parts of a result when the convolution is circular.
struct Buffers {
  static constexpr int kMax = 5;
  float* transform[kMax] = {};
  float* planar = nullptr;

  bool allocate(const Runtime& rt, const Plan& plan, int count, bool circular) {
    const int64_t size = buffer_size(plan), extra = circular ? planar_size(plan) : 0;
    float* memory = scratch<float>(rt, 0, count * size + extra);
    for (int i = 0; memory && i < count; i++) transform[i] = memory + i * size;
    planar = memory ? memory + count * size : nullptr;
    return memory != nullptr;
  }
};

// Small jobs stay on one thread: about 50 us of work.
inline int64_t rows_per_task(const Plan& plan) {
  return max_of<int64_t>(1, 32768 / plan.size);
}

template <class F>
inline const char* with_type(Type type, const F& f) {
  switch (type) {
    case Type::f32: return f(float{});
    case Type::f16: return f(Fp16{});
    default: return f(Bf16{});
  }
}

}  // namespace
}  // namespace tilewise

// 16-bit floats as the emulated instructions see them.
#pragma once
#include "../simt.h"

namespace simt {
namespace rt {

inline float half_to_f32(uint16_t bits, bool is_bf16) {
  return is_bf16 ? to_f32(bf16{bits}) : fp16_to_f32(bits);
}
inline float low_half(uint32_t pair, bool is_bf16) {
  return half_to_f32(static_cast<uint16_t>(pair), is_bf16);
}
inline float high_half(uint32_t pair, bool is_bf16) {
  return half_to_f32(static_cast<uint16_t>(pair >> 16), is_bf16);
}

}  // namespace rt
}  // namespace simt

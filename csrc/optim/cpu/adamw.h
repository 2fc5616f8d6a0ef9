// One AdamW step of many tensors in one parallel pass. The blocks of all tensors are numbered through and split evenly
// over the threads, so that a hundred small tensors cost no more than one large one.
#pragma once
#include "optim/cpu/codec.h"

namespace tilewise {
namespace {

constexpr int64_t kGrainBlocks = 64;  // 8192 elements: some microseconds of work
// Worth 10 to 30 % in float32: the hardware's own prefetch follows too few of the six streams.
constexpr int kPrefetchBytes = 1536;

struct StepConstants {
  float beta1, beta2, grad_weight, square_weight, decay, eps, step_size, inv_correction2;
};

template <class T>
TILEWISE_INLINE void prefetch_block(const T* now) {
  const auto ahead = reinterpret_cast<uintptr_t>(now) + kPrefetchBytes;  // an integer: it may lie beyond the array
#pragma GCC unroll 8
  for (uintptr_t line = 0; line < kBlock * sizeof(T); line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
}

// a / b. On AVX-512 by an approximate reciprocal and one Newton step, within 2 ulp: a division would keep the divider
// busy that the square root needs.
TILEWISE_INLINE VF quotient(VF a, VF b) {
#if defined(__AVX512F__)
  VF r = (VF)_mm512_rcp14_ps((__m512)b);
  r = r + r * (1 - b * r);
  return a * r;
#else
  return a / b;
#endif
}

TILEWISE_INLINE VF updated(VF p, VF m, VF v, const StepConstants& k) {
  const VF denominator = sqrt(v) * set1(k.inv_correction2) + set1(k.eps);
  return p * set1(k.decay) - quotient(m * set1(k.step_size), denominator);
}
// The same where operands may be infinite, which the Newton step would turn into NaN.
TILEWISE_INLINE VF updated_nonfinite(VF p, VF m, VF v, const StepConstants& k) {
  const VF denominator = sqrt(v) * set1(k.inv_correction2) + set1(k.eps);
  return p * set1(k.decay) - m * set1(k.step_size) / denominator;
}

// ---- 4-bit states ----
struct BlockState {
  uint8_t *exp_avg, *exp_avg_sq;  // [64]
  float* scales;                  // [2]
};

// The parameter takes what torch would give it (NaN for a NaN or infinite gradient); moments that are not finite
// restart from zero, so that one bad gradient does not reach the other elements of the block through its scale.
template <class P>
__attribute__((noinline)) void update_nonfinite(P* p, BlockValues& m, BlockValues& v, const StepConstants& k) {
  for (int i = 0; i < kVectors; i++) {
    store(p + i * W, updated_nonfinite(load(p + i * W), m[i], v[i], k));
    const VI bad = (VI)((VU)v[i] >= kInfinityBits);
    m[i] = select(bad, set1(0), m[i]);
    v[i] = select(bad, set1(0), v[i]);
  }
}

template <class P, class G>
TILEWISE_INLINE void step_block(P* p, const G* g, BlockState s, const StepConstants& k) {
  BlockValues m, v;
  prefetch_block(p);
  prefetch_block(g);
  decode_signed(s.exp_avg, s.scales[0] * k.beta1, m);
  decode_unsigned(s.exp_avg_sq, s.scales[1] * k.beta2, v);
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; i++) {
    const VF grad = load(g + i * W);
    m[i] = grad * set1(k.grad_weight) + m[i];
    v[i] = grad * set1(k.square_weight) * grad + v[i];
  }
  uint32_t top = max_bits(v);
  if (__builtin_expect(top >= kInfinityBits, 0)) {
    update_nonfinite(p, m, v, k);
    top = max_bits(v);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) store(p + i * W, updated(load(p + i * W), m[i], v[i], k));
  }
  s.scales[0] = signed_scale(m);
  s.scales[1] = unsigned_scale(top);
  encode_signed(m, s.scales[0], s.exp_avg);
  encode_unsigned(v, s.scales[1], s.exp_avg_sq);
}

template <class P, class G>
void step_quantized(const AdamWTensor& t, int64_t begin, int64_t end, const StepConstants& k) {
  auto* p = static_cast<P*>(t.param);
  auto* g = static_cast<const G*>(t.grad);
  const auto state = [&](int64_t b) {
    return BlockState{static_cast<uint8_t*>(t.exp_avg) + b * kCodeBytes,
                      static_cast<uint8_t*>(t.exp_avg_sq) + b * kCodeBytes, t.scales + 2 * b};
  };
  const int64_t whole = min_of(end, t.n / kBlock);
  int64_t b = begin;
  for (; b < whole; b++) step_block(p + b * kBlock, g + b * kBlock, state(b), k);
  if (b == end) return;
  P tail_p[kBlock] = {};  // the last block, through padded copies: a zero gradient never sets a scale
  G tail_g[kBlock] = {};
  const int64_t first = b * kBlock, rest = t.n - first;
  __builtin_memcpy(tail_p, p + first, rest * sizeof(P));
  __builtin_memcpy(tail_g, g + first, rest * sizeof(G));
  step_block(tail_p, tail_g, state(b), k);
  __builtin_memcpy(p + first, tail_p, rest * sizeof(P));
}

// ---- 32-bit states ----
template <class P, class G>
void step_full(const AdamWTensor& t, int64_t begin, int64_t end, const StepConstants& k) {
  auto* p = static_cast<P*>(t.param);
  auto* g = static_cast<const G*>(t.grad);
  auto* exp_avg = static_cast<float*>(t.exp_avg);
  auto* exp_avg_sq = static_cast<float*>(t.exp_avg_sq);
  const int64_t stop = min_of(end * kBlock, t.n);
  for (int64_t i = begin * kBlock; i < stop; i += W) {
    const int64_t lanes = stop - i;
    const VF grad = load(g + i, lanes);
    const VF m = grad * set1(k.grad_weight) + load(exp_avg + i, lanes) * set1(k.beta1);
    const VF v = grad * set1(k.square_weight) * grad + load(exp_avg_sq + i, lanes) * set1(k.beta2);
    store(exp_avg + i, m, lanes);
    store(exp_avg_sq + i, v, lanes);
    store(p + i, updated_nonfinite(load(p + i, lanes), m, v, k), lanes);
  }
}

// ---- all tensors ----
using TensorStep = void (*)(const AdamWTensor&, int64_t begin, int64_t end, const StepConstants&);

constexpr TensorStep kSteps[2][3][3] = {
    // [quantised][param type][grad type]
    {{&step_full<float, float>, &step_full<float, Bf16>, &step_full<float, Fp16>},
     {&step_full<Bf16, float>, &step_full<Bf16, Bf16>, &step_full<Bf16, Fp16>},
     {&step_full<Fp16, float>, &step_full<Fp16, Bf16>, &step_full<Fp16, Fp16>}},
    {{&step_quantized<float, float>, &step_quantized<float, Bf16>, &step_quantized<float, Fp16>},
     {&step_quantized<Bf16, float>, &step_quantized<Bf16, Bf16>, &step_quantized<Bf16, Fp16>},
     {&step_quantized<Fp16, float>, &step_quantized<Fp16, Bf16>, &step_quantized<Fp16, Fp16>}},
};

// The last tensor that starts at or before `block`.
inline int64_t tensor_of(const AdamWParams& p, int64_t block) {
  int64_t low = 0, high = p.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.tensors[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

inline void step_range(const AdamWParams& p, int64_t begin, int64_t end) {
  for (int64_t i = tensor_of(p, begin); begin < end; i++) {
    const AdamWTensor& t = p.tensors[i];
    const int64_t stop = min_of(end, t.first_block + ceil_div(t.n, kBlock));
    const StepConstants k = {p.beta1, p.beta2, p.grad_weight, p.square_weight,
                             p.decay, p.eps,   t.step_size,   t.inv_correction2};
    kSteps[t.scales != nullptr][int(t.param_type)][int(t.grad_type)](t, begin - t.first_block, stop - t.first_block, k);
    begin = stop;
  }
}

const char* adamw_step(const AdamWParams& p, const Runtime& rt) {
  parallel_for(rt, p.blocks, kGrainBlocks, [&](int64_t begin, int64_t end) { step_range(p, begin, end); });
  return nullptr;
}

}  // namespace
}  // namespace tilewise

// One step of many tensors in one parallel pass. The chunks of all tensors are numbered through and split evenly over
// the threads, so that a hundred small tensors cost no more than one large one.
//
// Common pairs of dtypes are worked on where they lie (`step_direct`); everything else, and what is left of a tensor
// behind its last whole block, through float copies of one block on the stack (`step_staged`).
#pragma once
#include "optim/cpu/block.h"
#include "optim/cpu/structured.h"

namespace tilewise {
namespace {

// Codes are a quarter to a sixteenth as dense as elements.
constexpr uintptr_t kPrefetchCodeBytes = 1024;

TILEWISE_INLINE void prefetch(const void* now, uintptr_t distance, uintptr_t bytes) {
#pragma GCC unroll 16
  for (uintptr_t line = 0; line < bytes; line += kLine) prefetch(now, distance + line);
}
inline void prefetch_elements(Float type, const void* first, int64_t element, int count) {
  const int size = type == Float::f32 ? 4 : 2;
  prefetch(static_cast<const char*>(first) + element * size, kPrefetchBytes, uintptr_t(count * size));
}
template <class M>
TILEWISE_INLINE void prefetch_moment(Held held) {
  if constexpr (M::kQuantised) prefetch(held.values, kPrefetchCodeBytes, M::Codec::kBytes);
}

// ---- a range of elements of one tensor; it begins at a whole block ----
using RangeStep = void (*)(const StepParams&, const StepTensor&, int64_t begin, int64_t end, const StepConstants&);

// Moments of the block at `element`, `count` elements of it; a cut block of floats lies in `spare` meanwhile.
template <class M>
Held open_moment(const Moment& moment, int64_t element, int count, float* spare) {
  if constexpr (!M::kKept) return {};
  if constexpr (M::kQuantised) return M::at(moment, element);
  if constexpr (M::kGiven) return {spare, nullptr};
  if constexpr (M::kFormat == Format::f32 && M::kAveraged) {
    const Held held = Full::at(moment, element);
    if (count == kBlock * M::kPieces) return held;
    __builtin_memcpy(spare, held.values, count * sizeof(float));
    return {spare, nullptr};
  }
}
template <class M>
void close_moment(const Moment& moment, int64_t element, int count, const float* spare) {
  if constexpr (M::kFormat == Format::f32 && M::kAveraged)
    if (count < kBlock * M::kPieces) __builtin_memcpy(Full::at(moment, element).values, spare, count * sizeof(float));
}

template <class Rule_, class First, class Second>
void step_staged(const StepParams& params, const StepTensor& t, int64_t begin, int64_t end, const StepConstants& k) {
  constexpr int kElements = kBlock * kPiecesOf<First, Second>;
  for (int64_t e = begin; e < end; e += kElements) {
    const int count = int(min_of<int64_t>(kElements, end - e));
    float p[kElements], g[kElements], m[kElements], v[kElements];
    if (count < kElements) {
      const size_t bytes = kElements * sizeof(float);
      __builtin_memset(p, 0, bytes), __builtin_memset(g, 0, bytes);
      __builtin_memset(m, 0, bytes), __builtin_memset(v, 0, bytes);
    }
    prefetch_elements(t.param_type, t.param, e, kElements);
    prefetch_elements(t.grad_type, t.grad, e, kElements);
    load_param(t, e, count, p);
    load_grad(params, t, e, count, p, g);
    if constexpr (Second::kGiven) read_given(params, t, e, count, g, v);
    const Held first = open_moment<First>(t.first, e, count, m), second = open_moment<Second>(t.second, e, count, v);
    Averaged<First, Second> block;
    average_block<Rule_, First, Second>(g, first, second, k, block);
    finish_block<Rule_, First, Second>(p, g, first, second, k, block);
    store_param(p, params, t, e, count);
    close_moment<First>(t.first, e, count, m);
    close_moment<Second>(t.second, e, count, v);
    if (Second::kGiven && t.second.format == Format::rank1) write_rank1(t, e, count, v);
  }
}

template <class T>
TILEWISE_INLINE const float* as_floats(const T* x, int count, float* spare) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  for_each_vector(count, [&](int i, int lanes) { store(spare + i, load(x + i, lanes), lanes); });
  return spare;
}

template <class Rule_, class First, class Second, class T>
void step_direct(const StepParams& params, const StepTensor& t, int64_t begin, int64_t end, const StepConstants& k) {
  constexpr int kElements = kBlock * kPiecesOf<First, Second>;
  T* p = static_cast<T*>(t.param);
  const T* g = static_cast<const T*>(t.grad);
  const int64_t whole_end = end - (end - begin) % kElements;
  // A given second moment is made for a segment of blocks at a time.
  float given[2][Second::kGiven ? kSegment : 1];
  const auto given_at = [&](int64_t e) { return given[(e - begin) / kSegment % 2] + (e - begin) % kSegment; };
  const auto second_at = [&](int64_t e) {
    return Second::kGiven ? Held{given_at(e), nullptr} : Second::at(t.second, e);
  };
  const auto average = [&](int64_t e, Averaged<First, Second>& block) {
    if constexpr (Second::kGiven) {
      float spare[kSegment];
      const int count = int(min_of<int64_t>(kSegment, whole_end - e));
      if ((e - begin) % kSegment == 0) read_given(params, t, e, count, as_floats(g + e, count, spare), given_at(e));
    }
    const Held first = First::at(t.first, e), second = second_at(e);
    prefetch_moment<First>(first);
    prefetch_moment<Second>(second);
    average_block<Rule_, First, Second>(g + e, first, second, k, block);
  };
  Averaged<First, Second> blocks[2];
  int64_t e = begin;
  if (e < whole_end) average(e, blocks[0]);
  for (int now = 0; e < whole_end; e += kElements, now ^= 1) {
    if (e + kElements < whole_end) average(e + kElements, blocks[now ^ 1]);
    finish_block<Rule_, First, Second>(p + e, g + e, First::at(t.first, e), second_at(e), k, blocks[now]);
    if constexpr (Second::kGiven) {
      const int64_t done = (e - begin) % kSegment + kElements;
      if (t.second.format == Format::rank1 && (done == kSegment || e + kElements == whole_end))
        write_rank1(t, e + kElements - done, int(done), given_at(e) + kElements - done);
    }
  }
  if (e < end) step_staged<Rule_, First, Second>(params, t, e, end, k);
}

// ---- which instance serves a tensor ----
// A rank-1 second moment is given to the block, as factored ones are.
struct Instance {
  Rule rule;
  Format first, second;
  RangeStep staged, direct_f32, direct_bf16;
};

template <class Rule_, class First, class Second>
constexpr Instance instance() {
  return {Rule_::kRule,
          First::kFormat,
          Second::kFormat,
          &step_staged<Rule_, First, Second>,
          &step_direct<Rule_, First, Second, float>,
          &step_direct<Rule_, First, Second, Bf16>};
}

constexpr Instance kInstances[] = {
    instance<Adam, Signed<Codec4>, Unsigned<Codec4>>(),
    instance<Adam, Signed<Codec8>, Unsigned<Codec8>>(),
    instance<Adam, Full, Full>(),
    instance<Adam, Signed<Codec4>, Given>(),
    instance<Adam, Signed<Codec8>, Given>(),
    instance<Adam, Full, Given>(),
    instance<RmsMomentum, Signed<Codec4>, Unsigned<Codec4>>(),
    instance<RmsMomentum, Signed<Codec8>, Unsigned<Codec8>>(),
    instance<RmsMomentum, Full, Full>(),
    instance<RmsMomentum, Signed<Codec4>, Given>(),
    instance<RmsMomentum, Signed<Codec8>, Given>(),
    instance<RmsMomentum, Full, Given>(),
    instance<Rms, None, Unsigned<Codec4>>(),
    instance<Rms, None, Unsigned<Codec8>>(),
    instance<Rms, None, Full>(),
    instance<Rms, None, Given>(),
    instance<SgdMomentum, Signed<Codec4>, None>(),
    instance<SgdMomentum, Signed<Codec8>, None>(),
    instance<SgdMomentum, Full, None>(),
    instance<Sgd, None, None>(),
    instance<Lion, Signed<Codec4>, None>(),
    instance<Lion, Signed<Codec8>, None>(),
    instance<Lion, Full, None>(),
};

inline const Instance* instance_for(Rule rule, const StepTensor& t) {
  const Format second = t.second.format == Format::rank1 ? Format::factored : t.second.format;
  for (const Instance& i : kInstances)
    if (i.rule == rule && i.first == t.first.format && i.second == second) return &i;
  return nullptr;
}

inline RangeStep range_step(const StepParams& p, const StepTensor& t, const Instance& i) {
  const bool plain = p.grad_factor == 1 && p.l2 == 0 && !t.residual;
  if (!plain || t.param_type != t.grad_type) return i.staged;
  if (t.param_type == Float::f32) return i.direct_f32;
  return t.param_type == Float::bf16 && !p.stochastic_rounding ? i.direct_bf16 : i.staged;
}

// ---- all tensors ----
inline StepConstants constants_of(const StepParams& p, const StepTensor& t) {
  const auto in_range = [](float x) { return x > 0x1p-100f && x < 0x1p60f; };
  const float correction2_per_step = t.k.inv_correction2 / t.k.step_size, eps_per_step = p.eps / t.k.step_size;
  const bool careful = !in_range(p.eps) || !in_range(correction2_per_step) || !in_range(eps_per_step);
  return {p.beta1,    p.beta2,       t.k.grad_weight,     p.square_weight,      t.k.decay,
          p.eps,      t.k.step_size, t.k.inv_correction2, correction2_per_step, eps_per_step,
          p.nesterov, careful};
}

// The last tensor that starts at or before `chunk`.
inline int64_t tensor_of(const StepParams& p, int64_t chunk) {
  int64_t low = 0, high = p.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.tensors[middle].first_chunk <= chunk ? low : high) = middle;
  }
  return low;
}

inline void step_chunks(const StepParams& p, int64_t begin, int64_t end) {
  for (int64_t i = tensor_of(p, begin); begin < end; i++) {
    const StepTensor& t = p.tensors[i];
    const int64_t stop = min_of(end, t.first_chunk + ceil_div(t.n, kChunk));
    range_step(p, t, *instance_for(p.rule, t))(p, t, (begin - t.first_chunk) * kChunk,
                                               min_of(t.n, (stop - t.first_chunk) * kChunk), constants_of(p, t));
    begin = stop;
  }
}

// Tensors whose gradients stay in the second-level caches between the two passes over them; at least one.
constexpr int64_t kCachedElements = 1 << 18;  // of a thread
inline int64_t end_of_batch(const StepParams& p, int64_t begin, int64_t threads) {
  int64_t end = begin, elements = 0;
  while (end < p.count && (end == begin || elements + p.tensors[end].n <= threads * kCachedElements))
    elements += p.tensors[end++].n;
  return end;
}

const char* step(const StepParams& p, const Runtime& rt) {
  for (int64_t i = 0; i < p.count; i++)
    if (!instance_for(p.rule, p.tensors[i])) return "no kernel for such a pair of moments";
  for (int64_t begin = 0, end; begin < p.count; begin = end) {
    end = p.structured ? end_of_batch(p, begin, rt.num_threads()) : p.count;
    if (p.structured) prepare_structured(p, begin, end, rt);
    const int64_t first = p.tensors[begin].first_chunk, last = end < p.count ? p.tensors[end].first_chunk : p.chunks;
    parallel_for(rt, last - first, 1, [&](int64_t from, int64_t to) { step_chunks(p, first + from, first + to); });
    if (p.structured) publish_scales(p, begin, end);
  }
  return nullptr;
}

}  // namespace
}  // namespace tilewise

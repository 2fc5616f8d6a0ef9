// One block of one parameter, in two parts: its moments are decoded and averaged, then the parameter is updated and the
// moments are encoded. A sequence of blocks averages the next one before it finishes this one, so that what waits in
// one part (memory, the maximum over a block, the divider) has the arithmetic of the other to hide behind.
#pragma once
#include "optim/cpu/moments.h"
#include "optim/cpu/rules.h"

namespace tilewise {
namespace {

// The hardware's own prefetch follows too few of a step's streams, and a block's arithmetic is too long for loads of
// the next block to start early. One line with every vector: a burst of them would hold up the loads behind it.
constexpr uintptr_t kPrefetchBytes = 3328, kLine = 64;
TILEWISE_INLINE void prefetch(const void* now, uintptr_t distance) {
  const uintptr_t ahead = reinterpret_cast<uintptr_t>(now) + distance;  // an integer: it may lie beyond the array
  __builtin_prefetch(reinterpret_cast<const void*>(ahead));
}
template <class T>
TILEWISE_INLINE void prefetch_with_vector(const T* first, int at) {
  if (at * sizeof(T) % kLine == 0) prefetch(first + at, kPrefetchBytes);
}

template <class First, class Second>
constexpr int kPiecesOf = max_of(First::kPieces, Second::kPieces);

// A block between its two parts.
template <class First, class Second>
struct Averaged {
  static constexpr int kPieces = kPiecesOf<First, Second>;
  BlockValues m[kPieces], v[kPieces];
  float first_scale, second_scale;
  uint32_t top;  // the largest bits of what tells if they are finite
};

// Whether averaging leaves the moments as they will be encoded. Then the second tells if both are finite, unless it is
// given: what is not finite is kept out of statistics.
template <class Rule_, class Second>
constexpr bool kFinal = (Second::kQuantised || Second::kGiven) && Rule_::kFirstIsFinite;

template <class Moment_>
TILEWISE_INLINE void read(Held held, int piece, float factor, BlockValues& x) {
  if constexpr (Moment_::kKept) Moment_::read(held, piece, factor, x);
}

template <int kPieces>
TILEWISE_INLINE uint32_t largest_bits(const BlockValues (&x)[kPieces]) {
  uint32_t top = 0;
  for (int piece = 0; piece < kPieces; piece++) top = max_of(top, max_bits(x[piece]));
  return top;
}
template <int kPieces>
TILEWISE_INLINE uint32_t largest_magnitude_bits(const BlockValues (&x)[kPieces]) {
  uint32_t top = 0;
  for (int piece = 0; piece < kPieces; piece++) {
    BlockValues a;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) a[i] = abs(x[piece][i]);
    top = max_of(top, max_bits(a));
  }
  return top;
}

template <class Rule_, class First, class Second, class G>
__attribute__((noinline)) void average_block(const G* g, Held first, Held second, const StepConstants& k,
                                             Averaged<First, Second>& block) {
  VF first_top = set1(0);
  VU second_top = {};
  for (int piece = 0; piece < block.kPieces; piece++) {
    BlockValues m, v;
    read<First>(first, piece, Rule_::first_factor(k), m);
    read<Second>(second, piece, k.beta2, v);
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      const int at = piece * kBlock + i * W;
      prefetch_with_vector(g, at);
      const VF grad = load(g + at);
      Rule_::average(grad, m[i], k);
      if constexpr (Second::kAveraged) v[i] = grad * set1(k.square_weight) * grad + v[i];
      if constexpr (First::kKept) block.m[piece][i] = m[i];
      if constexpr (Second::kKept) block.v[piece][i] = v[i];
      if constexpr (kFinal<Rule_, Second> && First::kKept && Second::kGiven)
        first_top = (VF)max((VU)first_top, (VU)abs(m[i]));  // absmax might drop a NaN
      else if constexpr (kFinal<Rule_, Second> && First::kKept)
        first_top = absmax(first_top, m[i]);
      if constexpr (kFinal<Rule_, Second>) second_top = max(second_top, (VU)v[i]);
    }
  }
  if constexpr (kFinal<Rule_, Second>) {
    const Tops top = tops_of((VU)first_top, second_top);
    if constexpr (First::kQuantised) block.first_scale = max_of(bits_to_float(top.a), First::Codec::kMinSigned);
    if constexpr (Second::kQuantised) block.second_scale = max_of(bits_to_float(top.b), Second::Codec::kMinUnsigned);
    block.top = Second::kGiven ? max_of(top.a, top.b) : top.b;
  }
}

// Quantised moments that are not finite restart from zero, so that one bad gradient does not reach the other elements
// of the block through its scale.
template <class First, class Second>
TILEWISE_INLINE void drop_nonfinite(Averaged<First, Second>& block) {
  for (int piece = 0; piece < block.kPieces; piece++) {
    BlockValues &m = block.m[piece], &v = block.v[piece];
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      VI bad = {};
      if constexpr (First::kKept) bad |= (VI)((VU)abs(m[i]) >= kInfinityBits);
      if constexpr (Second::kKept) bad |= (VI)((VU)v[i] >= kInfinityBits);
      if constexpr (First::kQuantised) m[i] = select(bad, set1(0), m[i]);
      if constexpr (Second::kQuantised) v[i] = select(bad, set1(0), v[i]);
    }
  }
}

template <bool kFinite, class Rule_, class P, class G>
TILEWISE_INLINE void update_vector(P* p, const G* g, int at, VF& m, VF v, const StepConstants& k) {
  prefetch_with_vector(p, at);
  store(p + at, Rule_::template updated<kFinite>(load(p + at), load(g + at), m, v, k));
}

// Encodes both moments, each vector behind update(at, m, v) of it, which may change m.
template <class First, class Second, class Update>
TILEWISE_INLINE void write_moments(Held first, Held second, const Averaged<First, Second>& block,
                                   const Update& update) {
  if constexpr (First::kQuantised) *first.scale = block.first_scale;
  if constexpr (Second::kQuantised) *second.scale = block.second_scale;
  for (int piece = 0; piece < block.kPieces; piece++) {
    typename First::Writer to_first(first, block.first_scale, piece);
    typename Second::Writer to_second(second, block.second_scale, piece);
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      VF m = block.m[piece][i];
      update(piece * kBlock + i * W, m, block.v[piece][i]);
      to_first.put(i, m);
      to_second.put(i, block.v[piece][i]);
    }
  }
}

// The careful kind: moments that the update changes, or that may not be finite.
template <class Rule_, class First, class Second, class P, class G>
__attribute__((noinline)) void finish_carefully(P* p, const G* g, Held first, Held second, const StepConstants& k,
                                                Averaged<First, Second>& block) {
  for (int piece = 0; piece < block.kPieces; piece++) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      VF m = block.m[piece][i];
      update_vector<false, Rule_>(p, g, piece * kBlock + i * W, m, block.v[piece][i], k);
      if constexpr (First::kKept) block.m[piece][i] = m;
    }
  }
  if constexpr (First::kQuantised || Second::kQuantised) {
    uint32_t top = 0;
    if constexpr (First::kQuantised) top = largest_magnitude_bits(block.m);
    if constexpr (Second::kQuantised) top = max_of(top, largest_bits(block.v));
    if (__builtin_expect(top >= kInfinityBits, 0)) drop_nonfinite<First, Second>(block);
    if constexpr (First::kQuantised) block.first_scale = signed_scale<typename First::Codec>(block.m);
    if constexpr (Second::kQuantised) block.second_scale = unsigned_scale<typename Second::Codec>(block.v);
  }
  write_moments(first, second, block, [](int, VF&, VF) {});
}

template <class Rule_, class First, class Second, class P, class G>
__attribute__((noinline)) void finish_block(P* p, const G* g, Held first, Held second, const StepConstants& k,
                                            Averaged<First, Second>& block) {
  // Where the moments are final already, a vector is encoded behind its update, in the shadow of the square roots.
  if constexpr (kFinal<Rule_, Second>) {
    if (__builtin_expect(block.top < kInfinityBits && !k.careful, 1))
      return write_moments(first, second, block,
                           [&](int at, VF& m, VF v) { update_vector<true, Rule_>(p, g, at, m, v, k); });
  }
  finish_carefully<Rule_, First, Second>(p, g, first, second, k, block);
}

}  // namespace
}  // namespace tilewise

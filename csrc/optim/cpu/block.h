// One block of one parameter: decode, average, update, encode, in registers.
#pragma once
#include "optim/cpu/moments.h"
#include "optim/cpu/rules.h"

namespace tilewise {
namespace {

template <class First, class Second>
constexpr int kPiecesOf = max_of(First::kPieces, Second::kPieces);

template <class Moment_, int kPieces>
TILEWISE_INLINE void read(Held held, float factor, BlockValues (&x)[kPieces]) {
  if constexpr (Moment_::kKept) {
#pragma GCC unroll 2
    for (int piece = 0; piece < kPieces; piece++) Moment_::read(held, piece, factor, x[piece]);
  }
}

template <int kPieces>
TILEWISE_INLINE uint32_t largest_bits(const BlockValues (&x)[kPieces]) {
  uint32_t top = 0;
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; piece++) top = max_of(top, max_bits(x[piece]));
  return top;
}
template <int kPieces>
TILEWISE_INLINE uint32_t largest_magnitude_bits(const BlockValues (&x)[kPieces]) {
  uint32_t top = 0;
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; piece++) {
    BlockValues a;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) a[i] = abs(x[piece][i]);
    top = max_of(top, max_bits(a));
  }
  return top;
}

template <class First, class Second, int kPieces>
TILEWISE_INLINE void write_scales(Held first, Held second, const BlockValues (&m)[kPieces], uint32_t top) {
  if constexpr (First::kQuantised) *first.scale = signed_scale<typename First::Codec>(m);
  if constexpr (Second::kQuantised) *second.scale = max_of(bits_to_float(top), Second::Codec::kMinUnsigned);
}
template <class First, class Second>
TILEWISE_INLINE void write(Held first, Held second, int piece, const BlockValues& m, const BlockValues& v) {
  if constexpr (First::kKept) First::write(first, piece, m);
  if constexpr (Second::kAveraged) Second::write(second, piece, v);
}

// Quantised moments that are not finite restart from zero, so that one bad gradient does not reach the other elements
// of the block through its scale.
template <class First, class Second, int kPieces>
TILEWISE_INLINE void drop_nonfinite(BlockValues (&m)[kPieces], BlockValues (&v)[kPieces]) {
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; piece++) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      VI bad = {};
      if constexpr (First::kKept) bad |= (VI)((VU)abs(m[piece][i]) >= kInfinityBits);
      if constexpr (Second::kKept) bad |= (VI)((VU)v[piece][i] >= kInfinityBits);
      if constexpr (First::kQuantised) m[piece][i] = select(bad, set1(0), m[piece][i]);
      if constexpr (Second::kQuantised) v[piece][i] = select(bad, set1(0), v[piece][i]);
    }
  }
}

// The fast kind gives way to the careful one before it has changed anything.
template <class Rule_, class First, class Second, bool kFast, class P, class G>
__attribute__((noinline)) void step_block(P* p, const G* g, Held first, Held second, const StepConstants& k) {
  constexpr int kPieces = kPiecesOf<First, Second>;
  constexpr bool kQuick = kFast && Second::kQuantised;  // the others cannot tell
  BlockValues m[kPieces], v[kPieces];
  read<First>(first, Rule_::first_factor(k), m);
  read<Second>(second, k.beta2, v);
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; piece++) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      const VF grad = load(g + piece * kBlock + i * W);
      Rule_::average(grad, m[piece][i], k);
      if constexpr (Second::kAveraged) v[piece][i] = grad * set1(k.square_weight) * grad + v[piece][i];
    }
  }
  uint32_t top = 0;
  if constexpr (Second::kQuantised) top = largest_bits(v);
  if constexpr (kQuick)
    if (__builtin_expect(top >= kInfinityBits || k.careful, 0))
      return step_block<Rule_, First, Second, false>(p, g, first, second, k);
  // Where the moments are final already, a half is encoded behind its update, in the shadow of the square roots.
  constexpr bool kAtOnce = kQuick && Rule_::kFirstIsFinite;
  if constexpr (kAtOnce) write_scales<First, Second>(first, second, m, top);
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; piece++) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; i++) {
      const int at = piece * kBlock + i * W;
      store(p + at, Rule_::template updated<kQuick>(load(p + at), load(g + at), m[piece][i], v[piece][i], k));
    }
    if constexpr (kAtOnce) write<First, Second>(first, second, piece, m[piece], v[piece]);
  }
  if constexpr (kAtOnce) return;
  if constexpr (First::kQuantised || Second::kQuantised) {
    if constexpr (First::kQuantised) top = max_of(top, largest_magnitude_bits(m));
    if (__builtin_expect(top >= kInfinityBits, 0)) drop_nonfinite<First, Second>(m, v);
    if constexpr (Second::kQuantised) top = largest_bits(v);
  }
  write_scales<First, Second>(first, second, m, top);
#pragma GCC unroll 2
  for (int piece = 0; piece < kPieces; piece++) write<First, Second>(first, second, piece, m[piece], v[piece]);
}

}  // namespace
}  // namespace tilewise

// The CPU transform: which ring is split how, and its twiddle factors. Built by plan.cpp in double precision; plain C,
// because the per-ISA objects include it.
//
// Everything happens modulo x^N - i. A real signal of at most N samples multiplied by another one there gives
//   Z[n] = c[n] + i c[n + N],
// c being the linear convolution, because terms from N on wrap around into the imaginary part. So a transform of N >= L
// points holds the whole linear convolution of two signals of length L: no zero padding to 2L, no pairing of rows, no
// unpacking of a real transform. The causal result is Re Z; the circular one adds the samples from L on. With a
// conjugated spectrum (a correlation) negative lags wrap: Z[n] = c[n] - i c[n - N].
//
// The transform is a tree of ring splittings x^S - w -> R rings x^(S/R) - w_c, with w_c in bit-reversed order and never
// reordered. Twiddles are constants of a node, so they are broadcast scalars, stored in the order of the walk.
#pragma once
#include <stdint.h>

namespace tilewise::fft_conv {

constexpr int kMaxFirstRadix = 8;
constexpr int kMaxLevels = 16;

struct Plan {
  int64_t size;               // N = first_radix * product(radix) * lanes^2
  int first_radix;            // 1..8: any, so that N exceeds the length by at most a quarter
  int levels;                 // of nodes between the first pass and the leaves
  int radix[kMaxLevels];      // 2, 4 or 8
  const float* first_powers;  // [first_radix, first_radix] complex: rho_c^s of the first pass's roots
  const float* first_node;    // the same first pass as node twiddles; only where first_radix is a power of two
  const float* nodes;         // node and leaf twiddles in depth-first order
  const float* lane_powers;   // [leaf_vectors(lanes)] complex vectors (all reals, then all imaginaries)
};

// Complex twiddles of a radix-R node: rho^s for s = 1..R-1; for R = 8 also rho e^{i pi/4} and its cube.
constexpr int node_twiddles(int radix) {
  return radix == 8 ? 9 : radix - 1;
}
// A leaf of lanes^2 points: a radix-Q node (Q = lanes / 4) and Q radix-4 nodes across vectors, a transpose, and the
// same once more across lanes, where lane v has its own root: a constant vector times a scalar of the leaf.
constexpr int leaf_nodes(int lanes) {
  return node_twiddles(lanes / 4) + lanes / 4 * node_twiddles(4);
}
constexpr int leaf_scalars(int lanes) {
  return lanes / 4 - 1 + 3;
}
constexpr int leaf_vectors(int lanes) {
  return lanes / 4 - 1 + lanes / 4 * 3;
}
constexpr int leaf_twiddles(int lanes) {
  return leaf_nodes(lanes) + leaf_scalars(lanes);
}

}  // namespace tilewise::fft_conv

// Depth first over the tree of ring splittings, so that a block is split, multiplied and merged while it is in cache.
#pragma once
#include "fft_conv/cpu/passes.h"

namespace tilewise {
namespace {

template <class Job>
inline const float* walk_node(const Plan& plan, const Job& job, int64_t offset, int64_t size, int level,
                              const float* w) {
  if (size == kLeaf) {
    job.at_leaf(plan, offset, w);
    return w + 2 * fft_conv::leaf_twiddles(W);
  }
  const int radix = plan.radix[level];
  const int64_t m = size / radix;
  job.before(radix, offset, m, w);
  const float* next = w + 2 * fft_conv::node_twiddles(radix);
  for (int c = 0; c < radix; c++) next = walk_node(plan, job, offset + 2 * c * m, m, level + 1, next);
  job.after(radix, offset, m, w);
  return next;
}

// A job says what happens at a node before and after its children, and at a leaf; offsets are in floats.
template <class Job>
inline void walk(const Plan& plan, const Job& job) {
  const float* w = plan.nodes;
  for (int c = 0; c < plan.first_radix; c++) w = walk_node(plan, job, c * block_stride(plan), block_size(plan), 0, w);
}

// k -> its spectrum / N.
struct FilterJob {
  float* k;

  void before(int radix, int64_t at, int64_t m, const float* w) const { node_pass<false>(radix, k + at, m, w); }
  void after(int, int64_t, int64_t, const float*) const {}
  void at_leaf(const Plan& plan, int64_t at, const float* w) const {
    const VF unit = set1(1.f / float(plan.size));
    leaf<true, false>(plan, w, k + at, [&](int o, Complex t) TILEWISE_LAMBDA {
      store_complex(k + at + o, scale(t, unit));
      return t;
    });
  }
};

// x -> x conv k, with k's spectrum at hand.
struct ConvolutionJob {
  float* x;
  const float* k;

  void before(int radix, int64_t at, int64_t m, const float* w) const { node_pass<false>(radix, x + at, m, w); }
  void after(int radix, int64_t at, int64_t m, const float* w) const { node_pass<true>(radix, x + at, m, w); }
  void at_leaf(const Plan& plan, int64_t at, const float* w) const {
    leaf<true, true>(plan, w, x + at,
                     [&](int o, Complex t) TILEWISE_LAMBDA { return mul(t, load_complex(k + at + o)); });
  }
};

// Both of the above block by block: for the first row that a filter meets.
struct FirstRowJob {
  FilterJob filter;
  ConvolutionJob row;

  void before(int radix, int64_t at, int64_t m, const float* w) const {
    filter.before(radix, at, m, w);
    row.before(radix, at, m, w);
  }
  void after(int radix, int64_t at, int64_t m, const float* w) const { row.after(radix, at, m, w); }
  void at_leaf(const Plan& plan, int64_t at, const float* w) const {
    filter.at_leaf(plan, at, w);
    row.at_leaf(plan, at, w);
  }
};

// A sum of spectra / N -> time.
struct InverseJob {
  float* x;

  void before(int, int64_t, int64_t, const float*) const {}
  void after(int radix, int64_t at, int64_t m, const float* w) const { node_pass<true>(radix, x + at, m, w); }
  void at_leaf(const Plan& plan, int64_t at, const float* w) const {
    const VF unit = set1(1.f / float(plan.size));
    leaf<false, true>(plan, w, x + at,
                      [&](int o, Complex) TILEWISE_LAMBDA { return scale(load_complex(x + at + o), unit); });
  }
};

// The backward products of one row of a head's batch, those that are wanted:
//   g -> g corr k        sum of G conj(X) over the batch -> sum of g corr x        x -> x conv k
// The first row takes the filter's transform along, the last one the inverse of the sum. `sum` starts from zero every
// kBatchChain rows and is then added to `total` (the same buffer where there are no more rows): short chains of
// roundings.
constexpr int64_t kBatchChain = 16;

struct GradientJob {
  float *g, *x, *k, *sum, *total;
  bool wants_dx, wants_dk, wants_product;
  int64_t row, rows;

  void before(int radix, int64_t at, int64_t m, const float* w) const {
    if (first() && needs_k()) FilterJob{k}.before(radix, at, m, w);
    if (needs_g()) node_pass<false>(radix, g + at, m, w);
    if (needs_x()) node_pass<false>(radix, x + at, m, w);
  }
  void after(int radix, int64_t at, int64_t m, const float* w) const {
    if (wants_dx) node_pass<true>(radix, g + at, m, w);
    if (wants_product) node_pass<true>(radix, x + at, m, w);
    if (last() && wants_dk) InverseJob{total}.after(radix, at, m, w);
  }
  void at_leaf(const Plan& plan, int64_t at, const float* w) const {
    if (first() && needs_k()) FilterJob{k}.at_leaf(plan, at, w);
    if (wants_dk && row % kBatchChain == 0) __builtin_memset(sum + at, 0, 2 * kLeaf * sizeof(float));
    if (needs_x()) x_leaf(plan, at, w);
    if (needs_g()) g_leaf(plan, at, w);
    if (wants_product) product_leaf(plan, at, w);
    if (wants_dk && (row % kBatchChain == kBatchChain - 1 || last())) add_to_total(at);
    if (last() && wants_dk) InverseJob{total}.at_leaf(plan, at, w);
  }

  bool first() const { return row == 0; }
  bool last() const { return row == rows - 1; }
  bool needs_k() const { return wants_dx || wants_product; }
  bool needs_g() const { return wants_dx || wants_dk; }
  bool needs_x() const { return wants_dk || wants_product; }

 private:
  void add_to_total(int64_t at) const {
    if (total == sum) return;
    for (int64_t i = at; i < at + 2 * kLeaf; i += W)
      store(total + i, row < kBatchChain ? load(sum + i) : load(total + i) + load(sum + i));
  }
  void x_leaf(const Plan& plan, int64_t at, const float* w) const {
    leaf<true, false>(plan, w, x + at, [&](int o, Complex t) TILEWISE_LAMBDA {
      store_complex(x + at + o, t);
      return t;
    });
  }
  void g_leaf(const Plan& plan, int64_t at, const float* w) const {
    const auto add = [&](int o, Complex t) TILEWISE_LAMBDA {
      const Complex product = mul_conj(t, load_complex(x + at + o)), before = load_complex(sum + at + o);
      store_complex(sum + at + o, {before.re + product.re, before.im + product.im});
    };
    const auto correlate = [&](int o, Complex t) TILEWISE_LAMBDA { return mul_conj(t, load_complex(k + at + o)); };
    if (wants_dk && wants_dx)
      leaf<true, true>(plan, w, g + at, [&](int o, Complex t) TILEWISE_LAMBDA {
        add(o, t);
        return correlate(o, t);
      });
    else if (wants_dx)
      leaf<true, true>(plan, w, g + at, correlate);
    else
      leaf<true, false>(plan, w, g + at, [&](int o, Complex t) TILEWISE_LAMBDA {
        add(o, t);
        return t;
      });
  }
  void product_leaf(const Plan& plan, int64_t at, const float* w) const {
    leaf<false, true>(plan, w, x + at, [&](int o, Complex) TILEWISE_LAMBDA {
      return mul(load_complex(x + at + o), load_complex(k + at + o));
    });
  }
};

}  // namespace
}  // namespace tilewise

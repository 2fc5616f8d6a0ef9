// A matrix product on AMX tiles whose one operand is made on the way: result[a, b] = sum over terms of held[a, term] *
// panel[b, term].
//
// The held operand is packed once, by all threads together. A block of it takes 1 MB and stays in the second-level
// cache while panels of 64 pass by; each is made for the block, multiplied, and its results are finished while they are
// in the first-level cache. More terms than kPassSteps tiles are summed in passes, whose results wait in memory as the
// float32 numbers that they are: every sum is one chain over the terms, however a call is cut.
#pragma once
#include "common/half_tiles.h"
#include "common/isa.h"

namespace tilewise {
namespace {

constexpr int kPair = 2 * kTileRows;      // results are made in squares of 32
constexpr int kSquare = kPair * kPair;    // floats
constexpr int kPanel = 2 * kPair;         // so that a panel of columns takes whole cache lines of 16-bit values
constexpr int kPassSteps = 64;            // steps of kTileDepth terms
constexpr int64_t kBlockBytes = 1 << 20;  // of the held operand
constexpr int kPassPanels = 8;            // whose sums wait while a block's terms pass by
enum TileSlot { kHeldSlot, kTaskSlot, kRedoSlot = 3 };  // the vector kernels have 0 to 2

// How a call is cut.
struct TileCut {
  int64_t held, steps, passes, block, blocks, panels, group, groups;

  TileCut(const Runtime& rt, int64_t held, int64_t panel, int64_t terms)
      : held(held), steps(ceil_div(terms, kTileDepth)), passes(ceil_div(steps, kPassSteps)) {
    const int64_t most =
        max_of<int64_t>(kBlockBytes / (pass_steps() * kTileDepth * sizeof(Packed)) / kPair * kPair, kPair);
    blocks = ceil_div(held, most);
    block = round_up(ceil_div(held, blocks), kPair);
    blocks = ceil_div(held, block);
    panels = ceil_div(panel, kPanel);
    const int64_t share = blocks * panels / (4 * int64_t(rt.num_threads()));
    group = passes == 1 ? 1 : max_of<int64_t>(1, min_of<int64_t>(kPassPanels, share));
    groups = ceil_div(panels, group);
  }
  int64_t pass_steps() const { return ceil_div(steps, passes); }
  TileLayout<1> layout() const { return {int(steps)}; }
  // Blocks packed at a time: work for every thread.
  int64_t round(const Runtime& rt) const { return min_of(blocks, ceil_div(4 * int64_t(rt.num_threads()), groups)); }
  int64_t block_size() const { return layout().at(block / kTileRows, 0, 0); }  // elements
  int64_t panel_size() const { return pass_steps() * kPanel * kTileDepth; }
  // Squares that wait: those of a group, or of one pass the one at work.
  int64_t squares() const { return passes == 1 ? 1 : group * (kPanel / kPair) * (block / kPair); }
};

// A Job gives the sizes held(), panel() and terms(), kPanelIsLeft (which side of the tile product the panel is), and
//   pack(to, layout, first)                  up to 32 of the held operand as two tiles by all steps
//   make(to, layout, first, step, steps)     a panel's terms, as the tiles that its width needs, in pairs
//   finish(square, panel, held)              32 x 32 sums, panel or held side first, whichever is left
template <class Products, class Job>
class TileTask {
 public:
  TileTask(const Job& job, const TileCut& cut, char* memory)
      : job_(job),
        cut_(cut),
        made_(reinterpret_cast<Packed*>(memory)),
        sums_(reinterpret_cast<float*>(made_ + cut.panel_size())) {}

  static int64_t bytes(const TileCut& cut) {
    return cut.panel_size() * sizeof(Packed) + cut.squares() * kSquare * sizeof(float);
  }

  // One group of panels with one block, `packed`, from `held` on.
  void run(const Packed* packed, int64_t held, int64_t group) {
    const int64_t begin = group * cut_.group, end = min_of(cut_.panels, begin + cut_.group);
    const int pairs = static_cast<int>(ceil_div(min_of(cut_.block, cut_.held - held), kPair));
    for (int64_t step = 0; step < cut_.steps; step += cut_.pass_steps()) {
      float* sums = sums_;
      for (int64_t panel = begin; panel < end; panel++)
        sums = multiply_panel(packed, held, pairs, panel * kPanel, step, sums);
    }
  }

 private:
  float* multiply_panel(const Packed* packed, int64_t held, int pairs, int64_t panel, int64_t step, float* sums) {
    const int steps = static_cast<int>(min_of(cut_.pass_steps(), cut_.steps - step));
    const TileLayout<1> layout{steps};
    const int64_t width = min_of<int64_t>(kPanel, job_.panel() - panel);
    const bool last = step + steps == cut_.steps;
    job_.make(made_, layout, panel, step, steps);
    for (int h = 0; h < pairs; h++) {
      const TileRun block = {packed + cut_.layout().at(2 * h, 0, step), 0, cut_.layout().tile_stride()};
      for (int64_t q = 0; q < width; q += kPair) {
        multiply(run_of(made_, layout, q / kTileRows), block, steps, sums, step > 0);
        if (last) job_.finish(sums, panel + q, held + h * kPair);
        if (cut_.passes > 1) sums += kSquare;
      }
    }
    return sums;
  }
  static TILEWISE_INLINE void multiply(const TileRun& panel, const TileRun& held, int steps, float* sums, bool add) {
    multiply_packed<1, 2, 2, Products>(Job::kPanelIsLeft ? panel : held, Job::kPanelIsLeft ? held : panel, steps, sums,
                                       kPair, add);
  }

  const Job& job_;
  const TileCut& cut_;
  Packed* made_;
  float* sums_;
};

template <class Products, class Job>
const char* multiply_in_blocks(const Runtime& rt, const Job& job) {
  const TileCut cut(rt, job.held(), job.panel(), job.terms());
  const int64_t round = cut.round(rt), pairs = ceil_div(cut.held, kPair), block_pairs = cut.block / kPair;
  Packed* packed = scratch<Packed>(rt, kHeldSlot, round * cut.block_size());
  if (!packed) return kOutOfMemory;
  bool exhausted = false;
  for (int64_t first = 0; first < cut.blocks; first += round) {
    const int64_t blocks = min_of(round, cut.blocks - first), begin = first * block_pairs;
    parallel_for(rt, min_of(pairs - begin, blocks * block_pairs), 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++)
        job.pack(packed + cut.layout().at(2 * i, 0, 0), cut.layout(), (begin + i) * kPair);
    });
    parallel_for(rt, blocks * cut.groups, 1, [&](int64_t from, int64_t to) {
      char* memory = scratch<char>(rt, kTaskSlot, TileTask<Products, Job>::bytes(cut));
      if (!memory) return __atomic_store_n(&exhausted, true, __ATOMIC_RELAXED);
      TileTask<Products, Job> task(job, cut, memory);
      const TileScope scope;
      for (int64_t i = from; i < to; i++) {
        const int64_t block = i / cut.groups;
        task.run(packed + block * cut.block_size(), (first + block) * cut.block, i % cut.groups);
      }
    });
  }
  return exhausted ? kOutOfMemory : nullptr;
}

}  // namespace
}  // namespace tilewise

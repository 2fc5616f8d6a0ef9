// A matrix product on AMX tiles whose one operand is made on the way: result[a, b] = sum over terms of held[a, term] *
// panel[b, term].
//
// The held operand is packed once, by all threads together. A block of it takes 1 MB and stays in the second-level
// cache while panels of 64 pass by. Between the products of a panel the next one is made, and the results before are
// finished, in small parts: products leave the vector units time. Sums of more terms than a block has are taken in
// segments, between which they wait in memory as the float32 numbers that they are: every sum is one chain over the
// terms, however a call is cut.
#pragma once
#include "common/half_tiles.h"
#include "common/isa.h"

namespace tilewise {
namespace {

constexpr int kPair = 2 * kTileRows;      // results are made in squares of 32
constexpr int kSquare = kPair * kPair;    // floats
constexpr int kPanel = 2 * kPair;         // so that a panel of columns takes whole cache lines of 16-bit values
constexpr int kSegmentSteps = 64;         // of kTileDepth terms
constexpr int64_t kBlockBytes = 1 << 20;  // of a segment of the held operand
constexpr int kFinishParts = 8;           // of a square
constexpr int kWaitingPanels = 8;         // whose sums wait while a segment passes by
enum TileSlot { kHeldSlot, kTaskSlot, kIndexSlot, kRedoSlot };  // the vector kernels have 0 to 2

// How a call is cut: tasks are a block with a group of panels, units what is multiplied with one panel as made.
struct TileCut {
  int64_t held, steps, segment, segments, block, blocks, panels, group, groups;

  struct Unit {
    int64_t task, segment, panel;
  };

  TileCut(const Runtime& rt, int64_t held, int64_t panel, int64_t terms)
      : held(held), steps(ceil_div(terms, kTileDepth)), segment(min_of<int64_t>(steps, kSegmentSteps)) {
    segments = ceil_div(steps, segment);
    const int64_t row_bytes = segment * kTileDepth * sizeof(Packed);
    blocks = ceil_div(held, kBlockBytes / row_bytes / kPair * kPair);
    block = round_up(ceil_div(held, blocks), kPair);
    blocks = ceil_div(held, block);
    panels = ceil_div(panel, kPanel);
    const int64_t share = blocks * panels / (4 * int64_t(rt.num_threads()));
    group = segments == 1 ? 1 : max_of<int64_t>(1, min_of<int64_t>(kWaitingPanels, share));
    groups = ceil_div(panels, group);
  }
  TileLayout<1> layout() const { return {int(steps)}; }
  // Blocks packed at a time: work for every thread.
  int64_t round(const Runtime& rt) const { return min_of(blocks, ceil_div(4 * int64_t(rt.num_threads()), groups)); }
  int64_t block_size() const { return layout().at(block / kTileRows, 0, 0); }  // elements
  int64_t panel_size() const { return segment * kPanel * kTileDepth; }
  // Squares that wait, or of one segment the one at work.
  int64_t squares() const { return segments == 1 ? 1 : group * panel_squares(); }
  int64_t panel_squares() const { return kPanel / kPair * (block / kPair); }

  int64_t units() const { return segments * group; }  // of a task; the last group may have fewer panels
  Unit unit(int64_t i) const {
    const int64_t task = i / units(), within = i % units();
    return {task, within / group * segment, task % groups * group + within % group};
  }
  int64_t steps_of(const Unit& unit) const { return min_of(segment, steps - unit.segment); }
};

// A Job gives the sizes held(), panel() and terms(), kPanelIsLeft (which side of the tile product the panel is), and
//   pack(to, layout, first)                 up to 32 of the held operand as two tiles by all steps
//   parts(first, steps)                     in how many parts a panel's terms are made, and each:
//   make(to, layout, first, step, part)     as the tiles that the panel's width needs, in pairs
//   expect(panel, held, part)               asks the caches for where an eighth of 32 x 32 results will go
//   finish(square, panel, held, part)       an eighth of 32 x 32 sums, panel or held side first, whichever is left
template <class Products, class Job>
class TileTasks {
 public:
  TileTasks(const Job& job, const TileCut& cut, char* memory)
      : job_(job),
        cut_(cut),
        made_(reinterpret_cast<Packed*>(memory)),
        spare_(made_ + cut.panel_size()),
        sums_(reinterpret_cast<float*>(spare_ + cut.panel_size())) {}

  static int64_t bytes(const TileCut& cut) {
    return 2 * cut.panel_size() * sizeof(Packed) + cut.squares() * kSquare * sizeof(float);
  }

  // Tasks [begin, end) of the blocks in `packed`, of which the first is `block`.
  void run(const Packed* packed, int64_t block, int64_t begin, int64_t end) {
    const int64_t stop = end * cut_.units();
    int64_t i = begin * cut_.units();
    Making making(*this, cut_.unit(i), made_);
    making.finish();
    while (i < stop) {
      int64_t next = i + 1;
      while (next < stop && cut_.unit(next).panel >= cut_.panels) next++;
      if (next < stop) making = Making(*this, cut_.unit(next), spare_);
      const TileCut::Unit unit = cut_.unit(i);
      const int64_t within = unit.task / cut_.groups;
      multiply(packed + within * cut_.block_size(), (block + within) * cut_.block, unit, making);
      Packed* made = made_;
      made_ = spare_;
      spare_ = made;
      i = next;
    }
    finishing_.finish(job_);
  }

 private:
  // A panel that is being made.
  struct Making {
    const Job* job;
    Packed* to;
    TileLayout<1> layout;
    int64_t first, step, part = 0, parts, due = 0;

    Making(const TileTasks& tasks, const TileCut::Unit& unit, Packed* to)
        : job(&tasks.job_),
          to(to),
          layout{int(tasks.cut_.steps_of(unit))},
          first(unit.panel * kPanel),
          step(unit.segment),
          parts(job->parts(first, layout.steps)) {}
    // As much as is due after one of `times`: all is made after the last.
    TILEWISE_INLINE void advance(int64_t times) {
      for (due += parts; due >= times && part < parts; due -= times) job->make(to, layout, first, step, part++);
    }
    void finish() {
      while (part < parts) job->make(to, layout, first, step, part++);
    }
  };

  // Sums that are complete.
  struct Finishing {
    const float* sums = nullptr;
    int64_t panel = 0, held = 0;
    int part = kFinishParts;

    TILEWISE_INLINE void advance(const Job& job) {
      if (part < kFinishParts) job.finish(sums, panel, held, part++);
    }
    void finish(const Job& job) {
      while (part < kFinishParts) advance(job);
    }
  };

  // On the way all of `making` is made. A square takes the steps in which all of the one before it is finished, whose
  // place it may then take.
  void multiply(const Packed* packed, int64_t held, const TileCut::Unit& unit, Making& making) {
    const int64_t steps = cut_.steps_of(unit), panel = unit.panel * kPanel;
    const int64_t width = min_of<int64_t>(kPanel, job_.panel() - panel);
    const int64_t pairs = ceil_div(min_of(cut_.block, cut_.held - held), kPair);
    const int64_t times = pairs * ceil_div(width, kPair) * steps;
    const bool first = unit.segment == 0, last = unit.segment + steps == cut_.steps;
    const int64_t stride = cut_.segments == 1 ? 0 : kSquare;
    float* sums = sums_ + unit.panel % cut_.group * cut_.panel_squares() * stride;
    for (int64_t h = 0; h < pairs; h++) {
      const TileRun block = {packed + cut_.layout().at(2 * h, 0, unit.segment), 0, cut_.layout().tile_stride()};
      for (int64_t q = 0; q < width; q += kPair, sums += stride) {
        const TileRun made = run_of(made_, TileLayout<1>{int(steps)}, q / kTileRows);
        const TileRun &left = Job::kPanelIsLeft ? made : block, &right = Job::kPanelIsLeft ? block : made;
        begin_tiles<2, 2>(sums, kPair, !first);
        int64_t due = 0;
        for (int64_t k = 0; k < steps; k++) {
          multiply_step<1, 2, 2, Products>(left, right, int(k));
          making.advance(times);
          for (due += kFinishParts; due >= steps; due -= steps) {
            finishing_.advance(job_);
            if (last) job_.expect(panel + q, held + h * kPair, int(k * kFinishParts / steps));
          }
        }
        end_tiles<2, 2>(sums, kPair);
        if (last) finishing_ = {sums, panel + q, held + h * kPair, 0};
      }
    }
  }

  const Job& job_;
  const TileCut& cut_;
  Packed *made_, *spare_;
  float* sums_;
  Finishing finishing_;
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
      char* memory = scratch<char>(rt, kTaskSlot, TileTasks<Products, Job>::bytes(cut));
      if (!memory) return __atomic_store_n(&exhausted, true, __ATOMIC_RELAXED);
      const TileScope scope;
      TileTasks<Products, Job>(job, cut, memory).run(packed, first, from, to);
    });
  }
  return exhausted ? kOutOfMemory : nullptr;
}

}  // namespace
}  // namespace tilewise

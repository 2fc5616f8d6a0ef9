// Ordinals of the 8-bit code books (book8.h) as one function of y = magnitude / scale: piecewise linear, and close
// enough to tell nearly all of them.
//
// Its values are ordinals where the code changes by one. In decade i = 0..6, of parts w = .9 10^(i-6) / F, it is
//   line = F + (y - 10^(i-7)) / w,
// except that the last value of a decade reaches until 10^(i-6) + w, not 10^(i-6), and the next one until 5 w beyond
// 10^(i-6): there the lower of the line and
//   bend = line / 4 + (6 F - 1) / 4,  which is 2 F and 2 F + 1 at those midpoints.
// Zero, which the first decade may share, and 1 have lines of their own. Bins of y divide its logarithm, read off the
// bits of the float, evenly: `top` is the upper edge of the last bin but one, between the last two values of
// all, and `count` bins lie between that and the float whose bits are zero, so that every decade has an edge between
// the midpoints that its predecessor's bend and its own line know. A bin has the line of its lower edge.
#pragma once
#include "optim/book8.h"

namespace tilewise {
namespace {

template <int kBins>
struct Bins8 {
  float slope[kBins], offset[kBins];  // of the line, over y in `unit`
  float bend[kBins];                  // its offset
  float per_bit, start;               // bin = nearest integer to bits * per_bit + start
  float unit, least;                  // `least` units are added to y, to stay within the bins
};
struct BinEdges {
  double top, count;
  int unit_log;
  double least;
};
constexpr BinEdges kSignedEdges32 = {-.0176, 174.5, -14, 0x1p-24}, kUnsignedEdges32 = {-.011, 171.5, -14, 0x1p-24};
constexpr BinEdges kSignedEdges8 = {-.018, 43.5, -9, 2.63e-7}, kUnsignedEdges8 = {-.0096, 45.5, -19, 1.827e-7};

constexpr double power_of_2(int log) {
  double power = 1;
  for (; log < 0; log++) power /= 2;
  return power;
}
// The y whose bits read as this logarithm.
constexpr double from_log_bits(double log) {
  int whole = 0;
  for (; log < 0; log++) whole--;
  return power_of_2(whole) * (1 + log);
}

constexpr double width_of(const BinEdges& edges) {
  return (127 - edges.unit_log + edges.top) / edges.count;
}
// The lower edge of a bin, in y.
constexpr double edge_of(const BinEdges& edges, int bins, int bin) {
  return from_log_bits(edges.top - (bins - 1 - bin) * width_of(edges)) - edges.least;
}

struct Line8 {
  double slope, offset, bend;
};
constexpr double kNoBend = 1000;
constexpr Line8 line_of(bool is_signed, const BinEdges& edges, int bins, int bin) {
  const int b = is_signed ? 0 : 1;
  const double edge = edge_of(edges, bins, bin);
  double f = 1 << b, power = 1e-6;  // of decade i, 10^(i-6)
  double part = .9 * power / f;
  const double of_zero = (power / 10 + part / 2) / 2;  // the first midpoint
  for (int i = 0; i < 6 && edge > power + part; i++) f *= 2, power *= 10, part *= 5;
  Line8 line = {1 / part, 8 * f / 9, kNoBend};
  if (bin == bins - 1) {  // 1, from a quarter of a part below it
    line.offset = 2 * f - (1 - part / 4) * line.slope;
    return line;
  }
  if (edge < of_zero) {  // through the first midpoint, and the second; signed, its bend through the second and third
    if (!is_signed) line.slope = 1 / (power / 10 + part - of_zero);
    line.offset = b + 1 - of_zero * line.slope;
  }
  if (power < .5) line.bend = 2 * f - (line.slope * (power + part) + line.offset) / 4;
  return line;
}

// Results are ordinals less `base`, times `fine`.
template <int kBins>
constexpr Bins8<kBins> make_bins8(bool is_signed, const BinEdges& edges, double base, double fine) {
  Bins8<kBins> bins = {};
  const double unit = power_of_2(edges.unit_log);
  for (int bin = 0; bin < kBins; bin++) {
    const Line8 line = line_of(is_signed, edges, kBins, bin);
    bins.slope[bin] = static_cast<float>(line.slope * unit * fine);
    bins.offset[bin] = static_cast<float>((line.offset - base - edges.least * line.slope) * fine);
    bins.bend[bin] = static_cast<float>((line.bend - base + base / 4) * fine);
  }
  bins.per_bit = static_cast<float>(0x1p-23 / width_of(edges));
  bins.start = static_cast<float>(kBins - 1.5 - edges.count);  // an integer
  bins.unit = static_cast<float>(unit);
  bins.least = static_cast<float>(edges.least / unit);
  return bins;
}

// Whether the bins tell all ordinals right: just below and above every midpoint, and on both sides of every edge.
constexpr double value_of(int n, int b) {
  if (n == b || n == 128 << b) return n == b ? 0 : 1;
  int f = 1 << b;
  double unit = 1. / 78125 / (256 << b);
  for (; 2 * f <= n; f *= 2) unit *= 5;
  return (18 * n + 9 - 16 * f) * unit;
}
constexpr bool tells(bool is_signed, const BinEdges& edges, int bins, int bin, double y) {
  const int b = is_signed ? 0 : 1;
  const Line8 line = line_of(is_signed, edges, bins, bin);
  const double straight = line.slope * y + line.offset, bent = straight / 4 + line.bend;
  const int ordinal = static_cast<int>(straight < bent ? straight : bent);
  const double below = ordinal > b ? (value_of(ordinal - 1, b) + value_of(ordinal, b)) / 2 : -1;
  const double above = ordinal < 128 << b ? (value_of(ordinal, b) + value_of(ordinal + 1, b)) / 2 : 2;
  return b <= ordinal && ordinal <= 128 << b && below <= y && y <= above;
}
constexpr bool tell_all(bool is_signed, const BinEdges& edges, int bins) {
  constexpr double kNear = 1e-7;
  const int b = is_signed ? 0 : 1;
  bool right = edge_of(edges, bins, 0) <= 0 && tells(is_signed, edges, bins, 0, 0);
  for (int bin = 1; bin < bins; bin++) {
    const double edge = edge_of(edges, bins, bin);
    right = right && (edge < 0 || (tells(is_signed, edges, bins, bin - 1, edge * (1 - kNear)) &&
                                   tells(is_signed, edges, bins, bin, edge * (1 + kNear))));
  }
  int bin = 0;
  for (int n = b; n < 128 << b; n++) {
    const double midpoint = (value_of(n, b) + value_of(n + 1, b)) / 2;
    while (bin + 1 < bins && edge_of(edges, bins, bin + 1) < midpoint) bin++;
    right = right && tells(is_signed, edges, bins, bin, midpoint * (1 - kNear)) &&
            tells(is_signed, edges, bins, bin, midpoint * (1 + kNear));
  }
  return right;
}
static_assert(tell_all(true, kSignedEdges32, 32) && tell_all(false, kUnsignedEdges32, 32), "a line is off");
static_assert(tell_all(true, kSignedEdges8, 8) && tell_all(false, kUnsignedEdges8, 8), "a line is off");

// Codes are the nearest integers.
constexpr Bins8<32> kSignedBins32 = make_bins8<32>(true, kSignedEdges32, .5, 1);
constexpr Bins8<32> kUnsignedBins32 = make_bins8<32>(false, kUnsignedEdges32, 1.5, 1);
// In fixed point: signed ones to be taken from or added to 127.5, whole parts are codes then.
constexpr double kFine = 0x1p16;
constexpr Bins8<8> kSignedBins8 = make_bins8<8>(true, kSignedEdges8, .5, kFine);
constexpr Bins8<8> kUnsignedBins8 = make_bins8<8>(false, kUnsignedEdges8, 1, kFine);

}  // namespace
}  // namespace tilewise

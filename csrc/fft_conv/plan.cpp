#include "fft_conv/plan.h"

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace tilewise::fft_conv {
namespace {

constexpr double kTurn = 6.283185307179586476925;
constexpr double kRingAngle = kTurn / 4;  // the ring is x^N - i

constexpr bool power_of_two(int n) {
  return (n & (n - 1)) == 0;
}

int bit_reverse(int x, int n) {
  int r = 0;
  for (; n > 1; n /= 2, x /= 2) r = 2 * r + x % 2;
  return r;
}

// The c-th root among the R of x^R = e^{i angle}, in the order in which nodes leave their results.
double child_angle(double angle, int radix, int c) {
  return (angle + kTurn * (power_of_two(radix) ? bit_reverse(c, radix) : c)) / radix;
}

struct Size {
  int64_t points;
  int first_radix;
};

// Smallest r 2^k lanes^2 >= length. Radices below 4 only for the smallest sizes: above, 4..7 cover the octave.
Size choose_size(int64_t length, int64_t leaf) {
  Size best = {0, 0};
  for (int radix = 1; radix <= kMaxFirstRadix; radix++) {
    int64_t points = radix * leaf;
    if (radix < 4 && points < length) continue;
    while (points < length) points *= 2;
    if (!best.points || points <= best.points) best = {points, radix};
  }
  return best;
}

class Builder {
 public:
  Builder(Size size, int lanes) : lanes_(lanes) {
    plan_.size = size.points;
    plan_.first_radix = size.first_radix;
    choose_radices(size.points / size.first_radix / (lanes * lanes));
    put_first_pass(size.first_radix);
    for (int c = 0; c < size.first_radix; c++) put_subtree(0, child_angle(kRingAngle, size.first_radix, c));
    put_lane_powers();
    plan_.first_powers = first_powers_.data();
    plan_.first_node = first_node_.data();
    plan_.nodes = nodes_.data();
    plan_.lane_powers = lane_powers_.data();
  }
  Builder(const Builder&) = delete;
  const Plan* plan() const { return &plan_; }

 private:
  Plan plan_ = {};
  int lanes_;
  std::vector<float> first_powers_, first_node_, nodes_, lane_powers_;

  void choose_radices(int64_t ratio) {
    while (ratio > 1) {
      const int radix = ratio == 16 ? 4 : ratio >= 8 ? 8 : static_cast<int>(ratio);
      plan_.radix[plan_.levels++] = radix;
      ratio /= radix;
    }
  }

  static void put(std::vector<float>& to, double angle) {
    to.push_back(static_cast<float>(std::cos(angle)));
    to.push_back(static_cast<float>(std::sin(angle)));
  }

  static void put_node(std::vector<float>& to, int radix, double angle) {
    const double rho = angle / radix;
    for (int s = 1; s < radix; s++) put(to, rho * s);
    if (radix != 8) return;
    put(to, rho + kTurn / 8);
    put(to, 3 * rho + 3 * kTurn / 8);
  }

  void put_first_pass(int radix) {
    for (int c = 0; c < radix; c++)
      for (int s = 0; s < radix; s++) put(first_powers_, child_angle(kRingAngle, radix, c) * s);
    if (power_of_two(radix)) put_node(first_node_, radix, kRingAngle);
  }

  void put_subtree(int level, double angle) {
    if (level == plan_.levels) return put_leaf(angle);
    const int radix = plan_.radix[level];
    put_node(nodes_, radix, angle);
    for (int c = 0; c < radix; c++) put_subtree(level + 1, child_angle(angle, radix, c));
  }

  void put_leaf(double angle) {
    const int quads = lanes_ / 4;
    put_node(nodes_, quads, angle);
    for (int c = 0; c < quads; c++) put_node(nodes_, 4, child_angle(angle, quads, c));
    const double rho = angle / lanes_;  // lane v holds the ring x^lanes - e^{i (rho + its own root)}
    for (int s = 1; s < quads; s++) put(nodes_, rho / quads * s);
    for (int s = 1; s < 4; s++) put(nodes_, rho / lanes_ * s);
  }

  void put_lane_powers() {
    const int quads = lanes_ / 4;
    for (int s = 1; s < quads; s++) put_lanes(static_cast<double>(s) / quads, 0);
    for (int c = 0; c < quads; c++)
      for (int s = 1; s < 4; s++)
        put_lanes(static_cast<double>(s) / lanes_, kTurn * bit_reverse(c, quads) / quads / 4 * s);
  }

  void put_lanes(double factor, double offset) {
    for (int part = 0; part < 2; part++)
      for (int v = 0; v < lanes_; v++) {
        const double angle = kTurn * bit_reverse(v, lanes_) / lanes_ * factor + offset;
        lane_powers_.push_back(static_cast<float>(part ? std::sin(angle) : std::cos(angle)));
      }
  }
};

}  // namespace

const Plan* plan_for(int64_t length, int lanes) try {
  static std::mutex mutex;
  static auto* built = new std::map<std::pair<int64_t, int>, std::unique_ptr<Builder>>;  // outlives static destructors
  const Size size = choose_size(length, int64_t(lanes) * lanes);
  const std::lock_guard<std::mutex> lock(mutex);
  auto& builder = (*built)[{size.points, lanes}];
  if (!builder) builder = std::make_unique<Builder>(size, lanes);
  return builder->plan();
} catch (const std::bad_alloc&) {
  return nullptr;
}

}  // namespace tilewise::fft_conv

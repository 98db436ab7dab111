// The guided logits with -inf for what top-k and top-p exclude, on the CPU: the very numbers of eager PyTorch, without
// its sort. Both filters are thresholds, found by counting and by summing. A row whose threshold depends on PyTorch's
// rounding, or falls between equal logits, is marked and left to the caller.
#include "cpu/sampling.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

struct Part {
  double mass;
  int64_t count;
};

// Of the logits below a pivot.
Part part_below(const float* x, const float* e, int64_t size, float pivot) {
  Floats mass[4] = {};
  Mask count[4] = {};
  for (int64_t i = 0; i < size; i += kGroup) {
    for (int k = 0; k < 4; ++k) {
      const Mask below = load(x + i + k * kWidth) < pivot;
      mass[k] += select(below, load(e + i + k * kWidth), Floats{});
      count[k] -= below;
    }
  }
  return {sum_lanes((mass[0] + mass[1]) + (mass[2] + mass[3])),
          count_lanes((count[0] + count[1]) + (count[2] + count[3]))};
}

// The least logit from a pivot up, of which there are some.
float least_from(const float* x, int64_t size, float pivot) {
  Floats least[2];
  least[0] = least[1] = Floats{} + __builtin_inff();
  for (int64_t i = 0; i < size; i += 2 * kWidth) {
    for (int k = 0; k < 2; ++k) {
      const Floats v = load(x + i + k * kWidth);
      least[k] = select(v >= pivot, select(v < least[k], v, least[k]), least[k]);
    }
  }
  float value = least[0][0];
  for (int lane = 0; lane < 2 * kWidth; ++lane) {
    if (least[lane / kWidth][lane % kWidth] < value) value = least[lane / kWidth][lane % kWidth];
  }
  return value;
}

// A threshold of top-p over the logits from floor up, or NaN where it is not certain.
float top_p_threshold(const float* x, float* e, int64_t size, int64_t V, float floor, float max, float excluded) {
  for (int64_t i = 0; i < size; i += kWidth) {
    const Floats v = load(x + i);
    store(e + i, select(v >= floor, relative_mass(v, max), Floats{}));
  }
  float low = floor, end = float_at(order_of(max) + 1);
  Part under_low = part_below(x, e, size, low), under_end = part_below(x, e, size, end);
  const double limit = double(excluded) * under_end.mass;
  // The mass under low is at most the limit; that under end is more, or end is the end.
  for (int step = 0; under_end.count - under_low.count > 1 && order_of(end) - order_of(low) > 1; ++step) {
    const double share = step % 2 ? 0.5 : (limit - under_low.mass) / (under_end.mass - under_low.mass);
    float pivot = float(low + (double(end) - low) * share);
    if (step >= 24 || !(pivot > low && pivot < end)) pivot = float_at((order_of(low) + order_of(end)) / 2);
    const Part part = part_below(x, e, size, pivot);
    if (part.mass <= limit) {
      low = pivot, under_low = part;
    } else {
      end = pivot, under_end = part;
    }
  }
  const float first = least_from(x, size, low);  // that is kept, and what is left below it is dropped
  const double own = relative_mass(Floats{} + first, max)[0], error = mass_error(V);
  const bool alone = first == max && under_end.count - under_low.count == 1;
  const bool kept = (under_low.mass + own) * (1 - error) > limit || alone;
  return kept && under_low.mass * (1 + error) <= limit && first - max > kDepth ? low : __builtin_nanf("");
}

// Whether the row is certain.
template <typename T>
bool filter_row(const FilterLogits& a, int64_t row, int64_t size, float* x, float* e) {
  const Extent extent = load_row<T>(a, row, size, x);
  if (!extent.valid) return false;
  float floor = a.top_k > 0 ? top_k_threshold(x, size, a.V, a.top_k, extent, a.top_p > 0) : extent.low;
  if (a.top_p > 0) floor = top_p_threshold(x, e, size, a.V, floor, extent.high, float(1 - a.top_p));
  if (floor != floor) return false;
  float* out = a.out + row * a.V;
  const Floats excluded = Floats{} - __builtin_inff();
  int64_t i = 0;
  for (; i + kWidth <= a.V; i += kWidth) store(out + i, select(load(x + i) >= floor, load(x + i), excluded));
  if (i < a.V) store(out + i, select(load(x + i) >= floor, load(x + i), excluded), a.V - i);
  return true;
}

template <typename T>
const char* filter(const FilterLogits& a) {
  const int64_t rows = a.B * a.n;
  const bool ran = for_each_row(rows, a.V, rows * a.V * int64_t((a.guided ? 2 : 1) * sizeof(T) + sizeof(float)),
                                [&](int64_t row, int64_t size, float* x, float* e) {
                                  a.undecided[row] = !filter_row<T>(a, row, size, x, e);
                                });
  return ran ? nullptr : kOutOfMemory;
}

}  // namespace

const char* filter_logits(const FilterLogits& args) {
  return dispatch_logits(args.dtype, [&](auto type) { return filter<decltype(type)>(args); });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

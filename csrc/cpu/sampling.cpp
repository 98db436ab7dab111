// Token sampling on the CPU: a row at a time in the nearest caches, vectorised over the codes, threads over rows.
//
// Nothing is sorted. Top-k needs only a threshold, found by counting. Top-p needs no threshold at all: the row is drawn
// first, and a draw that top-p excludes removes itself and everything below it before the row is drawn again.
//
// The tokens must be those of eager PyTorch, whose float32 sums and exponentials are rounded differently on every
// processor. So a row is settled here only where the decision holds for every float32 result within the bounds below;
// the others, one in some ten thousand, are marked and left to the caller, who runs PyTorch on them.
#include "cpu/sampling.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int kRounds = 64;  // draws of one row: with noise from a generator, few are needed

// Two ratios p / noise further apart than this, relatively, are in the right order: an exponential of PyTorch's is
// within 20 ulp (2.4e-6), ours within 2.4e-7, and three operations follow.
constexpr double kTie = 1.5e-5;
constexpr float kSmallest = 1e-30f, kLargest = 1e30f;  // of a ratio, so that PyTorch's is a normal number

struct Draw {
  float best, second;  // the two largest e / noise
  int32_t index;       // of the best
  float total;         // sum of e
  bool noise_valid;
};

// e = exp(x - max) where x >= floor, else 0; kept for the sums of top-p and for further draws.
template <bool kFirst>
Draw draw(const float* x, float* e, const float* noise, int64_t V, float floor, float max) {
  Floats best[2] = {}, second[2] = {}, total[2] = {};
  Mask index[2] = {}, valid[2] = {~Mask{}, ~Mask{}}, here;
  for (int lane = 0; lane < kWidth; ++lane) here[lane] = lane;
  const auto take = [&](int64_t i, int k, Floats q) {
    const Floats v = load(x + i);
    Floats mass;
    if (kFirst) {
      mass = select(v >= floor, relative_mass(v, max), Floats{});
      store(e + i, mass);
      total[k] += mass;
    } else {
      mass = select(v >= floor, load(e + i), Floats{});
    }
    const Floats ratio = mass / q;
    const Mask better = ratio > best[k];
    const Floats less = select(better, best[k], ratio);
    second[k] = select(less > second[k], less, second[k]);
    best[k] = select(better, ratio, best[k]);
    index[k] = select(better, here, index[k]);
    valid[k] &= q > 0.0f;
    here += kWidth;
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= V; i += 2 * kWidth) {
    take(i, 0, load(noise + i));
    take(i + kWidth, 1, load(noise + i + kWidth));
  }
  for (; i < V; i += kWidth) {
    const int64_t n = V - i < kWidth ? V - i : kWidth;
    take(i, 0, select(first_lanes(n), load(noise + i, n), Floats{} + __builtin_inff()));
  }
  Draw result{best[0][0], second[0][0], index[0][0], sum_lanes(total[0] + total[1]), true};
  for (int k = 0; k < 2; ++k) {
    for (int lane = 0; lane < kWidth; ++lane) {
      if (!valid[k][lane]) result.noise_valid = false;
      if (second[k][lane] > result.second) result.second = second[k][lane];
      if (k == 0 && lane == 0) continue;
      const float ratio = best[k][lane];
      if (ratio > result.best) {
        if (result.best > result.second) result.second = result.best;
        result.best = ratio, result.index = index[k][lane];
      } else if (ratio > result.second) {
        result.second = ratio;
      }
    }
  }
  return result;
}

// Whether PyTorch draws the same code of these.
bool settled(const Draw& drawn, const float* x, float max) {
  return drawn.noise_valid && drawn.best > kSmallest && drawn.best < kLargest &&
         drawn.best * (1 - kTie) > drawn.second && x[drawn.index] - max > kDepth;
}

enum Verdict { kKept, kDropped, kUnclear };

// What top-p does with the drawn code: it drops those whose cumulated probability, in ascending order and with the code
// itself, is at most 1 - top_p, and never the last. Equal logits stand in any order.
Verdict judge(const float* x, const float* e, int64_t V, int32_t drawn, float max, double total, float excluded) {
  const float value = x[drawn];
  Floats below[4] = {};
  Mask equal[4] = {};
  for (int64_t i = 0; i < V; i += kGroup) {  // e is padded by the draw: -inf is below every threshold
    for (int k = 0; k < 4; ++k) {
      const Floats v = load(x + i + k * kWidth);
      below[k] += select(v < value, load(e + i + k * kWidth), Floats{});
      equal[k] -= v == value;
    }
  }
  const double mass = sum_lanes((below[0] + below[1]) + (below[2] + below[3])), own = e[drawn];
  const int64_t ties = count_lanes((equal[0] + equal[1]) + (equal[2] + equal[3]));
  const double error = mass_error(V), limit = double(excluded) * total;
  if ((mass + own) * (1 - error) > limit) return kKept;
  if (value == max) return ties == 1 ? kKept : kUnclear;
  return (mass + double(ties) * own) * (1 + error) <= limit ? kDropped : kUnclear;
}

// The token of a row, or kUndecided, or kNoDistribution.
template <typename T>
int64_t sample_row(const SampleTokens& a, int64_t row, int64_t size, float* x, float* e) {
  const int64_t V = a.V;
  const Extent extent = load_row<T>(a, row, size, x);
  if (!extent.valid) return kNoDistribution;
  const float max = extent.high, excluded = float(1 - a.top_p);
  const float floor = a.top_k > 0 ? top_k_threshold(x, size, V, a.top_k, extent, true) : extent.low;
  const float* noise = a.noise + row * V;
  Draw drawn = draw<true>(x, e, noise, V, floor, max);
  const float total = drawn.total;
  for (int round = 0; round < kRounds && settled(drawn, x, max); ++round) {
    const Verdict verdict = a.top_p > 0 ? judge(x, e, V, drawn.index, max, total, excluded) : kKept;
    if (verdict == kKept) return drawn.index;
    if (verdict == kUnclear) return kUndecided;
    drawn = draw<false>(x, e, noise, V, float_at(order_of(x[drawn.index]) + 1), max);
  }
  return kUndecided;
}

template <typename T>
const char* sample(const SampleTokens& a) {
  const int64_t rows = a.B * a.n;
  const bool ran = for_each_row(rows, a.V, rows * a.V * int64_t((a.guided ? 2 : 1) * sizeof(T) + sizeof(float)),
                                [&](int64_t row, int64_t size, float* x, float* e) {
                                  a.tokens[row] = sample_row<T>(a, row, size, x, e);
                                });
  if (!ran) return kOutOfMemory;
  a.status[0] = a.status[1] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    a.status[0] += a.tokens[row] == kUndecided, a.status[1] += a.tokens[row] == kNoDistribution;
  }
  return nullptr;
}

}  // namespace

const char* sample_tokens(const SampleTokens& args) {
  return dispatch_logits(args.dtype, [&](auto type) { return sample<decltype(type)>(args); });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

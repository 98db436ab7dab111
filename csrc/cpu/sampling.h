// What the CPU kernels of token sampling share: a row of guided logits, and the threshold of top-k.
//
// To be compiled with -ffp-contract=off: the guided logits must be rounded as PyTorch rounds them, after each
// operation. Internal linkage only, as in simd/vector.h.
#pragma once

#include "cpu/simd/exponential.h"
#include "cpu/threads.h"
#include "ops/sampling.h"

namespace varkern {
namespace {

constexpr int64_t kGroup = 4 * kWidth;  // rows are padded by -inf to whole groups

// Below max + kDepth a float32 probability may be subnormal and have any relative error; below max + kUnderflow,
// exp is zero in float32 and a logit is as good as excluded.
constexpr float kDepth = -64.0f, kUnderflow = -104.0f;

struct Extent {
  float low, high;
  bool valid;  // no NaN, no +inf, and not -inf alone
};

// Row b * n + i of the guided logits, (1 + guidance) * cond - guidance * uncond or just cond, padded to size.
template <typename T, typename Args>
inline Extent load_row(const Args& a, int64_t row, int64_t size, float* x) {
  const T* cond = (const T*)a.logits + row / a.n * a.stride_b + row % a.n * a.stride_n;
  const T* uncond = a.guided ? cond + a.B * a.stride_b : nullptr;
  const float scale = float(1 + a.guidance), guidance = float(a.guidance);
  const int64_t V = a.V;
  const Floats infinity = Floats{} + __builtin_inff();
  Floats low[2] = {infinity, infinity}, high[2] = {-infinity, -infinity};
  Mask nan{};
  const auto take = [&](int64_t i, int k, Floats c, Floats u) {
    const Floats v = uncond ? scale * c - guidance * u : c;
    low[k] = select(v < low[k], v, low[k]), high[k] = select(v > high[k], v, high[k]);
    nan |= v != v;
    store(x + i, v);
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= V; i += 2 * kWidth) {
    for (int k = 0; k < 2; ++k) {
      const int64_t j = i + k * kWidth;
      take(j, k, load(cond + j), uncond ? load(uncond + j) : Floats{});
    }
  }
  for (; i < V; i += kWidth) {  // past V, the lanes repeat the first logit
    const int64_t n = V - i < kWidth ? V - i : kWidth;
    const Mask inside = first_lanes(n);
    const Floats c = select(inside, load(cond + i, n), Floats{} + to_float(cond[0]));
    take(i, 0, c, uncond ? select(inside, load(uncond + i, n), Floats{} + to_float(uncond[0])) : Floats{});
  }
  for (i = V; i < size; ++i) x[i] = -__builtin_inff();
  Extent extent{low[0][0], high[0][0], true};
  for (int lane = 0; lane < kWidth; ++lane) {
    for (int k = 0; k < 2; ++k) {
      if (low[k][lane] < extent.low) extent.low = low[k][lane];
      if (high[k][lane] > extent.high) extent.high = high[k][lane];
    }
    if (nan[lane]) extent.valid = false;
  }
  extent.valid = extent.valid && extent.high - extent.high == 0.0f;
  return extent;
}

inline int64_t count_lanes(Mask counts) {
  int64_t sum = 0;
  for (int lane = 0; lane < kWidth; ++lane) sum += counts[lane];
  return sum;
}

inline int64_t count_at_least(const float* x, int64_t size, float pivot) {
  Mask counts[4] = {};
  for (int64_t i = 0; i < size; i += kGroup) {
    for (int k = 0; k < 4; ++k) counts[k] -= load(x + i + k * kWidth) >= pivot;
  }
  return count_lanes((counts[0] + counts[1]) + (counts[2] + counts[3]));
}

// Floats in ascending order as integers.
inline int64_t order_of(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits >= 0 ? bits : -int64_t(bits & 0x7fffffff);
}

inline float float_at(int64_t order) {
  return bits_float(order >= 0 ? uint32_t(order) : uint32_t(-order) | 0x80000000u);
}

// A float that separates the logits which top-k keeps, those not below the k-th largest, from the others. Where they
// have no use, it may exclude kept logits that underflow: the search is shorter.
inline float top_k_threshold(const float* x, int64_t size, int64_t V, int64_t k, Extent extent, bool may_underflow) {
  float low = extent.low, high = extent.high;  // count(>= low) >= k, and high is kept
  int64_t at_low = V, above_high = 0;          // count(>= low), and an estimate of count(> high)
  if (k >= V) return low;
  if (may_underflow && low < high + kUnderflow) {
    low = high + kUnderflow;
    at_low = count_at_least(x, size, low);
    if (at_low <= k) return low;
  }
  // The threshold is in [low, end): interpolate the counts, halve the interval, in turn; then halve the floats in it.
  float end = float_at(order_of(high) + 1);
  for (int step = 0; at_low != k && order_of(end) - order_of(low) > 1; ++step) {
    const float share = step % 2 ? 0.5f : float(at_low - k) / float(at_low - above_high);
    float pivot = low + (end - low) * share;
    if (step >= 24 || !(pivot > low && pivot < end)) pivot = float_at((order_of(low) + order_of(end)) / 2);
    const int64_t count = count_at_least(x, size, pivot);
    if (count >= k) {
      low = pivot, at_low = count;
    } else {
      end = pivot, above_high = count;
    }
  }
  return low;
}

// What may separate, relatively, a sum of probabilities by PyTorch from ours: a float32 sum of V of them in four lanes,
// twice (the total and the part), and the exponentials.
inline double mass_error(int64_t V) { return (double(V) / 2 + 128) * 0x1p-24; }

// e = exp(x - max), not below exp(kDepth).
inline Floats relative_mass(Floats x, float max) {
  const Floats depth = x - max;
  return exponential(select(depth > kDepth, depth, Floats{} + kDepth));
}

constexpr const char* kOutOfMemory = "out of memory for the rows of token sampling";

// body(T{}) for the type T of a dtype code.
template <typename Body>
inline const char* dispatch_logits(int dtype, const Body& body) {
  switch (dtype) {
    case kFloat32: return body(float{});
    case kFloat16: return body(float16{});
    case kBFloat16: return body(bfloat16{});
    default: return "unknown dtype code: 0 is float32, 1 float16, 2 bfloat16";
  }
}

// Runs body(row, size, two scratch rows of size floats) for every row; size is V in whole groups. False: no memory.
template <typename Body>
inline bool for_each_row(int64_t rows, int64_t V, int64_t bytes, const Body& body) {
  const int64_t size = (V + kGroup - 1) / kGroup * kGroup;
  const int threads = thread_count(rows, bytes);
  char* memory = (char*)__builtin_calloc(threads * 2 * size + 16, sizeof(float));
  if (!memory) return false;
  float* workspace = (float*)(memory + (64 - uintptr_t(memory) % 64));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* scratch = workspace + thread_number() * 2 * size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) body(row, size, scratch, scratch + size);
  }
  __builtin_free(memory);
  return true;
}

}  // namespace
}  // namespace varkern

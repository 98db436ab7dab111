// A row of a layer norm. Internal linkage only, as in simd/vector.h.
#pragma once

#include "cpu/simd/lanes.h"

namespace varkern {
namespace {

struct Statistics {
  float mean, rstd;
};

// Two passes, the second around the mean: E[x^2] - mean^2 would cancel when |mean| is large.
template <typename X>
Statistics row_statistics(const X* x, int64_t C, float eps) {
  const int64_t body = C / kWidth * kWidth, tail = C - body, unrolled = body / (4 * kWidth) * (4 * kWidth);
  Floats sum[4] = {};
  int64_t c = 0;
  for (; c < unrolled; c += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) sum[k] += load(x + c + k * kWidth);
  }
  for (; c < body; c += kWidth) sum[0] += load(x + c);
  if (tail) sum[1] += load(x + body, tail);
  const float mean = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(C);

  Floats square[4] = {};
  for (c = 0; c < unrolled; c += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) {
      const Floats d = load(x + c + k * kWidth) - mean;
      square[k] += d * d;
    }
  }
  for (; c < body; c += kWidth) {
    const Floats d = load(x + c) - mean;
    square[0] += d * d;
  }
  if (tail) {
    const Floats d = select(first_lanes(tail), load(x + body, tail) - mean, Floats{});
    square[1] += d * d;
  }
  const float variance = sum_lanes((square[0] + square[1]) + (square[2] + square[3])) / float(C);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

template <typename X, typename Cond, typename Out>
void normalise_row(const X* x, Statistics s, const Cond* scale, const Cond* shift, Out* out, int64_t C) {
  for_each_vector(C, [&](int64_t c, auto lanes) {
    const Floats h = (load(x + c, lanes) - s.mean) * s.rstd;
    store(out + c, h * (1.0f + load(scale + c, lanes)) + load(shift + c, lanes), lanes);
  });
}

}  // namespace
}  // namespace varkern

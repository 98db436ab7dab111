// Group normalisation, with SiLU.
#pragma once

#include "ops/arguments.h"

namespace varkern {

// Group normalisation over the channels of a group and all P pixels, as one multiplication and addition a channel:
//   multiplier = rstd * weight, offset = bias - (mean - centre) * multiplier, out = (x - centre) * multiplier + offset
// Sums are taken in an order fixed by the shapes alone.
VARKERN_ARGUMENTS(GroupNorm,
  const void* x;        // (B, C, P) dtype, contiguous; with channels_last (B, P, C)
  const float* weight;  // (C)
  const float* bias;    // (C)
  void* out;            // as x, times its sigmoid where silu; or nullptr: only the coefficients, with centre = 0
  float* coefficients;  // (3, B, C): multiplier, offset, centre, the rounded mean; without out (2, B, C)
  int64_t B, C, P, groups;
  int dtype;
  bool channels_last, silu;
  double eps;
)

VARKERN_MORE_ARGUMENTS(CudaGroupNorm, GroupNorm,
  double* partial;       // (B, groups, chunks, 2): of each chunk of pixels the mean, and the sum of squares around it
  int64_t chunk_pixels;  // chunks = ceil(P / chunk_pixels): what is added up in which order depends on it
)

}  // namespace varkern

// Token sampling: guidance, top-k, top-p and the draw.
#pragma once

#include "ops/arguments.h"

namespace varkern {

// What the CPU writes instead of a token: PyTorch's rounding decides; NaN, +inf, or nothing but -inf in the row.
enum : int64_t { kUndecided = -1, kNoDistribution = -2 };

// One token a row: argmax of p / noise, p the softmax of the guided logits that top-k and top-p keep. float32.
// On CUDA a row without distribution gives token 0, and equal logits at the border of top-p stay from the last index down.
VARKERN_ARGUMENTS(SampleTokens,
  const void* logits;  // (B, n, V) dtype, last axis contiguous; guided: (2B, n, V), conditional rows first
  const float* noise;  // (B * n, V) contiguous, positive
  int64_t* tokens;     // (B * n)
  int64_t* status;     // (2): how many rows are undecided and without distribution; not on CUDA, where none is
  int64_t B, n, V, stride_b, stride_n, top_k;  // top_k = 0: off
  double guidance, top_p;                      // guided: (1 + guidance) * cond - guidance * uncond; top_p = 0: off
  int dtype;
  bool guided;
)

// The guided logits of the same rows, -inf where top-k and top-p exclude them. float32.
VARKERN_ARGUMENTS(FilterLogits,
  const void* logits;  // as in SampleTokens, and so are the others
  float* out;          // (B, n, V) contiguous; undecided rows are not written
  bool* undecided;     // (B * n): PyTorch's rounding decides what is excluded, or the row has no distribution
  int64_t B, n, V, stride_b, stride_n, top_k;
  double guidance, top_p;
  int dtype;
  bool guided;
)

}  // namespace varkern

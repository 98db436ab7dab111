// A gated residual and the modulated layer norm after it.
#pragma once

#include "ops/arguments.h"

namespace varkern {

// In place x = x + gate * h, rounded once to x_dtype, then the modulated layer norm of the rounded x.
VARKERN_ARGUMENTS(GatedResidualLayerNorm,
  void* x;            // (B, L, C) x_dtype, contiguous, in place
  const void* h;      // (B, L, C) h_dtype, last axis contiguous
  const void* gate;   // (B, C) cond_dtype, last axis contiguous, as scale and shift
  const void* scale;
  const void* shift;
  void* out;  // (B, L, C) out_dtype, contiguous
  int64_t B, L, C;
  int64_t h_stride_b, h_stride_l, gate_stride_b, scale_stride_b, shift_stride_b;
  int x_dtype, h_dtype, cond_dtype, out_dtype;  // out_dtype = promote_types(x_dtype, cond_dtype)
  float eps;
)

}  // namespace varkern

// Modulated layer norm.
#pragma once

#include "ops/arguments.h"

namespace varkern {

// y = (x - mean(x)) * rstd(x) * (1 + scale) + shift over the last axis; arithmetic in float32.
VARKERN_ARGUMENTS(ModulatedLayerNormForward,
  const void* x;      // (B, L, C) x_dtype, last axis contiguous
  const void* scale;  // (B, C) cond_dtype, last axis contiguous
  const void* shift;  // (B, C) cond_dtype, last axis contiguous
  void* out;          // (B, L, C) out_dtype, contiguous
  float* mean;        // (B * L) or nullptr
  float* rstd;        // (B * L) or nullptr, 1 / sqrt(var + eps), var biased
  int64_t B, L, C;
  int64_t x_stride_b, x_stride_l, scale_stride_b, shift_stride_b;
  int x_dtype, cond_dtype, out_dtype;  // out_dtype = promote_types(x_dtype, cond_dtype)
  float eps;
)

// With h = (x - mean) * rstd and d = grad_out * (1 + scale):
// grad_x = rstd * (d - mean(d) - h * mean(d * h)), grad_scale = sum_L grad_out * h, grad_shift = sum_L grad_out.
// The sums over L are taken in an order fixed by the shape alone, so results are reproducible bit for bit.
VARKERN_ARGUMENTS(ModulatedLayerNormBackward,
  const void* grad_out;  // (B, L, C) out_dtype, last axis contiguous
  const void* x;         // (B, L, C) x_dtype, last axis contiguous
  const void* scale;     // (B, C) cond_dtype, last axis contiguous
  const float* mean;     // (B * L)
  const float* rstd;     // (B * L)
  void* grad_x;          // (B, L, C) x_dtype, contiguous
  float* grad_scale;     // (B, C) contiguous, overwritten
  float* grad_shift;     // (B, C) contiguous, overwritten
  int64_t B, L, C;
  int64_t grad_out_stride_b, grad_out_stride_l, x_stride_b, x_stride_l, scale_stride_b;
  int x_dtype, cond_dtype, out_dtype;
)

VARKERN_MORE_ARGUMENTS(CudaModulatedLayerNormBackward, ModulatedLayerNormBackward,
  float* workspace;  // (2, B, chunks, C): partial sums of grad_scale and grad_shift
  int64_t chunks;    // of ceil(L / chunks) consecutive rows each
)

}  // namespace varkern

// 3x3 convolution.
#pragma once

#include "ops/arguments.h"

namespace varkern {

// out = conv3x3(z) + bias + residual, padded by one zero, over z = x or silu(x * multiplier + offset), which upsample then
// repeats twice along both axes. float32, channels last. out may be residual.
VARKERN_ARGUMENTS(Conv3x3,
  const float* x;           // (B, H, W, C) contiguous
  const float* weight;      // (outputs, C, 3, 3)
  const float* bias;        // (outputs), or nullptr
  const float* multiplier;  // (B, C) contiguous, or nullptr
  const float* offset;      // (B, C) contiguous, where there is a multiplier
  const float* residual;    // as out, or nullptr
  float* out;               // (B, H, W, outputs) contiguous; with upsample (B, 2H, 2W, outputs)
  int64_t B, H, W, C, outputs;
  int64_t weight_stride_o, weight_stride_c, weight_stride_h, weight_stride_w;
  bool upsample;
)

}  // namespace varkern

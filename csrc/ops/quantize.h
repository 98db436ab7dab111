// The multi-scale residual quantizer.
#pragma once

#include "ops/arguments.h"

namespace varkern {

// The maps of the quantizer. Scale k adds h_k = phi(up(e[index])) to f_hat, where up is bicubic to (H, W), or nothing
// where the map has that size, and phi(x) = (1 - ratio) * x + ratio * conv3x3(x). float32.
VARKERN_ARGUMENTS(ResidualMaps,
  const float* codebook;    // (V, Cv) contiguous
  const float* phi_weight;  // (num_phis, Cv, Cv, 3, 3) contiguous
  const float* phi_bias;    // (num_phis, Cv) contiguous
  const int64_t* scales;    // (K, 3): height and width of each map, and its phi
  int64_t num_phis, B, V, Cv, H, W, K;  // num_phis = 0: phi is the identity
  float ratio;
)

// For each scale: area-downsample the residual, choose the nearest code of each position (the first of equals), add.
VARKERN_MORE_ARGUMENTS(ResidualQuantize, ResidualMaps,
  const float* features;  // (B, Cv, H, W), any strides
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t* indices;  // (B, sum of h_k * w_k)
  float* f_hats;     // (K or 1, B, Cv, H, W): after each scale, or after the last
  bool cosine, all_f_hats;
)

// The same sum from given indices. With inputs, scales has a line more: (K + 1, 3).
VARKERN_MORE_ARGUMENTS(ResidualDequantize, ResidualMaps,
  const int64_t* indices;  // (B, sum of h_k * w_k over K scales), rows index_stride apart, each in [0, V)
  int64_t index_stride;
  float* f_hats;  // (K, B, Cv, H, W) or nullptr
  float* inputs;  // (B, sum of h_k * w_k over scales 2 to K + 1, Cv): f_hat, area-downsampled; or nullptr
)

// With g_k = sum over j >= k of grad_f_hats[j], the gradient of h_k: through phi and up to weights, biases and codes.
// Sums are taken in an order fixed by the shapes alone.
VARKERN_MORE_ARGUMENTS(ResidualQuantizeBackward, ResidualMaps,
  const int64_t* indices;    // (B, sum of h_k * w_k)
  const float* grad_f_hats;  // (K, B, Cv, H, W) contiguous
  float* grad_codebook;      // (V, Cv), overwritten
  float* grad_phi_weight;    // (num_phis, Cv, Cv, 3, 3), overwritten
  float* grad_phi_bias;      // (num_phis, Cv), overwritten
)

// One step of generation: f_hat += phi(up(codes)), then its area-downsampling to the following size.
VARKERN_ARGUMENTS(NextScaleInput,
  float* f_hat;        // (B, Cv, H, W) contiguous, in place
  const float* codes;  // (B, Cv, h, w), any strides
  int64_t stride_b, stride_c, stride_h, stride_w;
  const float* phi_weight;  // (Cv, Cv, 3, 3) contiguous, or nullptr for the identity
  const float* phi_bias;    // (Cv)
  float* next;              // (B, Cv, next_h, next_w), or nullptr after the last scale
  int64_t B, Cv, H, W, h, w, next_h, next_w;
  float ratio;
)

}  // namespace varkern

// Attention over the keys and values of earlier scales, in generation.
#pragma once

#include "ops/arguments.h"

namespace varkern {

// The attention of one scale of a generation: its n tokens see those before them and each other. q', k' and v' are
// those of BlockCausalAttention, k' and v' of earlier scales are in the cache, and those of the n tokens are put there.
VARKERN_ARGUMENTS(CachedAttention,
  const void* qkv;        // (B, n, 3, H, D) dtype, last axis contiguous; CUDA: every row aligned to 16 bytes
  const void* q_bias;     // (H, D) Real, or nullptr
  const void* v_bias;     // (H, D) Real, or nullptr
  const void* log_scale;  // (H) Real, or nullptr
  void* cache;            // (2, B, H, N, D) dtype, contiguous: k' and v', overwritten at [position, position + n)
  void* q;                // (B, H, n, D) dtype, contiguous: scratch for q'
  void* out;              // (B, n, H, D) dtype, contiguous
  int64_t B, n, H, D, N, position;
  int64_t stride_b, stride_n, stride_part, stride_h;  // of qkv
  int dtype;
  double softmax_scale;
)

// D is 32, 64 or 128.
VARKERN_MORE_ARGUMENTS(CudaCachedAttention, CachedAttention,
  float* workspace;  // (splits, B * H * n, D + 2), or nullptr for one split
  int64_t splits;    // parts into which the keys are cut where there are too few queries for the device; what they add
                     // up depends on it
)

}  // namespace varkern

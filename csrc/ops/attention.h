// Block-causal attention.
#pragma once

#include "ops/arguments.h"

namespace varkern {

constexpr double kMaxLogScale = 4.605170185988092;  // log 100

// Rows of D contiguous elements, (B, H, L, D), rows anywhere. A member q of this type makes the arguments q,
// q_stride_b, q_stride_h and q_stride_l.
VARKERN_ARGUMENTS(HeadRows,
  void* data;
  int64_t stride_b, stride_h, stride_l;
)

// Attention in which position i of scale k sees every position of the scales up to k. With x = q + q_bias:
//   q' = x * softmax_scale, or with log_scale x / |x| * exp(min(log_scale, kMaxLogScale)) * softmax_scale
//   k' = k, or with log_scale k / |k|;  v' = v + v_bias;  out = softmax over the visible j of (q'_i . k'_j), times v'_j
// Norms are at least 1e-12. Real is double where dtype is float64, else float; all arithmetic is Real.
VARKERN_ARGUMENTS(BlockCausalAttention,
  HeadRows q, k, v;        // dtype
  const void* q_bias;      // (H, D) Real, or nullptr
  const void* v_bias;      // (H, D) Real, or nullptr
  const void* log_scale;   // (H) Real, or nullptr
  const int64_t* lengths;  // (K): positions of each scale, L together
  int64_t K, B, H, L, D;
  int64_t queries;  // the last positions, whole scales, that q, out and the sums have rows of: L in training
  int dtype;
  double softmax_scale;
)

VARKERN_MORE_ARGUMENTS(BlockCausalAttentionForward, BlockCausalAttention,
  HeadRows out;   // dtype
  void* largest;  // (B, H, queries) Real: the largest q'_i . k'_j; or nullptr
  void* total;    // (B, H, queries) Real: the sum of exp(q'_i . k'_j - largest); or nullptr
)

// Gradients of q, k and v as given, before the biases and norms; sums are taken in an order fixed by the shapes alone.
VARKERN_MORE_ARGUMENTS(BlockCausalAttentionBackward, BlockCausalAttention,
  HeadRows grad_out, out;  // dtype
  const void* largest;     // (B, H, L) Real
  const void* total;       // (B, H, L) Real
  HeadRows grad_q, grad_k, grad_v;  // dtype, overwritten
  void* grad_q_bias;     // (B, H, D) Real, a batch element's share, or nullptr
  void* grad_v_bias;     // (B, H, D) Real, or nullptr
  void* grad_log_scale;  // (B, H) Real, or nullptr
)

}  // namespace varkern

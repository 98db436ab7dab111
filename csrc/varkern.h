// Every launch of the compiled library: what it reads, what it writes, and the shapes.
//
// Pointers are raw, strides are in elements, sizes are 64-bit. A launch returns nullptr, or one
// static sentence that says what went wrong. Nothing here owns memory and nothing here knows torch.
#pragma once

#include <stdint.h>

namespace varkern {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };  // float64: attention alone

// y = (x - mean(x)) * rstd(x) * (1 + scale) + shift over the last axis; arithmetic in float32.
struct ModulatedLayerNormForward {
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
};

// With h = (x - mean) * rstd and d = grad_out * (1 + scale):
// grad_x = rstd * (d - mean(d) - h * mean(d * h)), grad_scale = sum_L grad_out * h, grad_shift = sum_L grad_out.
// The sums over L are taken in an order fixed by the shape alone, so results are reproducible bit for bit.
struct ModulatedLayerNormBackward {
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
};

// Group normalisation over the channels of a group and all P pixels, as one multiplication and addition a channel:
//   multiplier = rstd * weight, offset = bias - (mean - centre) * multiplier, out = (x - centre) * multiplier + offset
// Sums are taken in an order fixed by the shapes alone.
struct GroupNorm {
  const void* x;        // (B, C, P) dtype, contiguous; with channels_last (B, P, C)
  const float* weight;  // (C)
  const float* bias;    // (C)
  void* out;            // as x, times its sigmoid where silu; or nullptr: only the coefficients, with centre = 0
  float* coefficients;  // (3, B, C): multiplier, offset, centre, the rounded mean; without out (2, B, C)
  int64_t B, C, P, groups;
  int dtype;
  bool channels_last, silu;
  double eps;
};

// The maps of a multi-scale residual quantizer. Scale k adds h_k = phi(up(e[index])) to f_hat, where up is bicubic to
// (H, W), or nothing where the map has that size, and phi(x) = (1 - ratio) * x + ratio * conv3x3(x). float32.
struct ResidualMaps {
  const float* codebook;    // (V, Cv) contiguous
  const float* phi_weight;  // (num_phis, Cv, Cv, 3, 3) contiguous
  const float* phi_bias;    // (num_phis, Cv) contiguous
  const int64_t* scales;    // (K, 3): height and width of each map, and its phi
  int64_t num_phis, B, V, Cv, H, W, K;  // num_phis = 0: phi is the identity
  float ratio;
};

// For each scale: area-downsample the residual, choose the nearest code of each position (the first of equals), add.
struct ResidualQuantize {
  ResidualMaps maps;
  const float* features;  // (B, Cv, H, W), any strides
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t* indices;  // (B, sum of h_k * w_k)
  float* f_hats;     // (K or 1, B, Cv, H, W): after each scale, or after the last
  bool cosine, all_f_hats;
};

// The same sum from given indices.
struct ResidualDequantize {
  ResidualMaps maps;       // with inputs, maps.scales has a line more: (K + 1, 3)
  const int64_t* indices;  // (B, sum of h_k * w_k over K scales), rows index_stride apart, each in [0, V)
  int64_t index_stride;
  float* f_hats;  // (K, B, Cv, H, W) or nullptr
  float* inputs;  // (B, sum of h_k * w_k over scales 2 to K + 1, Cv): f_hat, area-downsampled; or nullptr
};

// With g_k = sum over j >= k of grad_f_hats[j], the gradient of h_k: through phi and up to weights, biases and codes.
// Sums are taken in an order fixed by the shapes alone.
struct ResidualQuantizeBackward {
  ResidualMaps maps;
  const int64_t* indices;    // (B, sum of h_k * w_k)
  const float* grad_f_hats;  // (K, B, Cv, H, W) contiguous
  float* grad_codebook;      // (V, Cv), overwritten
  float* grad_phi_weight;    // (num_phis, Cv, Cv, 3, 3), overwritten
  float* grad_phi_bias;      // (num_phis, Cv), overwritten
};

// One step of generation: f_hat += phi(up(codes)), then its area-downsampling to the following size.
struct NextScaleInput {
  float* f_hat;        // (B, Cv, H, W) contiguous, in place
  const float* codes;  // (B, Cv, h, w), any strides
  int64_t stride_b, stride_c, stride_h, stride_w;
  const float* phi_weight;  // (Cv, Cv, 3, 3) contiguous, or nullptr for the identity
  const float* phi_bias;    // (Cv)
  float* next;              // (B, Cv, next_h, next_w), or nullptr after the last scale
  int64_t B, Cv, H, W, h, w, next_h, next_w;
  float ratio;
};

// Rows of D contiguous elements, (B, H, L, D), rows anywhere.
struct HeadRows {
  void* data;
  int64_t stride_b, stride_h, stride_l;
};

constexpr double kMaxLogScale = 4.605170185988092;  // log 100

// Attention in which position i of scale k sees every position of the scales up to k. With x = q + q_bias:
//   q' = x * softmax_scale, or with log_scale x / |x| * exp(min(log_scale, kMaxLogScale)) * softmax_scale
//   k' = k, or with log_scale k / |k|;  v' = v + v_bias;  out = softmax over the visible j of (q'_i . k'_j), times v'_j
// Norms are at least 1e-12. Real is double where dtype is float64, else float; all arithmetic is Real.
struct BlockCausalAttention {
  HeadRows q, k, v;        // dtype
  const void *q_bias;      // (H, D) Real, or nullptr
  const void *v_bias;      // (H, D) Real, or nullptr
  const void* log_scale;   // (H) Real, or nullptr
  const int64_t* lengths;  // (K): positions of each scale, L together
  int64_t K, B, H, L, D;
  int64_t queries;  // the last positions, whole scales, that q, out and the sums have rows of: L in training
  int dtype;
  double softmax_scale;
};

struct BlockCausalAttentionForward {
  BlockCausalAttention args;
  HeadRows out;   // dtype
  void* largest;  // (B, H, queries) Real: the largest q'_i . k'_j; or nullptr
  void* total;    // (B, H, queries) Real: the sum of exp(q'_i . k'_j - largest); or nullptr
};

// Gradients of q, k and v as given, before the biases and norms; sums are taken in an order fixed by the shapes alone.
struct BlockCausalAttentionBackward {
  BlockCausalAttention args;
  HeadRows grad_out, out;  // dtype
  const void *largest, *total;  // (B, H, L) Real
  HeadRows grad_q, grad_k, grad_v;  // dtype, overwritten
  void *grad_q_bias;     // (B, H, D) Real, a batch element's share, or nullptr
  void *grad_v_bias;     // (B, H, D) Real, or nullptr
  void* grad_log_scale;  // (B, H) Real, or nullptr
};

// The attention of one scale of a generation: its n tokens see those before them and each other. q', k' and v' are
// those of BlockCausalAttention, k' and v' of earlier scales are in the cache, and those of the n tokens are put there.
struct CachedAttention {
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
};

// out = conv3x3(z) + bias + residual, padded by one zero, over z = x or silu(x * multiplier + offset), which upsample then
// repeats twice along both axes. float32, channels last. out may be residual.
struct Conv3x3 {
  const float* x;           // (B, H, W, C) contiguous
  const float* weight;      // (outputs, C, 3, 3)
  const float* bias;        // (outputs), or nullptr
  const float* multiplier;  // (B, C) contiguous, or nullptr
  const float* offset;      // (B, C) contiguous, where there is a multiplier
  const float* residual;    // as out, or nullptr
  float* out;               // (B, H, W, outputs) contiguous; with upsample (B, 2H, 2W, outputs)
  int64_t B, H, W, C, outputs;
  int64_t weight_stride[4];
  bool upsample;
};

// What the CPU writes instead of a token: PyTorch's rounding decides; NaN, +inf, or nothing but -inf in the row.
enum : int64_t { kUndecided = -1, kNoDistribution = -2 };

// One token a row: argmax of p / noise, p the softmax of the guided logits that top-k and top-p keep. float32.
struct SampleTokens {
  const void* logits;  // (B, n, V) dtype, last axis contiguous; guided: (2B, n, V), conditional rows first
  const float* noise;  // (B * n, V) contiguous, positive
  int64_t* tokens;     // (B * n)
  int64_t* status;     // (2): how many rows are undecided and without distribution; not on CUDA, where none is
  int64_t B, n, V, stride_b, stride_n, top_k;  // top_k = 0: off
  double guidance, top_p;                      // guided: (1 + guidance) * cond - guidance * uncond; top_p = 0: off
  int dtype;
  bool guided;
};

// The guided logits of the same rows, -inf where top-k and top-p exclude them. float32.
struct FilterLogits {
  const void* logits;  // as in SampleTokens, and so are the others
  float* out;          // (B, n, V) contiguous; undecided rows are not written
  bool* undecided;     // (B * n): PyTorch's rounding decides what is excluded, or the row has no distribution
  int64_t B, n, V, stride_b, stride_n, top_k;
  double guidance, top_p;
  int dtype;
  bool guided;
};

namespace cpu {
#define VARKERN_CPU_OP(name, Args) const char* name(const Args& args);
#include "cpu/ops.def"
#undef VARKERN_CPU_OP

// What cpuid offers and VARKERN_SIMD allows, decided at the first call: "baseline", "avx2" or "avx512".
// Throws std::runtime_error when VARKERN_SIMD holds anything else.
const char* simd_level();
}  // namespace cpu

namespace cuda {
const char* modulated_layer_norm_forward(const ModulatedLayerNormForward& args, void* stream);

// workspace: (2, B, chunks, C) float32, the partial sums of grad_scale and grad_shift over ceil(L / chunks)
// consecutive rows each.
const char* modulated_layer_norm_backward(const ModulatedLayerNormBackward& args, float* workspace, int64_t chunks,
                                          void* stream);

// D is 32, 64 or 128. splits: parts into which the keys are cut where there are too few queries for the device; what
// they add up depends on it. workspace: (splits, B * H * n, D + 2) float32, or nullptr for one split.
const char* cached_attention(const CachedAttention& args, float* workspace, int64_t splits, void* stream);

// A row without distribution gives token 0. Equal logits at the border of top-p stay from the last index down.
const char* sample_tokens(const SampleTokens& args, void* stream);

// CUDA version the installed driver supports (13000 = 13.0); 0 without a driver.
int driver_version();
}  // namespace cuda

}  // namespace varkern

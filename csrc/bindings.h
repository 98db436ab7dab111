// What the two modules share: the argument list of every operation, and the casts from Python integers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdint.h>

#include <array>
#include <stdexcept>

#include "varkern.h"

namespace varkern::bindings {

// tensor.data_ptr() or a stream handle.
struct Pointer {
  uintptr_t value;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

inline ModulatedLayerNormForward modulated_layer_norm_forward(
    uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t out, uintptr_t mean, uintptr_t rstd, int64_t B, int64_t L,
    int64_t C, int64_t x_stride_b, int64_t x_stride_l, int64_t scale_stride_b, int64_t shift_stride_b, int x_dtype,
    int cond_dtype, int out_dtype, float eps) {
  return {Pointer{x},    Pointer{scale}, Pointer{shift}, Pointer{out},   Pointer{mean}, Pointer{rstd},
          B,             L,              C,              x_stride_b,     x_stride_l,    scale_stride_b,
          shift_stride_b, x_dtype,       cond_dtype,     out_dtype,      eps};
}

constexpr const char* kModulatedLayerNormForward =
    "modulated_layer_norm_forward(x, scale, shift, out, mean, rstd, B, L, C, x_stride_b, x_stride_l, scale_stride_b, "
    "shift_stride_b, x_dtype, cond_dtype, out_dtype, eps)\n\n"
    "x (B, L, C) strided, scale and shift (B, C) strided over B, out (B, L, C) contiguous,\n"
    "mean and rstd (B * L) float32 or 0 = do not store.";

inline ModulatedLayerNormBackward modulated_layer_norm_backward(
    uintptr_t grad_out, uintptr_t x, uintptr_t scale, uintptr_t mean, uintptr_t rstd, uintptr_t grad_x,
    uintptr_t grad_scale, uintptr_t grad_shift, int64_t B, int64_t L, int64_t C, int64_t grad_out_stride_b,
    int64_t grad_out_stride_l, int64_t x_stride_b, int64_t x_stride_l, int64_t scale_stride_b, int x_dtype,
    int cond_dtype, int out_dtype) {
  return {Pointer{grad_out},   Pointer{x},          Pointer{scale},
          Pointer{mean},       Pointer{rstd},       Pointer{grad_x},
          Pointer{grad_scale}, Pointer{grad_shift}, B,
          L,                   C,                   grad_out_stride_b,
          grad_out_stride_l,   x_stride_b,          x_stride_l,
          scale_stride_b,      x_dtype,             cond_dtype,
          out_dtype};
}

constexpr const char* kModulatedLayerNormBackward =
    "modulated_layer_norm_backward(grad_out, x, scale, mean, rstd, grad_x, grad_scale, grad_shift, B, L, C, "
    "grad_out_stride_b, grad_out_stride_l, x_stride_b, x_stride_l, scale_stride_b, x_dtype, cond_dtype, out_dtype)\n\n"
    "grad_out (B, L, C) strided, grad_x (B, L, C) contiguous, grad_scale and grad_shift (B, C) float32, overwritten.";

inline GroupNorm group_norm(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, uintptr_t coefficients,
                            int64_t B, int64_t C, int64_t P, int64_t groups, int dtype, bool channels_last, bool silu,
                            double eps) {
  return {Pointer{x}, Pointer{weight}, Pointer{bias}, Pointer{out},  Pointer{coefficients}, B, C, P,
          groups,     dtype,           channels_last, silu,          eps};
}

constexpr const char* kGroupNorm =
    "group_norm(x, weight, bias, out, coefficients, B, C, P, groups, dtype, channels_last, silu, eps)\n\n"
    "x and out (B, C, P) or, channels_last, (B, P, C), contiguous; weight and bias (C) float32; coefficients\n"
    "(3, B, C) float32: multiplier, offset, centre; out 0: only the coefficients, (2, B, C), without a centre.";

inline ResidualMaps residual_maps(uintptr_t codebook, uintptr_t phi_weight, uintptr_t phi_bias, uintptr_t scales,
                                  int64_t num_phis, int64_t B, int64_t V, int64_t Cv, int64_t H, int64_t W, int64_t K,
                                  float ratio) {
  return {Pointer{codebook}, Pointer{phi_weight}, Pointer{phi_bias}, Pointer{scales}, num_phis, B, V, Cv, H, W, K,
          ratio};
}

inline ResidualQuantize residual_quantize(uintptr_t codebook, uintptr_t phi_weight, uintptr_t phi_bias,
                                          uintptr_t scales, int64_t num_phis, int64_t B, int64_t V, int64_t Cv,
                                          int64_t H, int64_t W, int64_t K, float ratio, uintptr_t features,
                                          int64_t stride_b, int64_t stride_c, int64_t stride_h, int64_t stride_w,
                                          uintptr_t indices, uintptr_t f_hats, bool cosine, bool all_f_hats) {
  return {residual_maps(codebook, phi_weight, phi_bias, scales, num_phis, B, V, Cv, H, W, K, ratio),
          Pointer{features},
          stride_b,
          stride_c,
          stride_h,
          stride_w,
          Pointer{indices},
          Pointer{f_hats},
          cosine,
          all_f_hats};
}

// The first arguments of the residual quantizer's launches, called MAPS below.
#define VARKERN_RESIDUAL_MAPS "codebook, phi_weight, phi_bias, scales, num_phis, B, V, Cv, H, W, K, ratio"

constexpr const char* kResidualQuantize =
    "residual_quantize(" VARKERN_RESIDUAL_MAPS ", features, stride_b, stride_c, stride_h, stride_w, indices, f_hats, "
    "cosine, all_f_hats)\n\n"
    "codebook (V, Cv), phi_weight (num_phis, Cv, Cv, 3, 3), phi_bias (num_phis, Cv), scales (K, 3) int64: height,\n"
    "width and phi; features (B, Cv, H, W) strided, indices (B, sum of h * w) int64, f_hats (K or 1, B, Cv, H, W).";

inline ResidualDequantize residual_dequantize(uintptr_t codebook, uintptr_t phi_weight, uintptr_t phi_bias,
                                              uintptr_t scales, int64_t num_phis, int64_t B, int64_t V, int64_t Cv,
                                              int64_t H, int64_t W, int64_t K, float ratio, uintptr_t indices,
                                              int64_t index_stride, uintptr_t f_hats, uintptr_t inputs) {
  return {residual_maps(codebook, phi_weight, phi_bias, scales, num_phis, B, V, Cv, H, W, K, ratio), Pointer{indices},
          index_stride, Pointer{f_hats}, Pointer{inputs}};
}

constexpr const char* kResidualDequantize =
    "residual_dequantize(" VARKERN_RESIDUAL_MAPS ", indices, index_stride, f_hats, inputs)\n\n"
    "indices (B, sum of h * w) int64 with rows index_stride apart, f_hats (K, B, Cv, H, W) or 0,\n"
    "inputs (B, sum of h * w over scales 2 to K + 1, Cv) or 0; with inputs, scales is (K + 1, 3).";

inline ResidualQuantizeBackward residual_quantize_backward(uintptr_t codebook, uintptr_t phi_weight,
                                                           uintptr_t phi_bias, uintptr_t scales, int64_t num_phis,
                                                           int64_t B, int64_t V, int64_t Cv, int64_t H, int64_t W,
                                                           int64_t K, float ratio, uintptr_t indices,
                                                           uintptr_t grad_f_hats, uintptr_t grad_codebook,
                                                           uintptr_t grad_phi_weight, uintptr_t grad_phi_bias) {
  return {residual_maps(codebook, phi_weight, phi_bias, scales, num_phis, B, V, Cv, H, W, K, ratio), Pointer{indices},
          Pointer{grad_f_hats}, Pointer{grad_codebook}, Pointer{grad_phi_weight}, Pointer{grad_phi_bias}};
}

constexpr const char* kResidualQuantizeBackward =
    "residual_quantize_backward(" VARKERN_RESIDUAL_MAPS ", indices, grad_f_hats, grad_codebook, grad_phi_weight, "
    "grad_phi_bias)\n\n"
    "indices (B, sum of h * w) int64, grad_f_hats (K, B, Cv, H, W), all contiguous; the gradients are overwritten.";

inline NextScaleInput next_scale_input(uintptr_t f_hat, uintptr_t codes, int64_t stride_b, int64_t stride_c,
                                       int64_t stride_h, int64_t stride_w, uintptr_t phi_weight, uintptr_t phi_bias,
                                       uintptr_t next, int64_t B, int64_t Cv, int64_t H, int64_t W, int64_t h,
                                       int64_t w, int64_t next_h, int64_t next_w, float ratio) {
  return {Pointer{f_hat}, Pointer{codes}, stride_b, stride_c, stride_h, stride_w, Pointer{phi_weight},
          Pointer{phi_bias}, Pointer{next}, B, Cv, H, W, h, w, next_h, next_w, ratio};
}

constexpr const char* kNextScaleInput =
    "next_scale_input(f_hat, codes, stride_b, stride_c, stride_h, stride_w, phi_weight, phi_bias, next, B, Cv, H, W, "
    "h, w, next_h, next_w, ratio)\n\n"
    "f_hat (B, Cv, H, W) contiguous, changed in place; codes (B, Cv, h, w) strided; phi_weight (Cv, Cv, 3, 3) or 0,\n"
    "phi_bias (Cv); next (B, Cv, next_h, next_w) or 0.";

#undef VARKERN_RESIDUAL_MAPS

// data_ptr and the strides of B, H and L.
typedef std::array<int64_t, 4> Rows;
inline HeadRows head_rows(const Rows& rows) { return {Pointer{uintptr_t(rows[0])}, rows[1], rows[2], rows[3]}; }

inline BlockCausalAttention block_causal_attention(const Rows& q, const Rows& k, const Rows& v, uintptr_t q_bias,
                                                   uintptr_t v_bias, uintptr_t log_scale, uintptr_t lengths, int64_t K,
                                                   int64_t B, int64_t H, int64_t L, int64_t D, int dtype,
                                                   double softmax_scale) {
  return {head_rows(q), head_rows(k), head_rows(v), Pointer{q_bias}, Pointer{v_bias}, Pointer{log_scale},
          Pointer{lengths}, K, B, H, L, D, L, dtype, softmax_scale};
}

inline BlockCausalAttentionForward block_causal_attention_forward(
    const Rows& q, const Rows& k, const Rows& v, uintptr_t q_bias, uintptr_t v_bias, uintptr_t log_scale,
    uintptr_t lengths, int64_t K, int64_t B, int64_t H, int64_t L, int64_t D, int dtype, double softmax_scale,
    const Rows& out, uintptr_t largest, uintptr_t total) {
  return {block_causal_attention(q, k, v, q_bias, v_bias, log_scale, lengths, K, B, H, L, D, dtype, softmax_scale),
          head_rows(out), Pointer{largest}, Pointer{total}};
}

// The first arguments of the launches of block-causal attention.
#define VARKERN_ATTENTION \
  "q, k, v, q_bias, v_bias, log_scale, lengths, K, B, H, L, D, dtype, softmax_scale"
#define VARKERN_ATTENTION_SHAPES                                                                                    \
  "q, k, v, out and their gradients are (data_ptr, stride_b, stride_h, stride_l) of (B, H, L, D); q_bias and v_bias\n" \
  "(H, D), log_scale (H), largest and total (B, H, L) and the gradients of biases (B, H, D) and log_scale (B, H) are\n" \
  "float64 where dtype is 3, else float32, contiguous, 0 for none; lengths (K) int64."

constexpr const char* kBlockCausalAttentionForward =
    "block_causal_attention_forward(" VARKERN_ATTENTION ", out, largest, total)\n\n" VARKERN_ATTENTION_SHAPES;

inline BlockCausalAttentionBackward block_causal_attention_backward(
    const Rows& q, const Rows& k, const Rows& v, uintptr_t q_bias, uintptr_t v_bias, uintptr_t log_scale,
    uintptr_t lengths, int64_t K, int64_t B, int64_t H, int64_t L, int64_t D, int dtype, double softmax_scale,
    const Rows& grad_out, const Rows& out, uintptr_t largest, uintptr_t total, const Rows& grad_q, const Rows& grad_k,
    const Rows& grad_v, uintptr_t grad_q_bias, uintptr_t grad_v_bias, uintptr_t grad_log_scale) {
  return {block_causal_attention(q, k, v, q_bias, v_bias, log_scale, lengths, K, B, H, L, D, dtype, softmax_scale),
          head_rows(grad_out),
          head_rows(out),
          Pointer{largest},
          Pointer{total},
          head_rows(grad_q),
          head_rows(grad_k),
          head_rows(grad_v),
          Pointer{grad_q_bias},
          Pointer{grad_v_bias},
          Pointer{grad_log_scale}};
}

constexpr const char* kBlockCausalAttentionBackward =
    "block_causal_attention_backward(" VARKERN_ATTENTION ", grad_out, out, largest, total, grad_q, grad_k, grad_v, "
    "grad_q_bias, grad_v_bias, grad_log_scale)\n\n" VARKERN_ATTENTION_SHAPES;

#undef VARKERN_ATTENTION
#undef VARKERN_ATTENTION_SHAPES

inline CachedAttention cached_attention(uintptr_t qkv, uintptr_t q_bias, uintptr_t v_bias, uintptr_t log_scale,
                                        uintptr_t cache, uintptr_t q, uintptr_t out, int64_t B, int64_t n, int64_t H,
                                        int64_t D, int64_t N, int64_t position, int64_t stride_b, int64_t stride_n,
                                        int64_t stride_part, int64_t stride_h, int dtype, double softmax_scale) {
  return {Pointer{qkv}, Pointer{q_bias}, Pointer{v_bias}, Pointer{log_scale}, Pointer{cache}, Pointer{q},  Pointer{out},
          B,            n,               H,               D,                  N,              position,    stride_b,
          stride_n,     stride_part,     stride_h,        dtype,              softmax_scale};
}

constexpr const char* kCachedAttention =
    "cached_attention(qkv, q_bias, v_bias, log_scale, cache, q, out, B, n, H, D, N, position, stride_b, stride_n, "
    "stride_part, stride_h, dtype, softmax_scale)\n\n"
    "qkv (B, n, 3, H, D) strided, q_bias and v_bias (H, D) and log_scale (H) float32 (float64 where dtype is 3) or 0,\n"
    "cache (2, B, H, N, D), q (B, H, n, D) scratch, out (B, n, H, D). On CUDA then a workspace, splits and the stream:\n"
    "(splits, B * H * n, D + 2) float32, or 0 for one split.";

inline Conv3x3 conv3x3(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t multiplier, uintptr_t offset,
                       uintptr_t residual, uintptr_t out, int64_t B, int64_t H, int64_t W, int64_t C, int64_t outputs,
                       std::array<int64_t, 4> weight_stride, bool upsample) {
  return {Pointer{x},        Pointer{weight},
          Pointer{bias},     Pointer{multiplier},
          Pointer{offset},   Pointer{residual},
          Pointer{out},      B,
          H,                 W,
          C,                 outputs,
          {weight_stride[0], weight_stride[1], weight_stride[2], weight_stride[3]},
          upsample};
}

constexpr const char* kConv3x3 =
    "conv3x3(x, weight, bias, multiplier, offset, residual, out, B, H, W, C, outputs, weight_stride, upsample)\n\n"
    "x (B, H, W, C), weight (outputs, C, 3, 3) strided, bias (outputs) or 0, multiplier and offset (B, C) or 0, residual\n"
    "like out or 0, out (B, H, W, outputs) or, with upsample, (B, 2H, 2W, outputs). float32.";

inline SampleTokens sample_tokens(uintptr_t logits, uintptr_t noise, uintptr_t tokens, uintptr_t status, int64_t B,
                                  int64_t n, int64_t V, int64_t stride_b, int64_t stride_n, int64_t top_k,
                                  double guidance, double top_p, int dtype, bool guided) {
  return {Pointer{logits}, Pointer{noise}, Pointer{tokens}, Pointer{status}, B,     n,      V, stride_b, stride_n,
          top_k,           guidance,       top_p,           dtype,           guided};
}

constexpr const char* kSampleTokens =
    "sample_tokens(logits, noise, tokens, status, B, n, V, stride_b, stride_n, top_k, guidance, top_p, dtype, "
    "guided)\n\n"
    "logits (B, n, V) strided or, guided, (2B, n, V); noise (B * n, V) float32, tokens (B * n) int64, status (2)\n"
    "int64, not used on CUDA: how many tokens are -1, left to PyTorch's rounding, and -2, without distribution.";

inline FilterLogits filter_logits(uintptr_t logits, uintptr_t out, uintptr_t undecided, int64_t B, int64_t n, int64_t V,
                                  int64_t stride_b, int64_t stride_n, int64_t top_k, double guidance, double top_p,
                                  int dtype, bool guided) {
  return {Pointer{logits}, Pointer{out}, Pointer{undecided}, B, n, V, stride_b, stride_n, top_k, guidance, top_p, dtype,
          guided};
}

constexpr const char* kFilterLogits =
    "filter_logits(logits, out, undecided, B, n, V, stride_b, stride_n, top_k, guidance, top_p, dtype, guided)\n\n"
    "logits (B, n, V) strided or, guided, (2B, n, V); out (B, n, V) float32 contiguous, undecided (B * n) bool: rows\n"
    "left to PyTorch and not written.";

template <typename T>
struct FromPython {
  using type = T;
  static T cast(T value) { return value; }
};
template <typename T>
struct FromPython<T*> {
  using type = uintptr_t;
  static T* cast(uintptr_t value) { return Pointer{value}; }
};

// Binds launch under name: its Python arguments are those of make, then launch's own after the struct.
// The GIL is released while it runs, and the sentence it returns becomes a RuntimeError.
template <typename Args, typename... Parameters, typename... Extra>
void bind(pybind11::module_& m, const char* name, const char* doc, Args (*make)(Parameters...),
          const char* (*launch)(const Args&, Extra...)) {
  m.def(
      name,
      [make, launch](Parameters... parameters, typename FromPython<Extra>::type... extra) {
        const Args args = make(parameters...);
        pybind11::gil_scoped_release nogil;
        const char* error = launch(args, FromPython<Extra>::cast(extra)...);
        if (error) throw std::runtime_error(error);
      },
      doc);
}

}  // namespace varkern::bindings

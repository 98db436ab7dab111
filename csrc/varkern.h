// Every launch of the compiled library: what it reads, what it writes, and the shapes.
//
// Pointers are raw, strides are in elements, sizes are 64-bit. A launch returns nullptr, or one
// static sentence that says what went wrong. Nothing here owns memory and nothing here knows torch.
#pragma once

#include <stdint.h>

namespace varkern {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

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

// CUDA version the installed driver supports (13000 = 13.0); 0 without a driver.
int driver_version();
}  // namespace cuda

}  // namespace varkern

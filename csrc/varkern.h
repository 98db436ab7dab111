// Every launch of the compiled library. A launch reads its arguments from a struct of ops/<op>.h, which has the shapes,
// and returns nullptr, or one static sentence that says what went wrong. Nothing here owns memory, and nothing here
// knows torch.
#pragma once

#include "ops/attention.h"
#include "ops/cached_attention.h"
#include "ops/conv.h"
#include "ops/gated_norm.h"
#include "ops/group_norm.h"
#include "ops/norm.h"
#include "ops/quantize.h"
#include "ops/sampling.h"

namespace varkern {

namespace cpu {
#define VARKERN_CPU_OP(name, Args) const char* name(const Args& args);
#include "cpu/ops.def"
#undef VARKERN_CPU_OP

// What cpuid offers and VARKERN_SIMD allows, decided at the first call: "baseline", "avx2" or "avx512".
// Throws std::runtime_error when VARKERN_SIMD holds anything else.
const char* simd_level();
}  // namespace cpu

namespace cuda {
#define VARKERN_CUDA_OP(name, Args) const char* name(const Args& args, void* stream);
#include "cuda/ops.def"
#undef VARKERN_CUDA_OP

// CUDA version the installed driver supports (13000 = 13.0); 0 without a driver.
int driver_version();
}  // namespace cuda

}  // namespace varkern

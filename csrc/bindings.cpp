// The module varkern._C: argument lists, docstrings and casts.
#include "bindings.h"

#include <string.h>

#include <string>
#include <vector>

#include "build_info.h"
#ifdef _OPENMP
#include <dlfcn.h>
#include <omp.h>
#endif

namespace py = pybind11;
using namespace varkern;

namespace {

py::dict openmp() {
  py::dict result;
#ifdef _OPENMP
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info);
  result["max_threads"] = omp_get_max_threads();
  result["runtime"] = info.dli_fname ? info.dli_fname : "unknown";
#else
  result["max_threads"] = 1;
  result["runtime"] = "none (built without OpenMP)";
#endif
  return result;
}

std::vector<std::string> simd_levels() {
#ifdef VARKERN_X86_LEVELS
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::options options;
  options.disable_function_signatures();
  m.doc() =
      "varkern's CPU kernels. Pointers are integers (tensor.data_ptr()), strides count elements, dtype codes are\n"
      "0 float32, 1 float16, 2 bfloat16. Shapes, devices and dtypes are checked by varkern.ops, not here.";

  bindings::bind(m, "modulated_layer_norm_forward", bindings::kModulatedLayerNormForward,
                 bindings::modulated_layer_norm_forward, cpu::modulated_layer_norm_forward);
  bindings::bind(m, "modulated_layer_norm_backward", bindings::kModulatedLayerNormBackward,
                 bindings::modulated_layer_norm_backward, cpu::modulated_layer_norm_backward);
  bindings::bind(m, "group_norm", bindings::kGroupNorm, bindings::group_norm, cpu::group_norm);
  bindings::bind(m, "residual_quantize", bindings::kResidualQuantize, bindings::residual_quantize,
                 cpu::residual_quantize);
  bindings::bind(m, "residual_quantize_backward", bindings::kResidualQuantizeBackward,
                 bindings::residual_quantize_backward, cpu::residual_quantize_backward);
  bindings::bind(m, "residual_dequantize", bindings::kResidualDequantize, bindings::residual_dequantize,
                 cpu::residual_dequantize);
  bindings::bind(m, "next_scale_input", bindings::kNextScaleInput, bindings::next_scale_input, cpu::next_scale_input);
  bindings::bind(m, "block_causal_attention_forward", bindings::kBlockCausalAttentionForward,
                 bindings::block_causal_attention_forward, cpu::block_causal_attention_forward);
  bindings::bind(m, "block_causal_attention_backward", bindings::kBlockCausalAttentionBackward,
                 bindings::block_causal_attention_backward, cpu::block_causal_attention_backward);
  bindings::bind(m, "cached_attention", bindings::kCachedAttention, bindings::cached_attention,
                 cpu::cached_attention);
  bindings::bind(m, "conv3x3", bindings::kConv3x3, bindings::conv3x3, cpu::conv3x3);
  bindings::bind(m, "sample_tokens", bindings::kSampleTokens, bindings::sample_tokens, cpu::sample_tokens);
  bindings::bind(m, "filter_logits", bindings::kFilterLogits, bindings::filter_logits, cpu::filter_logits);

  m.def("simd_level", &cpu::simd_level,
        "simd_level() -> str\n\nWhat runs: what the processor offers, capped by the environment variable VARKERN_SIMD\n"
        "(baseline, avx2, avx512) as it was at the first call.");
  m.def("simd_levels", &simd_levels, "simd_levels() -> list[str]\n\nThe levels compiled in.");
  m.def("openmp", &openmp,
        "openmp() -> dict\n\nmax_threads: threads of the next parallel region; runtime: the file of the OpenMP runtime.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = VARKERN_COMPILER;
        info["cuda"] = VARKERN_CUDA_DECISION;
        return info;
      },
      "build_info() -> dict\n\ncompiler: name and version; cuda: what the build decided about CUDA, and why.");
}

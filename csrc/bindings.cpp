// The module varkern._C: the operations of cpu/ops.def, and questions about the build.
#include "bind.h"

#include <pybind11/stl.h>

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
      "varkern's CPU kernels. All arguments are required, by position or by name. Pointers are integers\n"
      "(tensor.data_ptr()), or 0 for none; strides count elements; dtype codes are 0 float32, 1 float16, 2 bfloat16,\n"
      "3 float64. Shapes, devices and dtypes are checked by varkern.ops, not here.";

#define VARKERN_CPU_OP(name, Args) bindings::bind<cpu::name>(m, #name, #Args);
#include "cpu/ops.def"
#undef VARKERN_CPU_OP

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

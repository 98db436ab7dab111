// The module varkern._C_cuda: argument lists, docstrings and casts.
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"
#include "build_info.h"

namespace py = pybind11;
using namespace varkern;

namespace {

// "80-real;90a-real;100" -> ["80", "90a", "100"]
std::vector<std::string> architectures() {
  std::vector<std::string> names;
  std::istringstream list(VARKERN_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ';');) names.push_back(name.substr(0, name.find('-')));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  py::options options;
  options.disable_function_signatures();
  m.doc() =
      "varkern's CUDA kernels: the functions of varkern._C with the stream (torch.cuda.Stream.cuda_stream) as last\n"
      "argument. They run on the current device. Imports without a driver; a launch then raises RuntimeError.";

  bindings::bind(m, "modulated_layer_norm_forward", bindings::kModulatedLayerNormForward,
                 bindings::modulated_layer_norm_forward, cuda::modulated_layer_norm_forward);
  bindings::bind(m, "modulated_layer_norm_backward", bindings::kModulatedLayerNormBackward,
                 bindings::modulated_layer_norm_backward, cuda::modulated_layer_norm_backward);
  bindings::bind(m, "gated_residual_layer_norm", bindings::kGatedResidualLayerNorm,
                 bindings::gated_residual_layer_norm, cuda::gated_residual_layer_norm);
  bindings::bind(m, "group_norm", bindings::kGroupNorm, bindings::group_norm, cuda::group_norm);
  bindings::bind(m, "cached_attention", bindings::kCachedAttention, bindings::cached_attention,
                 cuda::cached_attention);
  bindings::bind(m, "sample_tokens", bindings::kSampleTokens, bindings::sample_tokens, cuda::sample_tokens);

  m.def("architectures", &architectures, "architectures() -> list[str]\n\nWhat the kernels were compiled for.");
  m.def("driver_version", &cuda::driver_version,
        "driver_version() -> int\n\nThe CUDA version the driver supports, 13000 for 13.0; 0 without a driver.");
}

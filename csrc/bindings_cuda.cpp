// The module varkern._C_cuda: the operations of cuda/ops.def, and questions about the build.
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bind.h"
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
      "varkern's CUDA kernels: functions of varkern._C, some with more arguments, and the stream as the last\n"
      "(torch.cuda.Stream.cuda_stream). They run on the current device. Imports without a driver; a launch then raises RuntimeError.";

#define VARKERN_CUDA_OP(name, Args) bindings::bind<cuda::name>(m, #name, #Args);
#include "cuda/ops.def"
#undef VARKERN_CUDA_OP

  m.def("architectures", &architectures, "architectures() -> list[str]\n\nWhat the kernels were compiled for.");
  m.def("driver_version", &cuda::driver_version,
        "driver_version() -> int\n\nThe CUDA version the driver supports, 13000 for 13.0; 0 without a driver.");
}

// Questions about the machine that need the CUDA runtime but no device.
#include <cuda_runtime.h>

#include "varkern.h"

namespace varkern::cuda {

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace varkern::cuda

// The one place where kernels are launched, so that a compiler without CUDA needs only another version of this file.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace varkern {

// cudaGetLastError as a sentence, or nullptr.
inline const char* last_cuda_error() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return nullptr;
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess && version == 0) return "no CUDA driver is installed on this machine";
  return cudaGetErrorString(error);
}

// Kernels stride over the grid, so a grid cut at its limit still does all the work.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  const unsigned grid = unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  kernel<<<grid, unsigned(threads), 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return last_cuda_error();
}

}  // namespace varkern

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

// Kernels stride over the grid, so a grid cut at its limit still does all the work. shared_bytes: dynamic shared memory
// of a block, up to the device's opt-in limit (163 KiB on sm_80, 227 KiB on sm_90).
template <typename... Parameters, typename... Arguments>
const char* launch_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                          void* stream, Arguments... arguments) {
  constexpr int64_t kMaxBlocks = 0x7fffffff, kSharedWithoutAsking = 48 * 1024;
  if (shared_bytes > kSharedWithoutAsking &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)) != cudaSuccess) {
    return last_cuda_error();
  }
  const unsigned grid = unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  kernel<<<grid, unsigned(threads), size_t(shared_bytes), static_cast<cudaStream_t>(stream)>>>(arguments...);
  return last_cuda_error();
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  return launch_shared(kernel, blocks, threads, 0, stream, arguments...);
}

// The block's dynamic shared memory, aligned to 128 bytes. Uninitialised.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

}  // namespace varkern

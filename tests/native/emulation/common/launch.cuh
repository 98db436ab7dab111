// Takes the place of csrc/common/launch.cuh: runs the whole grid before it returns.
#pragma once

#include <cuda_runtime.h>

namespace varkern {

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*, Arguments... arguments) {
  // A short grid, so that the kernels' loops over it are exercised too.
  const unsigned grid = unsigned(blocks < 3 ? blocks : 3);
  if (blocks < 1 || threads < 32 || threads > 1024 || threads % 32) return "invalid configuration argument";
  emulation::Block block(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      emulation::block = &block;
      threadIdx = {unsigned(t)}, blockDim = {unsigned(threads)}, gridDim = {grid};
      for (unsigned b = 0; b < grid; ++b) {
        blockIdx = {b};
        kernel(arguments...);
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  return nullptr;
}

}  // namespace varkern

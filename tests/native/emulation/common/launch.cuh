// Takes the place of csrc/common/launch.cuh: runs the whole grid before it returns.
#pragma once

#include <cuda_runtime.h>

#include "common/ptx.cuh"

namespace varkern {

template <typename... Parameters, typename... Arguments>
const char* launch_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void*,
                          Arguments... arguments) {
  constexpr int64_t kMaxSharedBytes = 227 * 1024;  // of sm_90
  if (blocks < 1 || threads < 1 || threads > int(emulation::kMaxThreads)) return "invalid configuration argument";
  if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) return "invalid argument";
  if (threads % int(emulation::kWarpSize)) return "the emulation runs whole warps only";
  const auto body = [=] {
    kernel(arguments...);
    emulation::self().copies.clear();
  };
  // A short grid, so that the kernels' loops over it are exercised too.
  emulation::run(
      unsigned(blocks < 3 ? blocks : 3), unsigned(threads), size_t(shared_bytes),
      [](const void* p) { (*static_cast<decltype(&body)>(p))(); }, &body);
  return nullptr;
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  return launch_shared(kernel, blocks, threads, 0, stream, arguments...);
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared());
}

}  // namespace varkern

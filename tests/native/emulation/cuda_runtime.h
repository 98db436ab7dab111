// CUDA's language for a plain C++20 compiler, so that csrc/cuda/*.cu runs, and runs under sanitizers, without a device.
//
// Every CUDA thread is an operating-system thread; the threads of one block run together and blocks run one after
// another, so __shared__ variables are static ones. __syncthreads is a barrier of the block, a shuffle a slot for each
// lane between two barriers of the warp (all 32 lanes must take part).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Warp {
  std::barrier<> barrier{32};
  uint64_t slots[32];
};

struct Block {
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  explicit Block(int threads) : barrier(threads) {
    for (int i = 0; i < threads; i += 32) warps.push_back(std::make_unique<Warp>());
  }
};

inline thread_local Block* block = nullptr;

}  // namespace emulation

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) __builtin_trap();
  emulation::Warp& warp = *emulation::block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  memcpy(&warp.slots[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  memcpy(&value, &warp.slots[lane ^ unsigned(lane_mask)], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}

enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }

// Kernels with one planted fault each, and without it: ./faults NAME 0|1. test_emulation.py says which tool must see it.
#include <string>

#include "check.h"
#include "common/launch.cuh"

namespace varkern {

constexpr int kThreads = 64;

// --- AddressSanitizer and UBSan.
__global__ void global_overflow(float* global, bool fault) { global[threadIdx.x + fault] = 1.0f; }

__global__ void shared_overflow(float* global, bool fault) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  const float* next = values + threadIdx.x;
  global[threadIdx.x] = next[fault];
}

__global__ void dynamic_shared_overflow(float* global, bool fault) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x + fault] = 1.0f;
  __syncthreads();
  global[threadIdx.x] = values[threadIdx.x];
}

__global__ void local_overflow(float* global, bool fault) {
  float values[4] = {};
  float* p = values;
  __syncthreads();  // the fiber has been left and entered
  p[3 + fault] = 1.0f;
  global[threadIdx.x] = p[3];
}

__global__ void misaligned_vector(float* global, bool fault) {
  if (threadIdx.x == 0) *reinterpret_cast<float2*>(global + fault) = make_float2(1.0f, 2.0f);
}

// --- ThreadSanitizer.
__global__ void missing_syncthreads(float* global, bool fault) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1.0f;
  if (!fault) __syncthreads();
  global[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// The barrier before the loop's next turn overwrites what slow threads still read.
__global__ void missing_second_syncthreads(float* global, bool fault) {
  __shared__ float value;
  for (int turn = 0; turn < 3; ++turn) {
    if (threadIdx.x == 0) value = float(turn);
    __syncthreads();
    global[threadIdx.x] = value;
    if (!fault) __syncthreads();
  }
}

// A shuffle makes the lanes wait, but orders no memory.
__global__ void missing_syncwarp(float* global, bool fault) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1.0f;
  const unsigned other = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
  if (!fault) __syncwarp();
  global[threadIdx.x] = values[other];
}

// What a warp's barrier orders, another warp does not see.
__global__ void syncwarp_across_warps(float* global, bool fault) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1.0f;
  __syncwarp();
  if (!fault) __syncthreads();
  global[threadIdx.x] = values[threadIdx.x ^ 32];
}

__global__ void plain_add(float* global, bool fault) {
  if (fault) {
    global[0] += 1.0f;
  } else {
    atomicAdd(global, 1.0f);
  }
}

__global__ void copy_over_readers(float* global, bool fault) {
  __shared__ __align__(16) float values[4 * kThreads];
  const unsigned own = 4 * threadIdx.x, other = own ^ 128;
  cp_async(values + own, global + own);
  cp_async_commit(), cp_async_wait<0>();
  __syncthreads();
  const float seen = values[other];
  if (!fault) __syncthreads();
  cp_async(values + own, global + own);
  cp_async_commit(), cp_async_wait<0>();
  __syncthreads();
  global[own] = seen;
}

// --- The emulation itself.
__global__ void unfinished_copy(float* global, bool fault) {
  __shared__ __align__(16) float values[4 * kThreads];
  const unsigned own = 4 * threadIdx.x;
  cp_async(values + own, global + own);
  cp_async_commit();
  if (!fault) cp_async_wait<0>();
  emulation::require(values[own] == 0.0f, "the copy has not landed");
}

__global__ void early_return(float* global, bool fault) {
  if (fault && threadIdx.x == 5) return;
  __syncthreads();
  global[threadIdx.x] = 1.0f;
}

__global__ void divergent_barrier(float* global, bool fault) {
  if (!fault || threadIdx.x % 2) __syncthreads();
  __syncwarp();
  global[threadIdx.x] = 1.0f;
}

__global__ void divergent_operations(float*, bool fault) {
  if (fault && threadIdx.x == 5) {
    __ballot_sync(0xffffffffu, 1);
  } else {
    __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}

__global__ void partial_mask(float*, bool fault) { __shfl_sync(fault ? 0xffffu : 0xffffffffu, 1, 0); }

int run(const std::string& name, bool fault) {
  check::Buffer<float> global(name == "copy_over_readers" || name == "unfinished_copy" ? 4 * kThreads : kThreads);
  for (int64_t i = 0; i < global.size(); ++i) global[i] = 0.0f;
#define RUN(kernel)                                                                               \
  if (name == #kernel) {                                                                          \
    check::ran(launch_shared(kernel, 1, kThreads, kThreads * 4, nullptr, global.data(), fault)); \
    return 0;                                                                                     \
  }
  RUN(global_overflow)
  RUN(shared_overflow)
  RUN(dynamic_shared_overflow)
  RUN(local_overflow)
  RUN(misaligned_vector)
  RUN(missing_syncthreads)
  RUN(missing_second_syncthreads)
  RUN(missing_syncwarp)
  RUN(syncwarp_across_warps)
  RUN(plain_add)
  RUN(copy_over_readers)
  RUN(unfinished_copy)
  RUN(early_return)
  RUN(divergent_barrier)
  RUN(divergent_operations)
  RUN(partial_mask)
#undef RUN
  fprintf(stderr, "no fault is called %s\n", name.c_str());
  return 2;
}

}  // namespace varkern

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return varkern::run(argv[1], argv[2][0] == '1');
}

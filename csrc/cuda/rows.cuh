// A row of a layer norm in the registers of a block: kPacks packs of eight neighbouring elements a thread.
#pragma once

#include "common/device.cuh"

namespace varkern::cuda {
namespace {

constexpr int kPacks = 2;
constexpr int kMaxThreads = 256, kMaxWarps = kMaxThreads / kWarpSize;
constexpr int64_t kMaxRow = kMaxThreads * kPacks * kPack;

// First column of the thread's k-th pack.
__device__ __forceinline__ int pack_column(int k) { return (k * int(blockDim.x) + int(threadIdx.x)) * kPack; }

struct RowStatistics {
  float mean, rstd;
};

// Subtracts the mean from the block's row of C elements; what lies past them is zero before and arbitrary after.
__device__ __forceinline__ RowStatistics centre_row(float (&v)[kPacks][kPack], int C, float eps,
                                                    float (&buffers)[2][kMaxWarps]) {
  float sum = 0.0f, square = 0.0f;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += v[k][i];
  }
  const float mean = block_sum(sum, buffers[0]) / float(C);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const bool inside = pack_column(k) < C;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      v[k][i] -= mean;
      square += inside ? v[k][i] * v[k][i] : 0.0f;
    }
  }
  return {mean, 1.0f / sqrtf(block_sum(square, buffers[1]) / float(C) + eps)};
}

// Whether rows that start at p and at multiples of the strides after it can be moved 16 bytes at a time.
template <typename T>
bool aligned(const T* p, int64_t stride_b, int64_t stride_l) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_b % kElements == 0 && stride_l % kElements == 0;
}

// The register kernels' block for a row of C elements: whole warps, kPacks packs a thread.
int row_threads(int64_t C) {
  constexpr int64_t kWarpElements = kWarpSize * kPacks * kPack;
  return int((C + kWarpElements - 1) / kWarpElements) * kWarpSize;
}

}  // namespace
}  // namespace varkern::cuda

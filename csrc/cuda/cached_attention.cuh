// What the kernels of cached_attention.cu share: their arguments, the cut into tasks, and the way a row leaves.
//
// A task is a tile of queries of one head against one part of the keys. Scores come in powers of two: q' has log2(e) in
// it. Over the keys a row keeps the largest score so far, the sum of 2^(score - largest), and the values weighted with
// those powers (flash attention, arXiv 2205.14135).
#pragma once

#include "common/device.cuh"
#include "common/launch.cuh"
#include "ops/cached_attention.h"

namespace varkern::cuda {
namespace {

struct Attention {
  const void *q, *k, *v;  // (heads, n, D), (heads, N, D), (heads, N, D); keys < N are seen
  void* out;              // (heads / H, n, H, D)
  float* workspace;       // (splits, heads * n, D), then (splits, heads * n, 2): each part's sums, largest and total
  int64_t heads, splits;
  int H, n, N, keys;
};

struct Task {
  int64_t head, split;
  int query, tile, end;  // the first query, and the tiles of keys
};

template <int kQueries, int kTile>
__device__ __forceinline__ int64_t task_count(const Attention& a) {
  return a.heads * a.splits * ((a.n + kQueries - 1) / kQueries);
}

// Tasks that share keys are neighbours.
template <int kQueries, int kTile>
__device__ __forceinline__ Task task_at(const Attention& a, int64_t index) {
  const int query_tiles = (a.n + kQueries - 1) / kQueries;
  const int64_t part = index / query_tiles, head = part / a.splits, split = part % a.splits;
  const int64_t tiles = (a.keys + kTile - 1) / kTile;
  return {head, split, int(index % query_tiles) * kQueries, int(split * tiles / a.splits),
          int((split + 1) * tiles / a.splits)};
}

// Where a row of the output is, or with several parts that of its sums.
template <typename T>
__device__ __forceinline__ T* output_row(const Attention& a, int64_t row, int D) {
  const int64_t head = row / a.n, i = row % a.n;
  return static_cast<T*>(a.out) + ((head / a.H * a.n + i) * a.H + head % a.H) * D;
}
__device__ __forceinline__ float* partial_row(const Attention& a, int64_t split, int64_t row, int D) {
  return a.workspace + (split * a.heads * a.n + row) * D;
}
__device__ __forceinline__ float2* partial_sums(const Attention& a, int64_t split, int64_t row, int D) {
  return reinterpret_cast<float2*>(a.workspace + a.splits * a.heads * a.n * D) + split * a.heads * a.n + row;
}

// kWidth neighbouring floats, moved at once; p is aligned to them.
template <int kWidth>
struct alignas(4 * kWidth) Lane {
  float at[kWidth];
};
template <int kWidth>
__device__ __forceinline__ Lane<kWidth>& lane_at(float* p) {
  return *reinterpret_cast<Lane<kWidth>*>(p);
}

__device__ __forceinline__ float minus_infinity() { return bits_float(0xff800000u); }

}  // namespace
}  // namespace varkern::cuda

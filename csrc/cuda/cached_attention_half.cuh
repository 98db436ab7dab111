// Attention over the cache in float16 and bfloat16, on the tensor cores. See cached_attention.cuh.
//
// A warp keeps its 16 or 32 queries, their sums and their scores in registers, in the fragments of common/ptx.cuh; the
// scores of a tile of keys are, rounded to T, the left factor of the product with its values. Tiles of keys and values
// pass through two buffers of shared memory, the next one on its way while one is multiplied. Their rows have a gap of
// 16 bytes, so that eight rows of a fragment lie in different banks.
#pragma once

#include "common/ptx.cuh"
#include "cuda/cached_attention.cuh"

namespace varkern::cuda {
namespace {

template <typename T, int D, int kWarps, int kRowTiles>
struct HalfAttention {
  static constexpr int kThreads = kWarps * kWarpSize, kRows = 16 * kRowTiles, kQueries = kRows * kWarps;
  static constexpr int kTile = 64, kLine = D + 8;
  static constexpr int kSharedBytes = 2 * 2 * kTile * kLine * int(sizeof(T));
  static_assert(kSharedBytes <= 99 * 1024);

  const Attention& a;
  const int lane = int(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;

  uint32_t q[kRowTiles][D / 16][4];
  float sums[kRowTiles][D / 8][4] = {};
  float scores[kRowTiles][kTile / 8][4];
  float largest[kRowTiles][2], total[kRowTiles][2];

  __device__ explicit HalfAttention(const Attention& attention) : a(attention) {}

  __device__ static T* keys_of(int tile) { return dynamic_shared<T>() + tile % 2 * (2 * kTile * kLine); }
  __device__ static T* values_of(int tile) { return keys_of(tile) + kTile * kLine; }

  // Rows past the last key become zeros: whatever the cache has there must not meet a product, even one with zero.
  __device__ void start_copies(const Task& task, int tile) const {
    const T* k = static_cast<const T*>(a.k) + task.head * a.N * D;
    const T* v = static_cast<const T*>(a.v) + task.head * a.N * D;
    constexpr int kPacks = kTile * D / kPack;
#pragma unroll
    for (int i = int(threadIdx.x); i < kPacks; i += kThreads) {
      const int row = i / (D / kPack), column = i % (D / kPack) * kPack, key = tile * kTile + row;
      const bool inside = key < a.keys;
      const int64_t source = int64_t(inside ? key : 0) * D + column;
      cp_async(keys_of(tile) + row * kLine + column, k + source, inside);
      cp_async(values_of(tile) + row * kLine + column, v + source, inside);
    }
    cp_async_commit();
  }

  __device__ void load_queries(const Task& task, int first) {
    const T* rows = static_cast<const T*>(a.q) + task.head * a.n * D;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + r * 16 + g + i % 2 * 8;
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          const T* p = rows + int64_t(row) * D + d * 16 + i / 2 * 8 + 2 * t;
          q[r][d][i] = row < a.n ? *reinterpret_cast<const uint32_t*>(p) : 0u;
        }
      }
      largest[r][0] = largest[r][1] = minus_infinity();
      total[r][0] = total[r][1] = 0.0f;
    }
  }

  __device__ void multiply_keys(int tile) {
    const T* row = keys_of(tile) + (lane % 8 + lane / 16 * 8) * kLine + lane / 8 % 2 * 8;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) scores[r][j][0] = scores[r][j][1] = scores[r][j][2] = scores[r][j][3] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
#pragma unroll
      for (int j = 0; j < kTile / 16; ++j) {
        uint32_t k[4];
        ldmatrix(k, row + j * 16 * kLine + d * 16);
        const uint32_t low[2] = {k[0], k[1]}, high[2] = {k[2], k[3]};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma(scores[r][2 * j], q[r][d], low, T{});
          mma(scores[r][2 * j + 1], q[r][d], high, T{});
        }
      }
    }
    if ((tile + 1) * kTile <= a.keys) return;
#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (tile * kTile + j * 8 + 2 * t + i % 2 < a.keys) continue;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) scores[r][j][i] = minus_infinity();
      }
    }
  }

  // Scores become 2^(score - largest so far); what was summed before shrinks to it. A row lies in four lanes.
  __device__ void take_powers() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = largest[r][half];
#pragma unroll
        for (int j = 0; j < kTile / 8; ++j) {
          high = fmaxf(high, fmaxf(scores[r][j][2 * half], scores[r][j][2 * half + 1]));
        }
        high = fmaxf(high, shuffle_xor(high, 1));
        high = fmaxf(high, shuffle_xor(high, 2));
        const float shrink = exp2_approx(largest[r][half] - high);
        largest[r][half] = high;
        float added = 0.0f;
#pragma unroll
        for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[r][j][i] = exp2_approx(scores[r][j][i] - high);
            added += scores[r][j][i];
          }
        }
        total[r][half] = total[r][half] * shrink + added;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) sums[r][j][2 * half] *= shrink, sums[r][j][2 * half + 1] *= shrink;
      }
    }
  }

  __device__ void multiply_values(int tile) {
    const T* row = values_of(tile) + lane % 16 * kLine + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < kTile / 16; ++j) {
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&pair)[4] = scores[r][2 * j + i / 2];
          p[r][i] = pack_pair(pair[i % 2 * 2], pair[i % 2 * 2 + 1], T{});
        }
      }
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t v[4];
        ldmatrix_transposed(v, row + j * 16 * kLine + d * 16);
        const uint32_t low[2] = {v[0], v[1]}, high[2] = {v[2], v[3]};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma(sums[r][2 * d], p[r], low, T{});
          mma(sums[r][2 * d + 1], p[r], high, T{});
        }
      }
    }
  }

  __device__ void store(const Task& task, int first) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float all = total[r][half];
        all += shuffle_xor(all, 1);
        all += shuffle_xor(all, 2);
        const int query = first + r * 16 + g + half * 8;
        if (query >= a.n) continue;
        const int64_t row = task.head * a.n + query;
        if (a.splits == 1) {
          T* out = output_row<T>(a, row, D) + 2 * t;
          const float inverse = 1.0f / all;
#pragma unroll
          for (int j = 0; j < D / 8; ++j) {
            *reinterpret_cast<uint32_t*>(out + j * 8) =
                pack_pair(sums[r][j][2 * half] * inverse, sums[r][j][2 * half + 1] * inverse, T{});
          }
          continue;
        }
        float* out = partial_row(a, task.split, row, D) + 2 * t;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          *reinterpret_cast<float2*>(out + j * 8) = make_float2(sums[r][j][2 * half], sums[r][j][2 * half + 1]);
        }
        if (t == 0) *partial_sums(a, task.split, row, D) = make_float2(largest[r][half], all);
      }
    }
  }

  __device__ void run(const Task& task) {
    const int first = task.query + int(threadIdx.x) / kWarpSize * kRows;
    if (task.tile < task.end) start_copies(task, task.tile);
    load_queries(task, first);
    for (int tile = task.tile; tile < task.end; ++tile) {
      cp_async_wait<0>();
      __syncthreads();  // the tile is there for all, and all are done with the one before, whose buffer is next
      if (tile + 1 < task.end) start_copies(task, tile + 1);
      multiply_keys(tile);
      take_powers();
      multiply_values(tile);
    }
    store(task, first);
  }
};

template <typename T, int D, int kWarps, int kRowTiles>
__global__ void __launch_bounds__(kWarps * kWarpSize) half_kernel(Attention a) {
  typedef HalfAttention<T, D, kWarps, kRowTiles> Kernel;
  const int64_t tasks = task_count<Kernel::kQueries, Kernel::kTile>(a);
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    Kernel(a).run(task_at<Kernel::kQueries, Kernel::kTile>(a, i));
    __syncthreads();  // before the next task's first tile goes where the last one may still be read
  }
}

template <typename T, int D, int kWarps, int kRowTiles>
const char* launch_half(const Attention& a, void* stream) {
  typedef HalfAttention<T, D, kWarps, kRowTiles> Kernel;
  const int64_t blocks = a.heads * a.splits * ((a.n + Kernel::kQueries - 1) / Kernel::kQueries);
  return launch_shared(half_kernel<T, D, kWarps, kRowTiles>, blocks, Kernel::kThreads, Kernel::kSharedBytes, stream, a);
}

// One warp where 16 rows hold all queries: the tensor cores have time for the empty rows, and every warp streams keys.
// Twice the rows a warp, which halve the reads of shared memory a product, once there are blocks enough; wider heads
// have no registers for them, narrower ones too little work in a tile.
template <int D, typename T>
const char* attend(const Attention& a, T, void* stream) {
  constexpr int64_t kManyTiles = 256;
  if (a.n <= 16) return launch_half<T, D, 1, 1>(a, stream);
  if constexpr (D == 64) {
    if (a.heads * ((a.n + 127) / 128) >= kManyTiles) return launch_half<T, D, 4, 2>(a, stream);
  }
  return launch_half<T, D, 4, 1>(a, stream);
}

}  // namespace
}  // namespace varkern::cuda

// Attention over the cache in float32, without tensor cores: their tf32 would not give the tokens of the reference.
// See cached_attention.cuh.
//
// Sixteen threads share kRows queries: each has the scores of every sixteenth key, and then, the powers exchanged
// through shared memory, a sixteenth of the columns. Sums of a tile of keys are complete before they join those of the
// tiles before, for each addition to a large sum rounds.
#pragma once

#include "common/ptx.cuh"
#include "cuda/cached_attention.cuh"

namespace varkern::cuda {
namespace {

template <int D, int kRows>
struct FloatAttention {
  static constexpr int kThreads = 128, kGroup = 16, kGroups = kThreads / kGroup, kQueries = kRows * kGroups;
  static constexpr int kTile = 32, kKeys = kTile / kGroup, kColumns = D / kGroup, kWidth = kColumns < 4 ? kColumns : 4;
  static constexpr int kLine = D + 4, kPowerLine = kTile + 4;  // gaps of 16 bytes: neighbouring rows in other banks
  static constexpr int kTileFloats = kTile * kLine;
  static constexpr int kSharedBytes = (4 * kTileFloats + kQueries * (kLine + kPowerLine)) * int(sizeof(float));
  static_assert(kSharedBytes <= 99 * 1024);

  const Attention& a;
  const int x = int(threadIdx.x) % kGroup, y = int(threadIdx.x) / kGroup;

  float sums[kRows][kColumns] = {};
  float largest[kRows], total[kRows];

  __device__ explicit FloatAttention(const Attention& attention) : a(attention) {}

  __device__ static float* keys_of(int tile) { return dynamic_shared<float>() + tile % 2 * (2 * kTileFloats); }
  __device__ static float* values_of(int tile) { return keys_of(tile) + kTileFloats; }
  __device__ static float* query_at(int row) { return dynamic_shared<float>() + 4 * kTileFloats + row * kLine; }
  __device__ static float* powers_at(int row) { return query_at(kQueries) + row * kPowerLine; }

  // The first of the kWidth columns from i on, of the thread's kColumns.
  __device__ int column(int i) const { return i * kGroup + x * kWidth; }

  __device__ void start_copies(const Task& task, int tile) const {
    const float* k = static_cast<const float*>(a.k) + task.head * a.N * D;
    const float* v = static_cast<const float*>(a.v) + task.head * a.N * D;
#pragma unroll
    for (int i = int(threadIdx.x); i < kTile * D / 4; i += kThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4, key = tile * kTile + row;
      const bool inside = key < a.keys;  // zeros past the last key, as in decode_half.cuh
      const int64_t source = int64_t(inside ? key : 0) * D + column;
      cp_async(keys_of(tile) + row * kLine + column, k + source, inside);
      cp_async(values_of(tile) + row * kLine + column, v + source, inside);
    }
  }

  __device__ void start_queries(const Task& task) {
    const float* q = static_cast<const float*>(a.q) + task.head * a.n * D;
    for (int i = int(threadIdx.x); i < kQueries * D / 4; i += kThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4, query = task.query + row;
      const bool inside = query < a.n;
      cp_async(query_at(row) + column, q + int64_t(inside ? query : 0) * D + column, inside);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) largest[r] = minus_infinity(), total[r] = 0.0f;
  }

  __device__ void score(int tile, float (&scores)[kRows][kKeys]) const {
    Lane<4> products[kRows][kKeys] = {};  // four short sums for each score
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
      Lane<4> k[kKeys];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) k[j] = lane_at<4>(keys_of(tile) + (x + j * kGroup) * kLine + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Lane<4> q = lane_at<4>(query_at(y * kRows + r) + d);
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) products[r][j].at[i] += q.at[i] * k[j].at[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float(&part)[4] = products[r][j].at;
        const bool seen = tile * kTile + x + j * kGroup < a.keys;
        scores[r][j] = seen ? (part[0] + part[1]) + (part[2] + part[3]) : minus_infinity();
      }
    }
  }

  // Leaves the powers where the group reads them, and shrinks what was summed before.
  __device__ void take_powers(const float (&scores)[kRows][kKeys], float (&shrink)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float high = largest[r];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) high = fmaxf(high, scores[r][j]);
#pragma unroll
      for (int mask = kGroup / 2; mask > 0; mask /= 2) high = fmaxf(high, shuffle_xor(high, mask));
      shrink[r] = exp2f(largest[r] - high);
      largest[r] = high;
      float added = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float power = exp2f(scores[r][j] - high);
        powers_at(y * kRows + r)[x + j * kGroup] = power;
        added += power;
      }
      total[r] = total[r] * shrink[r] + added;
    }
    __syncwarp();  // a group lies in one warp
  }

  __device__ void add_values(int tile, const float (&shrink)[kRows]) {
    float added[kRows][kColumns] = {};
#pragma unroll 2
    for (int key = 0; key < kTile; key += 4) {
      Lane<4> p[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) p[r] = lane_at<4>(powers_at(y * kRows + r) + key);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < kColumns; c += kWidth) {
          const Lane<kWidth> v = lane_at<kWidth>(values_of(tile) + (key + j) * kLine + column(c));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) added[r][c + i] += p[r].at[j] * v.at[i];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] = sums[r][c] * shrink[r] + added[r][c];
    }
  }

  __device__ void store(const Task& task) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float all = total[r];
#pragma unroll
      for (int mask = kGroup / 2; mask > 0; mask /= 2) all += shuffle_xor(all, mask);
      const int query = task.query + y * kRows + r;
      if (query >= a.n) continue;
      const int64_t row = task.head * a.n + query;
      const bool whole = a.splits == 1;
      float* out = whole ? output_row<float>(a, row, D) : partial_row(a, task.split, row, D);
#pragma unroll
      for (int c = 0; c < kColumns; c += kWidth) {
        Lane<kWidth> values;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values.at[i] = whole ? sums[r][c + i] / all : sums[r][c + i];
        lane_at<kWidth>(out + column(c)) = values;
      }
      if (!whole && x == 0) *partial_sums(a, task.split, row, D) = make_float2(largest[r], all);
    }
  }

  __device__ void run(const Task& task) {
    start_queries(task);
    if (task.tile < task.end) start_copies(task, task.tile);
    cp_async_commit();
    for (int tile = task.tile; tile < task.end; ++tile) {
      cp_async_wait<0>();
      __syncthreads();  // the tile is there for all, and all are done with the one before, whose buffer is next
      if (tile + 1 < task.end) start_copies(task, tile + 1);
      cp_async_commit();
      float scores[kRows][kKeys], shrink[kRows];
      score(tile, scores);
      take_powers(scores, shrink);
      add_values(tile, shrink);
    }
    cp_async_wait<0>();
    store(task);
  }
};

template <int D, int kRows>
__global__ void __launch_bounds__(FloatAttention<D, kRows>::kThreads) float_kernel(Attention a) {
  typedef FloatAttention<D, kRows> Kernel;
  const int64_t tasks = task_count<Kernel::kQueries, Kernel::kTile>(a);
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    Kernel(a).run(task_at<Kernel::kQueries, Kernel::kTile>(a, i));
    __syncthreads();  // before the next task's queries and first tile go where the last ones may still be read
  }
}

template <int D, int kRows>
const char* launch_float(const Attention& a, void* stream) {
  typedef FloatAttention<D, kRows> Kernel;
  const int64_t blocks = a.heads * a.splits * ((a.n + Kernel::kQueries - 1) / Kernel::kQueries);
  return launch_shared(float_kernel<D, kRows>, blocks, Kernel::kThreads, Kernel::kSharedBytes, stream, a);
}

// Few queries: fewer rows a thread, for their products and not the bytes of the keys would bound.
template <int D>
const char* attend(const Attention& a, float, void* stream) {
  return a.n <= 8 ? launch_float<D, 1>(a, stream) : launch_float<D, 4>(a, stream);
}

}  // namespace
}  // namespace varkern::cuda

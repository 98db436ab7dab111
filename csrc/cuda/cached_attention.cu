// Attention of one scale of a generation on CUDA: append, attention over the cache, and where the keys were cut into
// parts, their combination. All sizes of a launch follow from the arguments, so that a CUDA graph can hold it.
//
// A generation's small scales are bound by latency, many keys and few queries by the bytes of keys and values, many
// queries by the tensor cores: docs/ops/cached_attention.md has the figures.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "cuda/cached_attention_float.cuh"
#include "cuda/cached_attention_half.cuh"
#include "ops/attention.h"

namespace varkern::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr float kLog2e = 1.4426950408889634f;

struct Append {
  CachedAttention args;
  float q_scale;  // softmax_scale * log2(e)
};

// D / kPack neighbouring threads have a row of D elements.
template <int D>
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int mask = D / kPack / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

__device__ __forceinline__ void add_bias(float (&values)[kPack], const void* bias, int column) {
  if (!bias) return;
  float addend[kPack];
  unpack(load_pack(static_cast<const float*>(bias) + column), addend);
#pragma unroll
  for (int i = 0; i < kPack; ++i) values[i] += addend[i];
}

// values *= scale, or scale / their row's L2 norm.
template <int D>
__device__ __forceinline__ void scale_row(float (&values)[kPack], float scale, bool normalise) {
  constexpr float kNormFloor = 1e-12f;  // of F.normalize
  if (normalise) {
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < kPack; ++i) square += values[i] * values[i];
    scale /= fmaxf(sqrtf(row_sum<D>(square)), kNormFloor);
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) values[i] *= scale;
}

// A block takes a token at a time, a thread kPack columns of its heads.
template <typename T, int D>
__global__ void __launch_bounds__(kMaxThreads) append_kernel(Append append) {
  const CachedAttention& c = append.args;
  const bool normalise = c.log_scale != nullptr;
  const int C = int(c.H) * D;
  for (int64_t token = blockIdx.x; token < c.B * c.n; token += gridDim.x) {
    const int64_t b = token / c.n, i = token % c.n;
    const T* source = static_cast<const T*>(c.qkv) + b * c.stride_b + i * c.stride_n;
    // Whole warps stay, for the sums over rows; who lies past the last head computes the first one's, stores nothing.
    for (int first = int(threadIdx.x) / kWarpSize * kWarpSize * kPack; first < C; first += int(blockDim.x) * kPack) {
      const int mine = first + int(threadIdx.x) % kWarpSize * kPack;
      const bool inside = mine < C;
      const int column = inside ? mine : mine % D, h = column / D, d = column % D;
      const T* head = source + h * c.stride_h + d;
      const Pack<T> packs[3] = {load_pack(head), load_pack(head + c.stride_part), load_pack(head + 2 * c.stride_part)};
      float q[kPack], k[kPack], v[kPack], q_scale = append.q_scale;
      unpack(packs[0], q), unpack(packs[1], k), unpack(packs[2], v);
      add_bias(q, c.q_bias, column), add_bias(v, c.v_bias, column);
      if (normalise) q_scale *= expf(fminf(static_cast<const float*>(c.log_scale)[h], float(kMaxLogScale)));
      scale_row<D>(q, q_scale, normalise), scale_row<D>(k, 1.0f, normalise);
      if (!inside) continue;
      T* keys = static_cast<T*>(c.cache) + ((b * c.H + h) * c.N + c.position + i) * D + d;
      store_pack(static_cast<T*>(c.q) + ((b * c.H + h) * c.n + i) * D + d, pack_floats(q, T{}));
      store_pack(keys, pack_floats(k, T{}));
      store_pack(keys + c.B * c.H * c.N * D, pack_floats(v, T{}));
    }
  }
}

// Adds up the parts of each row in their order, a thread kPack columns.
template <typename T, int D>
__global__ void __launch_bounds__(kMaxThreads) combine_kernel(Attention a) {
  constexpr int kRowThreads = D / kPack;
  const int64_t all = a.heads * a.n * kRowThreads, step = int64_t(gridDim.x) * kMaxThreads;
  for (int64_t i = int64_t(blockIdx.x) * kMaxThreads + threadIdx.x; i < all; i += step) {
    const int64_t row = i / kRowThreads;
    const int column = int(i % kRowThreads) * kPack;
    float largest = minus_infinity(), total = 0.0f, sums[kPack] = {};
    for (int64_t split = 0; split < a.splits; ++split) largest = fmaxf(largest, partial_sums(a, split, row, D)->x);
    for (int64_t split = 0; split < a.splits; ++split) {
      const float2 part = *partial_sums(a, split, row, D);
      const float weight = exp2f(part.x - largest);
      float values[kPack];
      unpack(load_pack(partial_row(a, split, row, D) + column), values);
      total += weight * part.y;
#pragma unroll
      for (int k = 0; k < kPack; ++k) sums[k] += weight * values[k];
    }
#pragma unroll
    for (int k = 0; k < kPack; ++k) sums[k] /= total;
    store_pack(output_row<T>(a, row, D) + column, pack_floats(sums, T{}));
  }
}

template <typename T, int D>
const char* run(const CudaCachedAttention& c, void* stream) {
  const int64_t warps = (c.H * D / kPack + kWarpSize - 1) / kWarpSize;
  const int threads = int(warps * kWarpSize < kMaxThreads ? warps * kWarpSize : kMaxThreads);
  const Append append = {c, float(c.softmax_scale * double(kLog2e))};
  const char* error = launch(append_kernel<T, D>, c.B * c.n, threads, stream, append);
  if (error) return error;
  T* keys = static_cast<T*>(c.cache);
  const Attention a = {c.q,      keys,     keys + c.B * c.H * c.N * D, c.out,    c.workspace,          c.B * c.H,
                       c.splits, int(c.H), int(c.n),                   int(c.N), int(c.position + c.n)};
  error = attend<D>(a, T{}, stream);
  if (error || c.splits == 1) return error;
  const int64_t row_threads = a.heads * a.n * (D / kPack);
  return launch(combine_kernel<T, D>, (row_threads + kMaxThreads - 1) / kMaxThreads, kMaxThreads, stream, a);
}

template <typename T>
const char* dispatch_width(const CudaCachedAttention& c, void* stream) {
  switch (c.D) {
    case 32: return run<T, 32>(c, stream);
    case 64: return run<T, 64>(c, stream);
    case 128: return run<T, 128>(c, stream);
    default: return "the CUDA kernels take heads of 32, 64 or 128 elements";
  }
}

}  // namespace

const char* cached_attention(const CudaCachedAttention& args, void* stream) {
  if (args.splits < 1 || (args.splits > 1 && !args.workspace)) {
    return "the number of splits must be 1, or more with a workspace";
  }
  if (args.B * args.H * args.n == 0) return nullptr;
  switch (args.dtype) {
    case kFloat32: return dispatch_width<float>(args, stream);
    case kFloat16: return dispatch_width<float16>(args, stream);
    case kBFloat16: return dispatch_width<bfloat16>(args, stream);
    default: return "unknown dtype code: 0 is float32, 1 float16, 2 bfloat16";
  }
}

}  // namespace varkern::cuda

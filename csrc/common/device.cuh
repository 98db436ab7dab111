// What kernels need beyond C++: warp and block sums, 16-byte accesses, packed conversions. All PTX is here and in
// ptx.cuh.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

namespace varkern {
namespace {

constexpr int kWarpSize = 32;

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ double shuffle_xor(double v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
__device__ __forceinline__ float2 shuffle_xor(float2 v, int mask) {
  return make_float2(shuffle_xor(v.x, mask), shuffle_xor(v.y, mask));
}

// The sum over the warp, in every lane, in the same order in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) v = v + shuffle_xor(v, mask);
  return v;
}

// The sum over the block, in every thread, in an order fixed by the block's size. All threads call it; buffer is shared
// memory of one T a warp, and must not be the buffer of the call before: then one barrier is enough.
template <typename T>
__device__ __forceinline__ T block_sum(T v, T* buffer) {
  v = warp_sum(v);
  const int warps = int(blockDim.x) / kWarpSize;
  if (warps == 1) return v;
  if (threadIdx.x % kWarpSize == 0) buffer[threadIdx.x / kWarpSize] = v;
  __syncthreads();
  v = buffer[0];
  for (int i = 1; i < warps; ++i) v = v + buffer[i];
  return v;
}

constexpr int kPack = 8;  // elements a thread moves at a time: 16 bytes of a half type, 32 of float32

template <typename T>
struct alignas(16) Pack {
  uint4 words[kPack * sizeof(T) / 16];
};

// p is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / 16); ++i) pack.words[i] = reinterpret_cast<const uint4*>(p)[i];
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* p, Pack<T> pack) {
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / 16); ++i) reinterpret_cast<uint4*>(p)[i] = pack.words[i];
}

__device__ __forceinline__ uint32_t& word(uint4& v, int i) { return reinterpret_cast<uint32_t*>(&v)[i]; }

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, bfloat16) {
  return make_float2(bits_float(pair << 16), bits_float(pair & 0xffff0000u));
}

__device__ __forceinline__ float2 unpack_pair(uint32_t pair, float16) {
#ifdef __CUDA_ARCH__
  float2 f;
  asm("{ .reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi; }"
      : "=f"(f.x), "=f"(f.y)
      : "r"(pair));
  return f;
#else
  return make_float2(to_float(float16{uint16_t(pair)}), to_float(float16{uint16_t(pair >> 16)}));
#endif
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, bfloat16) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return From<bfloat16>::value(low).bits | uint32_t(From<bfloat16>::value(high).bits) << 16;
#endif
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, float16) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return From<float16>::value(low).bits | uint32_t(From<float16>::value(high).bits) << 16;
#endif
}

template <typename T>
__device__ __forceinline__ void unpack(Pack<T> pack, float (&values)[kPack]) {
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) {
    const float2 f = unpack_pair(word(pack.words[0], i), T{});
    values[2 * i] = f.x, values[2 * i + 1] = f.y;
  }
}

__device__ __forceinline__ void unpack(Pack<float> pack, float (&values)[kPack]) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) values[i] = bits_float(word(pack.words[i / 4], i % 4));
}

template <typename T>
__device__ __forceinline__ Pack<T> pack_floats(const float (&values)[kPack], T) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) word(pack.words[0], i) = pack_pair(values[2 * i], values[2 * i + 1], T{});
  return pack;
}

__device__ __forceinline__ Pack<float> pack_floats(const float (&values)[kPack], float) {
  Pack<float> pack;
#pragma unroll
  for (int i = 0; i < kPack; ++i) word(pack.words[i / 4], i % 4) = float_bits(values[i]);
  return pack;
}

}  // namespace
}  // namespace varkern

// CUDA's language for a plain C++20 compiler, so that csrc/cuda/*.cu runs, and runs under sanitizers, without a device.
//
// scheduler.h says how threads run. __shared__ variables are static ones, for blocks run one after another; they are not
// cleared between blocks. Fences do nothing: no other thread runs until this one waits. What takes a mask of lanes wants
// all 32. Types are as strict as CUDA's, so that what compiles here compiles with nvcc.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <bit>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }

enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }

// --- Arithmetic. The fast forms are the exact ones here; a macro, for the C library declares __expf and __logf itself.
#define __expf expf
#define __logf logf
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

// --- Waiting.
inline void __syncthreads() { emulation::syncthreads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::require(mask == 0xffffffffu, "__syncwarp without all 32 lanes");
  emulation::syncwarp();
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- Between the lanes of a warp.
namespace emulation {

inline unsigned lane() { return threadIdx.x % kWarpSize; }

template <typename T>
void show(const T& value, const char* operation) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Words));
  Words words{};
  memcpy(&words, &value, sizeof(T));
  publish(words, operation);
}

template <typename T>
T shown(unsigned lane) {
  const Words words = published(lane);
  T value;
  memcpy(&value, &words, sizeof(T));
  return value;
}

// The value of the lane that source chooses from (lane, first, end) of this lane's segment.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, int width, const char* operation, Source source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "not a type that CUDA shuffles");
  require(mask == 0xffffffffu, "a shuffle without all 32 lanes");
  require(width > 0 && width <= 32 && (width & (width - 1)) == 0, "a shuffle's width must be 1, 2, 4, 8, 16 or 32");
  show(value, operation);
  const int first = int(lane()) / width * width;
  return shown<T>(unsigned(source(int(lane()), first, first + width)));
}

template <typename T, typename Combine>
T reduce(unsigned mask, T value, const char* operation, Combine combine) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>, "not a type that CUDA reduces");
  require(mask == 0xffffffffu, "a reduction without all 32 lanes");
  show(value, operation);
  T result = shown<T>(0);
  for (unsigned i = 1; i < kWarpSize; ++i) result = combine(result, shown<T>(i));
  return result;
}

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::shuffle(mask, value, width, "__shfl_sync",
                            [=](int, int first, int) { return first + (source & (width - 1)); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle(mask, value, width, "__shfl_up_sync", [=](int lane, int first, int) {
    return lane - int(delta) < first ? lane : lane - int(delta);
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle(mask, value, width, "__shfl_down_sync", [=](int lane, int, int end) {
    return lane + int(delta) < end ? lane + int(delta) : lane;
  });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return emulation::shuffle(mask, value, width, "__shfl_xor_sync", [=](int lane, int, int end) {
    return (lane ^ lane_mask) < end ? lane ^ lane_mask : lane;
  });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulation::require(mask == 0xffffffffu, "a vote without all 32 lanes");
  emulation::show(predicate != 0, "a vote");
  unsigned ballot = 0;
  for (unsigned i = 0; i < emulation::kWarpSize; ++i) ballot |= unsigned(emulation::shown<bool>(i)) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, "__reduce_add_sync", [](T a, T b) { return T(unsigned(a) + unsigned(b)); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, "__reduce_min_sync", [](T a, T b) { return min(a, b); });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return emulation::reduce(mask, value, "__reduce_max_sync", [](T a, T b) { return max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulation::reduce(mask, value, "__reduce_or_sync", [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulation::reduce(mask, value, "__reduce_and_sync", [](unsigned a, unsigned b) { return a & b; });
}

// --- Atomics: relaxed, as CUDA's are. They return what was there before.
namespace emulation {

template <typename T, typename... Allowed>
constexpr bool kIsOneOf = (std::is_same_v<T, Allowed> || ...);
template <typename T>
constexpr bool kIsAtomicInteger = kIsOneOf<T, int, unsigned, unsigned long long>;

template <typename T, typename Update>
T update(T* address, Update next) {
  std::atomic_ref<T> cell(*address);
  T old = cell.load(std::memory_order_relaxed);
  while (!cell.compare_exchange_weak(old, next(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace emulation

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(emulation::kIsAtomicInteger<T> || emulation::kIsOneOf<T, float, double>);
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  static_assert(emulation::kIsAtomicInteger<T> || emulation::kIsOneOf<T, long long>);
  return emulation::update(address, [=](T old) { return max(old, value); });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  static_assert(emulation::kIsAtomicInteger<T> || emulation::kIsOneOf<T, long long>);
  return emulation::update(address, [=](T old) { return min(old, value); });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  static_assert(emulation::kIsAtomicInteger<T>);
  return std::atomic_ref<T>(*address).fetch_or(value, std::memory_order_relaxed);
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  static_assert(emulation::kIsAtomicInteger<T>);
  return std::atomic_ref<T>(*address).fetch_and(value, std::memory_order_relaxed);
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  static_assert(emulation::kIsAtomicInteger<T> || emulation::kIsOneOf<T, float>);
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  static_assert(emulation::kIsAtomicInteger<T>);
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}

// Vectors of kWidth floats: 4 (baseline), 8 (AVX2) or 16 (AVX-512) by the flags of the file that includes this.
//
// Loads convert float16 and bfloat16 to float32, stores round to nearest even. Everything has internal linkage and
// only C headers are included: an inline function shared by two SIMD levels could be merged by the linker into the
// copy that needs the newer processor.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace varkern {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef int32_t Mask __attribute__((vector_size(4 * kWidth)));

// a where the lanes of mask are set, else b; of Floats, Words or Mask.
template <typename Lanes>
inline Lanes select(Mask mask, Lanes a, Lanes b) {
  return mask ? a : b;
}

// Lanes 0 .. n-1.
inline Mask first_lanes(int64_t n) {
  Mask lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i < n ? -1 : 0;
  return lanes;
}

inline float sum_lanes(Floats v) {
  float lanes[kWidth];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The low halves of the words, which hold at most 16 bits.
inline Halves low_halves(Words v) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // GCC 12 moves the lanes of this conversion one by one
  const __m256i w = (__m256i)v;
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
#else
  return __builtin_convertvector(v, Halves);
#endif
}

inline Floats expand(Floats v, float) { return v; }

inline Words widen(Halves v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, Words);
#endif
}

inline Floats expand(Halves v, bfloat16) { return (Floats)(widen(v) << 16); }

inline Halves narrow(Floats v, bfloat16) {
  const Words u = (Words)v;
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Mask nan = (u & 0x7fffffffu) > 0x7f800000u;
  return low_halves(select(nan, Words{} + 0x7fc0u, rounded));
}

#if defined(__AVX512F__)
inline Floats expand(Halves v, float16) { return (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v); }
inline Halves narrow(Floats v, float16) { return (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
inline Floats expand(Halves v, float16) { return (Floats)_mm256_cvtph_ps((__m128i)v); }
inline Halves narrow(Floats v, float16) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// The scalar conversions of common/dtype.h, with their branches turned into selections.
inline Floats expand(Halves v, float16) {
  const Words h = widen(v);
  const Words magnitude = (h & 0x7fffu) << 13;
  const Words subnormal = (Words)((Floats)(magnitude + 0x38800000u) - (Floats)(Words{} + 0x38800000u));
  const Words normal = magnitude + select(magnitude >= 0x0f800000u, Words{} + 0x70000000u, Words{} + 0x38000000u);
  return (Floats)(((h & 0x8000u) << 16) | select(magnitude < 0x00800000u, subnormal, normal));
}

inline Halves narrow(Floats v, float16) {
  const Words u = (Words)v;
  const Words magnitude = u & 0x7fffffffu;
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Words result = select(magnitude < 0x38800000u, subnormal, normal);
  result = select(magnitude >= 0x47800000u, Words{} + 0x7c00u, result);
  result = select(magnitude > 0x7f800000u, Words{} + 0x7e00u, result);
  return low_halves(((u >> 16) & 0x8000u) | result);
}
#endif

template <typename T>
struct Storage {
  typedef Halves type;
};
template <>
struct Storage<float> {
  typedef Floats type;
};

template <typename T>
inline Floats load(const T* p) {
  typename Storage<T>::type v;
  __builtin_memcpy(&v, p, sizeof(v));
  return expand(v, T{});
}

// The first n < kWidth lanes; the others are zero.
template <typename T>
inline Floats load(const T* p, int64_t n) {
  typename Storage<T>::type v{};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return expand(v, T{});
}

inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void store(float* p, Floats v, int64_t n) { __builtin_memcpy(p, &v, n * sizeof(float)); }

template <typename T>
inline void store(T* p, Floats v) {
  const Halves h = narrow(v, T{});
  __builtin_memcpy(p, &h, sizeof(h));
}

template <typename T>
inline void store(T* p, Floats v, int64_t n) {
  const Halves h = narrow(v, T{});
  __builtin_memcpy(p, &h, n * sizeof(T));
}

}  // namespace
}  // namespace varkern

// float16 and bfloat16 as bits, and their conversions to and from float32 with round to nearest even.
//
// The one definition for host and device. Everything has internal linkage: the CPU kernels that include this are
// compiled for several instruction sets, and the linker must not merge their copies.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define VARKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VARKERN_HOST_DEVICE inline
#endif

namespace varkern {
namespace {

struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

union FloatBits {
  float f;
  uint32_t u;
};

VARKERN_HOST_DEVICE uint32_t float_bits(float value) {
  FloatBits pun;
  pun.f = value;
  return pun.u;
}

VARKERN_HOST_DEVICE float bits_float(uint32_t bits) {
  FloatBits pun;
  pun.u = bits;
  return pun.f;
}

VARKERN_HOST_DEVICE float to_float(float value) { return value; }

VARKERN_HOST_DEVICE float to_float(bfloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

VARKERN_HOST_DEVICE float to_float(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;  // exponent and mantissa at float32's places
  if (magnitude >= 0x0f800000u) return bits_float(sign | (magnitude + 0x70000000u));  // infinity, NaN
  if (magnitude >= 0x00800000u) return bits_float(sign | (magnitude + 0x38000000u));  // normal: bias 15 to 127
  // Subnormal: give it the exponent of 2^-14 with the implied one, then subtract that one exactly.
  const float value32 = bits_float(magnitude + 0x38800000u) - bits_float(0x38800000u);
  return bits_float(sign | float_bits(value32));
}

template <typename T>
struct From;

template <>
struct From<float> {
  static VARKERN_HOST_DEVICE float value(float f) { return f; }
};

template <>
struct From<bfloat16> {
  static VARKERN_HOST_DEVICE bfloat16 value(float f) {
    const uint32_t u = float_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bfloat16{0x7fc0u};
    return bfloat16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};

template <>
struct From<float16> {
  static VARKERN_HOST_DEVICE float16 value(float f) {
    const uint32_t u = float_bits(f);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return float16{uint16_t(sign | 0x7e00u)};
    if (magnitude >= 0x47800000u) return float16{uint16_t(sign | 0x7c00u)};  // 65536 and above
    if (magnitude < 0x38800000u) {
      // Below 2^-14: in 0.5 + |f| the last mantissa bit weighs 2^-24, float16's smallest step, so the addition rounds.
      const uint32_t rounded = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
      return float16{uint16_t(sign | rounded)};
    }
    const uint32_t rounded = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    return float16{uint16_t(sign | rounded)};
  }
};

}  // namespace
}  // namespace varkern

// exp of a vector. Internal linkage only, as in vector.h.
#pragma once

#include "cpu/vector.h"

namespace varkern {
namespace {

// a * b + c, rounded once where the processor can, whatever -ffp-contract says.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// exp(x) for -87 <= x <= 87, within 4 * 2^-24 of it, relatively.
//
// x = n ln 2 + r with |r| <= ln(2) / 2, ln 2 in two pieces of which the first times n is exact. The polynomial has the
// least maximal relative error of those of degree five that begin with 1 + r: 1.8 * 2^-24.
inline Floats exponential(Floats x) {
  const Floats kLog2e = Floats{} + 1.44269504f, kRound = Floats{} + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats shifted = multiply_add(x, kLog2e, kRound), n = shifted - kRound;
  Floats r = multiply_add(n, Floats{} - 0.693359375f, x);
  r = multiply_add(n, Floats{} + 2.12194440e-4f, r);
  Floats p = Floats{} + 0.00831252057f;
  p = multiply_add(p, r, Floats{} + 0.0418901555f);
  p = multiply_add(p, r, Floats{} + 0.166671142f);
  p = multiply_add(p, r, Floats{} + 0.499992311f);
  p = multiply_add(p, r, Floats{} + 1.0f);
  p = multiply_add(p, r, Floats{} + 1.0f);
  return (Floats)((Words)p + ((Words)shifted << 23));  // the low bits of shifted hold n: add it to the exponent
}

}  // namespace
}  // namespace varkern

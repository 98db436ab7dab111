// exp of a vector, and what follows from it. Internal linkage only, as in vector.h.
#pragma once

#include "cpu/simd/real.h"

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

// x * sigmoid(x). What is not a number stays so: x is divided.
inline Floats silu(Floats x) {
  const Floats limit = Floats{} + 87.0f, minus = select(-x > limit, limit, select(-x < -limit, -limit, -x));
  return x / (1.0f + exponential(minus));
}

// exp(x) for x <= 0 or so, in float or double, by 2^n e^r with |r| <= ln(2) / 2 and the Taylor series of e^r; 0 where
// the result would not be a normal number.
template <typename Real>
inline Vector<Real> exponential_or_zero(Vector<Real> x) {
  typedef Lanes<Real> L;
  typedef typename L::bits Bits;
  constexpr Real shift = Real(3) * Real(uint64_t(1) << (L::mantissa - 1));  // adding it rounds to an integer
  constexpr Real ln2_high = sizeof(Real) == 4 ? Real(0.693359375) : Real(6.93147180369123816490e-01);
  constexpr Real ln2_low = sizeof(Real) == 4 ? Real(-2.12194440e-4) : Real(1.90821492927058770002e-10);
  const Vector<Real> shifted = x * Real(1.4426950408889634) + shift, n = shifted - shift;
  const Vector<Real> r = x - n * ln2_high - n * ln2_low;
  Real inverse_factorial = 1;
  for (int i = 2; i <= L::degree; ++i) inverse_factorial /= Real(i);
  Vector<Real> p = Vector<Real>{} + inverse_factorial;
#pragma GCC unroll 16
  for (int i = L::degree; i > 0; --i) p = p * r + (inverse_factorial *= Real(i));
  const Bits power = ((Bits)shifted << L::mantissa) + (typename L::bits{} + (uint64_t(L::bias) << L::mantissa));
  const auto vanishes = x < Real(1 - L::bias) * Real(0.6931471805599453);
  return (Vector<Real>)((Bits)(p * (Vector<Real>)power) & ~(Bits)vanishes);
}

}  // namespace
}  // namespace varkern

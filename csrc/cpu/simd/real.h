// Vectors of Real, float or double. Internal linkage only, as in vector.h.
#pragma once

#include "cpu/simd/vector.h"

namespace varkern {
namespace {

template <typename Real>
struct Lanes;
template <>
struct Lanes<float> {
  typedef Floats type;
  typedef Words bits;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(4 * kWidth)));
  typedef uint64_t bits __attribute__((vector_size(4 * kWidth)));
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
};
template <typename Real>
using Vector = typename Lanes<Real>::type;

template <typename Real>
constexpr int64_t kLanes = 4 * kWidth / int64_t(sizeof(Real));

// The arithmetic type of an element type.
template <typename T>
struct Arithmetic {
  typedef float type;
};
template <>
struct Arithmetic<double> {
  typedef double type;
};

// Half a vector of floats as doubles, and back.
inline Vector<double> widen(const float* p) {
  typedef float Half __attribute__((vector_size(2 * kWidth)));
  Half v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vector<double>);
}
inline Vector<double> widen(const double* p) {
  Vector<double> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void narrow(float* p, Vector<double> value) {
  typedef float Half __attribute__((vector_size(2 * kWidth)));
  const Half v = __builtin_convertvector(value, Half);
  __builtin_memcpy(p, &v, sizeof(v));
}
inline void narrow(double* p, Vector<double> value) { __builtin_memcpy(p, &value, sizeof(value)); }

inline Vector<double> load(const double* p) {
  Vector<double> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(double* p, Vector<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }

template <typename Real>
inline Real sum(Vector<Real> v) {
  Real total = v[0];
  for (int i = 1; i < kLanes<Real>; ++i) total += v[i];
  return total;
}

template <typename Real>
inline Real dot(const Real* a, const Real* b, int64_t n) {
  Vector<Real> total{};
  for (int64_t i = 0; i < n; i += kLanes<Real>) total += load(a + i) * load(b + i);
  return sum<Real>(total);
}

}  // namespace
}  // namespace varkern

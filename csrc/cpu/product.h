// Vectors of float or double, and the register-tiled product of matrices. Internal linkage only, as in vector.h.
#pragma once

#include "cpu/vector.h"
#include "cpu/workspace.h"

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
template <typename Real>
constexpr int64_t kColumns = 2 * kLanes<Real>;  // of a register tile

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

// c[m][n] = or += sum over k of a(m, k) b[k][n], in the order of k; a(m, k) is a[m * a_line + k], or a[k * a_line + m]
// if kAcross. The sum is complete before it is added to c: adding each term to a large c would round every time.
// Columns come in panels: b's are panel_step apart, c's side by side.
template <bool kAcross, bool kAdd, typename Real>
inline void multiply_panels(const Real* a, int64_t a_line, int64_t M, const Real* b, int64_t panel_step,
                            int64_t b_line, int64_t depth, int64_t panels, Real* c, int64_t c_line) {
  for (int64_t panel = 0; panel < panels; ++panel, b += panel_step, c += kColumns<Real>) {
    for (int64_t m = 0; m < M; m += kRows) {
      with_rows(minimum(kRows, M - m), [&](auto count) {
        constexpr int R = decltype(count)::value;
        const Real* factors = a + (kAcross ? m : m * a_line);
        const Real* line = b;
        Real* target = c + m * c_line;
        Vector<Real> acc[R][2] = {};
        for (int64_t k = 0; k < depth; ++k, line += b_line) {
          const Vector<Real> low = load(line), high = load(line + kLanes<Real>);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const Real factor = kAcross ? factors[k * a_line + r] : factors[r * a_line + k];
            acc[r][0] += factor * low;
            acc[r][1] += factor * high;
          }
        }
        for (int r = 0; r < R; ++r, target += c_line) {
          if (kAdd) acc[r][0] += load(target), acc[r][1] += load(target + kLanes<Real>);
          store(target, acc[r][0]), store(target + kLanes<Real>, acc[r][1]);
        }
      });
    }
  }
}

}  // namespace
}  // namespace varkern

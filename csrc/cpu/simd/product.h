// The register-tiled product of matrices. Internal linkage only, as in vector.h.
#pragma once

#include "cpu/integers.h"
#include "cpu/simd/real.h"

namespace varkern {
namespace {

constexpr int kRows = kWidth == 16 ? 8 : 6;  // of a register tile: with two vectors each, what the registers hold
template <typename Real>
constexpr int64_t kColumns = 2 * kLanes<Real>;  // of a register tile

template <int N>
struct Count {
  enum { value = N };
};

// body(Count<rows>{}) for 1 <= rows <= kRows, a constant for the compiler.
template <int R = kRows, typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, body);
  }
  body(Count<R>{});
}

// acc[r] += sum over k of factor(r, k) * (line k of b), kColumns of it, in the order of k, whatever R is.
template <int R, typename Real, typename Factor>
inline void multiply_tile(const Factor& factor, const Real* b, int64_t b_line, int64_t depth,
                          Vector<Real> (&acc)[R][2]) {
  for (int64_t k = 0; k < depth; ++k, b += b_line) {
    const Vector<Real> low = load(b), high = load(b + kLanes<Real>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Real value = factor(r, k);
      acc[r][0] += value * low;
      acc[r][1] += value * high;
    }
  }
}

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
        Real* target = c + m * c_line;
        Vector<Real> acc[R][2] = {};
        multiply_tile([&](int r, int64_t k) { return factors[kAcross ? k * a_line + r : r * a_line + k]; }, b, b_line,
                      depth, acc);
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

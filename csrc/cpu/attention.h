// What the forward and the backward pass of block-causal attention share on the CPU: the softmax of a row, and the way
// from rows of q and k to what is multiplied.
//
// Queries are worked on in blocks of rows of one scale. Such rows see the same keys, so nothing here ever looks at a
// mask: a block ends at its last visible key. Arithmetic is Real: double for double, float for every other type.
//
// Internal linkage only, as in simd/vector.h.
#pragma once

#include "cpu/arena.h"
#include "cpu/simd/exponential.h"
#include "cpu/simd/product.h"
#include "cpu/threads.h"
#include "ops/attention.h"

namespace varkern {
namespace {

// n elements as Real, then zeros up to padded, a multiple of the lanes.
template <typename T>
inline void read_row(const T* source, int64_t n, int64_t padded, float* row) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(row + i, load(source + i));
  for (; i < padded; i += kWidth) store(row + i, i < n ? load(source + i, n - i) : Floats{});
}
inline void read_row(const double* source, int64_t n, int64_t padded, double* row) {
  for (int64_t i = 0; i < padded; ++i) row[i] = i < n ? source[i] : 0.0;
}

template <typename T>
inline void write_row(const float* row, int64_t n, T* target) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(target + i, load(row + i));
  if (i < n) store(target + i, load(row + i), n - i);
}
inline void write_row(const double* row, int64_t n, double* target) {
  __builtin_memcpy(target, row, n * sizeof(double));
}

template <typename Sum, typename Real>
inline void add_to(Sum* row, const Real* addend, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] += addend[i];
}

// Scores of one row become exp(score - maximum so far). Returns what scales the row's earlier sums down to it.
template <typename Real>
inline Real softmax_row(Real* scores, int64_t width, int64_t padded, Real& largest, Real& total) {
  for (int64_t j = width; j < padded; ++j) scores[j] = -Real(__builtin_inf());
  Vector<Real> best = load(scores);
  for (int64_t j = kLanes<Real>; j < padded; j += kLanes<Real>) {
    const Vector<Real> s = load(scores + j);
    best = s > best ? s : best;
  }
  Real maximum = largest;
  for (int i = 0; i < kLanes<Real>; ++i) maximum = best[i] > maximum ? best[i] : maximum;
  const Real shrink = maximum == largest ? Real(1) : Real(__builtin_exp(double(largest - maximum)));
  Vector<Real> added{};
  for (int64_t j = 0; j < padded; j += kLanes<Real>) {
    const Vector<Real> p = exponential_or_zero<Real>(load(scores + j) - maximum);
    store(scores + j, p);
    added += p;
  }
  largest = maximum;
  total = total * shrink + sum<Real>(added);
  return shrink;
}

// How a row became what is multiplied: row * factor, with factor = scale / |row| where it is normalised.
template <typename Real>
struct Scaling {
  Real factor;
  Real projection;  // 1 / scale^2 where the norm depends on the row, else 0
};

// The factor is found and applied in double: an error of it would be an error of every score of the row alike, which
// at a temperature of 100 is no longer small.
template <typename Real>
inline Scaling<Real> scale_row(Real* row, int64_t n, double scale, bool normalise) {
  double factor = scale, projection = 0;
  if (normalise) {
    constexpr double floor = 1e-12;  // of F.normalize
    Vector<double> square{};
    for (int64_t i = 0; i < n; i += kLanes<double>) square += widen(row + i) * widen(row + i);
    const double norm = __builtin_sqrt(sum<double>(square));
    factor = scale / (norm < floor ? floor : norm);
    projection = norm < floor ? 0 : 1 / (scale * scale);
  }
  for (int64_t i = 0; i < n; i += kLanes<double>) narrow(row + i, widen(row + i) * factor);
  return {Real(factor), Real(projection)};
}

// From the gradient of the scaled row to that of the row, in place. Returns gradient . scaled.
template <typename Real>
inline Real scale_row_backward(Real* grad, const Real* scaled, int64_t n, Scaling<Real> scaling) {
  const Real product = dot(grad, scaled, n), along = product * scaling.projection;
  for (int64_t i = 0; i < n; i += kLanes<Real>) {
    store(grad + i, (load(grad + i) - load(scaled + i) * along) * scaling.factor);
  }
  return product;
}

// One head of one batch element.
template <typename T>
struct Head {
  typedef typename Arithmetic<T>::type Real;
  const BlockCausalAttention* a;
  int64_t b, h, Dp, Lp;         // D and L padded to whole tiles
  const Real *q_bias, *v_bias;  // (D) or nullptr
  double q_scale;
  bool normalise;

  Head(const BlockCausalAttention& args, int64_t head)
      : a(&args), b(head / args.H), h(head % args.H), Dp(round_up(args.D, kColumns<Real>)),
        Lp(round_up(args.L, kColumns<Real>)), q_bias(args.q_bias ? (const Real*)args.q_bias + h * args.D : nullptr),
        v_bias(args.v_bias ? (const Real*)args.v_bias + h * args.D : nullptr), q_scale(args.softmax_scale),
        normalise(args.log_scale != nullptr) {
    if (normalise) q_scale *= __builtin_exp(minimum_log_scale(((const Real*)args.log_scale)[h]));
  }

  static double minimum_log_scale(double value) { return value > kMaxLogScale ? kMaxLogScale : value; }

  T* row(const HeadRows& rows, int64_t l) const {
    return (T*)rows.data + b * rows.stride_b + h * rows.stride_h + l * rows.stride_l;
  }

  int64_t query(int64_t l) const { return l - (a->L - a->queries); }  // the row of position l in q and out

  Scaling<Real> read_q(int64_t l, Real* out) const {
    read_row(row(a->q, query(l)), a->D, Dp, out);
    if (q_bias) add_to(out, q_bias, a->D);
    return scale_row(out, Dp, q_scale, normalise);
  }
  Scaling<Real> read_k(int64_t l, Real* out) const {
    read_row(row(a->k, l), a->D, Dp, out);
    return scale_row(out, Dp, 1.0, normalise);
  }
  void read_v(int64_t l, Real* out) const {
    read_row(row(a->v, l), a->D, Dp, out);
    if (v_bias) add_to(out, v_bias, a->D);
  }
};

// Panels (Lp / kColumns, D, kColumns) of the rows (Lp, Dp), so that positions lie across lanes. Rows past L are zeroed.
template <typename Real>
inline void transpose_rows(Real* rows, int64_t L, int64_t Lp, int64_t D, int64_t Dp, Real* panels) {
  __builtin_memset(rows + L * Dp, 0, (Lp - L) * Dp * sizeof(Real));
  for (int64_t first = 0; first < Lp; first += kColumns<Real>, panels += D * kColumns<Real>) {
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t i = 0; i < kColumns<Real>; ++i) panels[d * kColumns<Real> + i] = rows[(first + i) * Dp + d];
    }
  }
}

// Calls body(begin, end) for every scale whose positions are queries.
template <typename Body>
inline void for_each_scale(const BlockCausalAttention& a, const Body& body) {
  int64_t begin = 0;
  for (int64_t k = 0; k < a.K; ++k) {
    const int64_t end = begin + a.lengths[k];
    if (begin >= a.L - a.queries) body(begin, end);
    begin = end;
  }
}

// Calls body(first row, rows, visible keys) for every block of at most kBlockRows rows of one scale.
template <int64_t kBlockRows, typename Body>
inline void for_each_block(const BlockCausalAttention& a, const Body& body) {
  for_each_scale(a, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlockRows) body(first, minimum(kBlockRows, end - first), end);
  });
}

// Pairs of a query and a key that it sees.
inline int64_t visible_pairs(const BlockCausalAttention& a) {
  int64_t pairs = 0;
  for_each_scale(a, [&](int64_t begin, int64_t end) { pairs += (end - begin) * end; });
  return pairs;
}

// body(T{}) for the element type of a dtype code.
template <typename Body>
inline const char* dispatch_element(int dtype, const Body& body) {
  switch (dtype) {
    case kFloat32: return body(float{});
    case kFloat16: return body(float16{});
    case kBFloat16: return body(bfloat16{});
    case kFloat64: return body(double{});
    default: return "unknown dtype code: 0 is float32, 1 float16, 2 bfloat16, 3 float64";
  }
}

constexpr const char* kAttentionOutOfMemory = "out of memory for the workspace of attention";

}  // namespace
}  // namespace varkern

// Block-causal attention, backward. Scores are computed again tile by tile, in the order of the forward pass and so bit
// for bit, and their softmax from the maximum and sum of each row: the logarithm of the two together would lose, for
// scores near 100, seven bits of every probability. A head is one thread's, so that every sum has one order whatever
// the number of threads.
#include "cpu/attention.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int64_t kBlockRows = 48, kTile = 64;

template <typename Real>
struct Workspace {
  Real *k, *k_panels, *v_panels;        // (Lp, Dp)
  Real *grad_k, *grad_v;                // (Lp, Dp)
  Scaling<Real> *k_scaling, *q_scaling; // (L), (kBlockRows)
  Real *q, *grad_q, *grad_out;          // (kBlockRows, Dp)
  Real *p, *grad_scores;                // (kBlockRows, kTile)
  Real* delta;                          // (kBlockRows): sum of grad_out * out
  double* sums;                         // (2, Dp)

  static Workspace make(int64_t Lp, int64_t Dp, Arena& arena) {
    Workspace w;
    Real** const keys[] = {&w.k, &w.k_panels, &w.v_panels, &w.grad_k, &w.grad_v};
    for (Real** matrix : keys) *matrix = arena.take<Real>(Lp * Dp);
    Real** const rows[] = {&w.q, &w.grad_q, &w.grad_out};
    for (Real** matrix : rows) *matrix = arena.take<Real>(kBlockRows * Dp);
    w.p = arena.take<Real>(kBlockRows * kTile);
    w.grad_scores = arena.take<Real>(kBlockRows * kTile);
    w.k_scaling = arena.take<Scaling<Real>>(Lp);
    w.q_scaling = arena.take<Scaling<Real>>(kBlockRows);
    w.delta = arena.take<Real>(kBlockRows);
    w.sums = arena.take<double>(2 * Dp);
    return w;
  }
};

// Sums over the rows of a head, in double: they have as many terms as the head has positions.
struct HeadSums {
  double *q_bias, *v_bias;  // (D)
  double log_scale;
};

// Of one row: scores -> p = exp(score - largest) / total, and grad_scores: from the gradient of p to p (grad - delta).
template <typename Real>
void softmax_row_backward(Real* p, Real* grad_scores, int64_t width, int64_t padded, Real largest, Real total,
                          Real delta) {
  const Real inverse = 1 / total;
  for (int64_t j = 0; j < padded; j += kLanes<Real>) {
    const Vector<Real> probability = exponential_or_zero<Real>(load(p + j) - largest) * inverse;
    store(p + j, probability);
    store(grad_scores + j, probability * (load(grad_scores + j) - delta));
  }
  for (int64_t j = width; j < padded; ++j) p[j] = grad_scores[j] = 0;
}

template <typename T, typename Real>
void attend_backward(const BlockCausalAttentionBackward& f, const Head<T>& head, int64_t first, int64_t rows,
                     int64_t visible, const Workspace<Real>& w, HeadSums& sums) {
  const int64_t D = f.D, Dp = head.Dp, columns = kColumns<Real>, panels = Dp / columns;
  const int64_t row = (head.b * f.H + head.h) * f.L + first;
  const Real *largest = (const Real*)f.largest + row, *total = (const Real*)f.total + row;
  for (int64_t r = 0; r < rows; ++r) {
    Real *out = w.grad_q + r * Dp, *grad_out = w.grad_out + r * Dp;
    w.q_scaling[r] = head.read_q(first + r, w.q + r * Dp);
    read_row(head.row(f.grad_out, first + r), D, Dp, grad_out);
    read_row(head.row(f.out, first + r), D, Dp, out);
    w.delta[r] = dot(grad_out, out, Dp);
    add_to(sums.v_bias, grad_out, D);
  }
  __builtin_memset(w.grad_q, 0, rows * Dp * sizeof(Real));
  for (int64_t key = 0; key < visible; key += kTile) {
    const int64_t width = minimum(kTile, visible - key), padded = round_up(width, columns);
    multiply_panels<false, false>(w.q, Dp, rows, w.k_panels + key * D, D * columns, columns, D, padded / columns, w.p,
                                  kTile);
    multiply_panels<false, false>(w.grad_out, Dp, rows, w.v_panels + key * D, D * columns, columns, D,
                                  padded / columns, w.grad_scores, kTile);
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row_backward(w.p + r * kTile, w.grad_scores + r * kTile, width, padded, largest[r], total[r],
                           w.delta[r]);
    }
    multiply_panels<true, true>(w.p, kTile, width, w.grad_out, columns, Dp, rows, panels, w.grad_v + key * Dp, Dp);
    multiply_panels<true, true>(w.grad_scores, kTile, width, w.q, columns, Dp, rows, panels, w.grad_k + key * Dp, Dp);
    multiply_panels<false, true>(w.grad_scores, kTile, rows, w.k + key * Dp, columns, Dp, width, panels, w.grad_q, Dp);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Real* grad = w.grad_q + r * Dp;
    sums.log_scale += scale_row_backward(grad, w.q + r * Dp, Dp, w.q_scaling[r]);
    add_to(sums.q_bias, grad, D);
    write_row(grad, D, head.row(f.grad_q, first + r));
  }
}

template <typename T, typename Real>
void head_backward(const BlockCausalAttentionBackward& f, int64_t index, const Workspace<Real>& w) {
  const BlockCausalAttention& a = f;
  const Head<T> head(a, index);
  const int64_t D = a.D, Dp = head.Dp;
  // grad_v's memory holds v until its panels are made.
  for (int64_t l = 0; l < a.L; ++l) {
    w.k_scaling[l] = head.read_k(l, w.k + l * Dp);
    head.read_v(l, w.grad_v + l * Dp);
  }
  transpose_rows(w.k, a.L, head.Lp, D, Dp, w.k_panels);
  transpose_rows(w.grad_v, a.L, head.Lp, D, Dp, w.v_panels);
  __builtin_memset(w.grad_k, 0, head.Lp * Dp * sizeof(Real));
  __builtin_memset(w.grad_v, 0, head.Lp * Dp * sizeof(Real));

  HeadSums sums{w.sums, w.sums + Dp, 0};
  __builtin_memset(w.sums, 0, 2 * Dp * sizeof(double));
  for_each_block<kBlockRows>(a, [&](int64_t first, int64_t rows, int64_t visible) {
    attend_backward(f, head, first, rows, visible, w, sums);
  });
  for (int64_t d = 0; d < D; ++d) {
    if (f.grad_q_bias) ((Real*)f.grad_q_bias)[index * D + d] = Real(sums.q_bias[d]);
    if (f.grad_v_bias) ((Real*)f.grad_v_bias)[index * D + d] = Real(sums.v_bias[d]);
  }
  if (f.grad_log_scale) {
    const bool clamped = ((const Real*)a.log_scale)[head.h] > Real(kMaxLogScale);
    ((Real*)f.grad_log_scale)[index] = clamped ? Real(0) : Real(sums.log_scale);
  }
  for (int64_t l = 0; l < a.L; ++l) {
    scale_row_backward(w.grad_k + l * Dp, w.k + l * Dp, Dp, w.k_scaling[l]);
    write_row(w.grad_k + l * Dp, D, head.row(f.grad_k, l));
    write_row(w.grad_v + l * Dp, D, head.row(f.grad_v, l));
  }
}

template <typename T>
const char* backward(const BlockCausalAttentionBackward& f) {
  typedef typename Arithmetic<T>::type Real;
  const BlockCausalAttention& a = f;
  const int64_t heads = a.B * a.H;
  const int threads = thread_count(heads, heads * visible_pairs(a) * a.D * 5 / kWorkPerByte);
  Workspace<Real>* workspaces = nullptr;
  const bool done = with_workspace(
      [&](Arena& arena) {
        workspaces = arena.take<Workspace<Real>>(threads);
        for (int t = 0; t < threads; ++t) {
          const int64_t columns = kColumns<Real>;
          const auto w = Workspace<Real>::make(round_up(a.L, columns), round_up(a.D, columns), arena);
          if (workspaces) workspaces[t] = w;
        }
      },
      [&] {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
        for (int64_t head = 0; head < heads; ++head) head_backward<T>(f, head, workspaces[thread_number()]);
      });
  return done ? nullptr : kAttentionOutOfMemory;
}

}  // namespace

const char* block_causal_attention_backward(const BlockCausalAttentionBackward& args) {
  return dispatch_element(args.dtype, [&](auto element) { return backward<decltype(element)>(args); });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

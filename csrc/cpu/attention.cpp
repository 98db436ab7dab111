// Block-causal attention, forward (flash attention, arXiv 2205.14135): keys pass in tiles that fit the first-level
// cache, with a running maximum and sum of each row, so that no matrix of scores exists.
#include "cpu/attention.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int64_t kBlockRows = 48, kTile = 128;  // queries and keys whose scores are held at a time

template <typename Real>
struct Workspace {
  Real *k, *v, *panels;      // (Lp, Dp) rows of k and v, and k in panels; k serves v's rows after the panels are made
  Real *q, *out, *scores;    // (kBlockRows, Dp), (kBlockRows, Dp), (kBlockRows, kTile)
  Real *largest, *total;     // (kBlockRows)

  static Workspace make(int64_t Lp, int64_t Dp, Arena& arena) {
    Workspace w;
    w.k = w.v = arena.take<Real>(Lp * Dp);
    w.panels = arena.take<Real>(Lp * Dp);
    w.q = arena.take<Real>(kBlockRows * Dp);
    w.out = arena.take<Real>(kBlockRows * Dp);
    w.scores = arena.take<Real>(kBlockRows * kTile);
    w.largest = arena.take<Real>(kBlockRows);
    w.total = arena.take<Real>(kBlockRows);
    return w;
  }
};

template <typename T, typename Real>
void attend(const BlockCausalAttentionForward& f, const Head<T>& head, int64_t first, int64_t rows, int64_t visible,
            const Workspace<Real>& w) {
  const int64_t D = f.D, Dp = head.Dp, panels = Dp / kColumns<Real>;
  for (int64_t r = 0; r < rows; ++r) {
    head.read_q(first + r, w.q + r * Dp);
    w.largest[r] = -Real(__builtin_inf()), w.total[r] = 0;
  }
  __builtin_memset(w.out, 0, rows * Dp * sizeof(Real));
  for (int64_t key = 0; key < visible; key += kTile) {
    const int64_t width = minimum(kTile, visible - key), padded = round_up(width, kColumns<Real>);
    multiply_panels<false, false>(w.q, Dp, rows, w.panels + key * D, D * kColumns<Real>, kColumns<Real>, D,
                                  padded / kColumns<Real>, w.scores, kTile);
    for (int64_t r = 0; r < rows; ++r) {
      const Real shrink = softmax_row(w.scores + r * kTile, width, padded, w.largest[r], w.total[r]);
      if (shrink == 1) continue;
      for (int64_t d = 0; d < Dp; d += kLanes<Real>) store(w.out + r * Dp + d, load(w.out + r * Dp + d) * shrink);
    }
    multiply_panels<false, true>(w.scores, kTile, rows, w.v + key * Dp, kColumns<Real>, Dp, width, panels, w.out, Dp);
  }
  const int64_t query = head.query(first), row = (head.b * f.H + head.h) * f.queries + query;
  for (int64_t r = 0; r < rows; ++r) {
    Real* out = w.out + r * Dp;
    for (int64_t d = 0; d < Dp; d += kLanes<Real>) store(out + d, load(out + d) / w.total[r]);
    write_row(out, D, head.row(f.out, query + r));
    if (f.largest) ((Real*)f.largest)[row + r] = w.largest[r];
    if (f.total) ((Real*)f.total)[row + r] = w.total[r];
  }
}

template <typename T>
const char* forward(const BlockCausalAttentionForward& f) {
  typedef typename Arithmetic<T>::type Real;
  const BlockCausalAttention& a = f;
  const int64_t heads = a.B * a.H, work = heads * visible_pairs(a) * a.D * 2;
  const int64_t all = thread_count(INT64_MAX, work / kWorkPerByte);
  // With few heads each is shared: its blocks go round a number of parts. A part packs the keys again, which is little
  // beside its blocks, and no result depends on how many there are.
  const int64_t blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const int64_t parts = heads >= 4 * all ? 1 : minimum((4 * all + heads - 1) / heads, blocks);
  const int threads = thread_count(heads * parts, work / kWorkPerByte);
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
        for (int64_t task = 0; task < heads * parts; ++task) {
          const Workspace<Real>& w = workspaces[thread_number()];
          const Head<T> head(a, task / parts);
          for (int64_t l = 0; l < a.L; ++l) head.read_k(l, w.k + l * head.Dp);
          transpose_rows(w.k, a.L, head.Lp, a.D, head.Dp, w.panels);
          for (int64_t l = 0; l < a.L; ++l) head.read_v(l, w.v + l * head.Dp);
          int64_t block = 0;
          for_each_block<kBlockRows>(a, [&](int64_t first, int64_t rows, int64_t visible) {
            if (block++ % parts == task % parts) attend(f, head, first, rows, visible, w);
          });
        }
      });
  return done ? nullptr : kAttentionOutOfMemory;
}

}  // namespace

const char* block_causal_attention_forward(const BlockCausalAttentionForward& args) {
  return dispatch_element(args.dtype, [&](auto element) { return forward<decltype(element)>(args); });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

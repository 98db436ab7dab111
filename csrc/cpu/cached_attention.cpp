// Attention of one scale of a generation: its keys and values are made ready and put into the cache, then the kernel of
// block-causal attention runs with only the last scale's positions as queries.
#include "ops/cached_attention.h"

#include "cpu/attention.h"

namespace varkern::cpu::VARKERN_LEVEL {

// By ordinary lookup the kernel of this level; attention.cpp defines it.
const char* block_causal_attention_forward(const BlockCausalAttentionForward& args);

namespace {

// The n new tokens alone: q, k and v as the projection left them.
template <typename T>
BlockCausalAttention new_tokens(const CachedAttention& c) {
  T* data = (T*)c.qkv;
  const auto part = [&](int64_t i) { return HeadRows{data + i * c.stride_part, c.stride_b, c.stride_h, c.stride_n}; };
  return {part(0), part(1), part(2), c.q_bias, c.v_bias, c.log_scale, nullptr,       0,
          c.B,     c.H,     c.n,     c.D,      c.n,      c.dtype,     c.softmax_scale};
}

HeadRows cache_rows(const CachedAttention& c, void* first) { return {first, c.H * c.N * c.D, c.N * c.D, c.D}; }

template <typename T>
bool append(const CachedAttention& c, const HeadRows& q, const HeadRows& k, const HeadRows& v) {
  typedef typename Arithmetic<T>::type Real;
  const BlockCausalAttention tokens = new_tokens<T>(c);
  const int64_t heads = c.B * c.H, Dp = round_up(c.D, kColumns<Real>);
  const int threads = thread_count(heads, heads * c.n * c.D * 6 * int64_t(sizeof(T)));
  Real* rows = nullptr;
  return with_workspace([&](Arena& arena) { rows = arena.take<Real>(threads * Dp); },
                        [&] {
#pragma omp parallel for num_threads(threads) if (threads > 1)
                          for (int64_t i = 0; i < heads; ++i) {
                            const Head<T> head(tokens, i);
                            Real* row = rows + thread_number() * Dp;
                            for (int64_t l = 0; l < c.n; ++l) {
                              head.read_q(l, row), write_row(row, c.D, head.row(q, l));
                              head.read_k(l, row), write_row(row, c.D, head.row(k, c.position + l));
                              head.read_v(l, row), write_row(row, c.D, head.row(v, c.position + l));
                            }
                          }
                        });
}

// With so few queries a key costs less to multiply than to put into the panels of block-causal attention: its row is
// read once and multiplied across the lanes.
constexpr int64_t kFewQueries = 4, kTile = 128;

template <typename Real>
struct FewWorkspace {
  Real *q, *out, *scores;  // (kFewQueries, Dp), (kFewQueries, Dp), (kFewQueries, keys, padded)
  Real* rows;              // (kTile, Dp) of k or v

  static FewWorkspace make(int64_t line, int64_t Dp, Arena& arena) {
    FewWorkspace w;
    w.q = arena.take<Real>(kFewQueries * Dp);
    w.out = arena.take<Real>(kFewQueries * Dp);
    w.scores = arena.take<Real>(kFewQueries * line);
    w.rows = arena.take<Real>(kTile * Dp);
    return w;
  }
};

template <typename T, typename Real>
void attend_head(const BlockCausalAttentionForward& f, const Head<T>& head, const FewWorkspace<Real>& w) {
  const BlockCausalAttention& a = f;
  const int64_t Dp = head.Dp, line = head.Lp, first = a.L - a.queries;
  for (int64_t r = 0; r < a.queries; ++r) head.read_q(first + r, w.q + r * Dp);
  for (int64_t key = 0; key < a.L; ++key) {
    head.read_k(key, w.rows);
    for (int64_t r = 0; r < a.queries; ++r) w.scores[r * line + key] = dot(w.q + r * Dp, w.rows, Dp);
  }
  Real largest[kFewQueries], total[kFewQueries];
  for (int64_t r = 0; r < a.queries; ++r) {
    largest[r] = -Real(__builtin_inf()), total[r] = 0;
    softmax_row(w.scores + r * line, a.L, line, largest[r], total[r]);
  }
  __builtin_memset(w.out, 0, a.queries * Dp * sizeof(Real));
  for (int64_t key = 0; key < a.L; key += kTile) {
    const int64_t width = minimum(kTile, a.L - key);
    for (int64_t i = 0; i < width; ++i) head.read_v(key + i, w.rows + i * Dp);
    multiply_panels<false, true>(w.scores + key, line, a.queries, w.rows, kColumns<Real>, Dp, width,
                                 Dp / kColumns<Real>, w.out, Dp);
  }
  for (int64_t r = 0; r < a.queries; ++r) {
    Real* out = w.out + r * Dp;
    for (int64_t d = 0; d < Dp; d += kLanes<Real>) store(out + d, load(out + d) / total[r]);
    write_row(out, a.D, head.row(f.out, r));
  }
}

template <typename T>
bool attend_few(const BlockCausalAttentionForward& f) {
  typedef typename Arithmetic<T>::type Real;
  const BlockCausalAttention& a = f;
  const int64_t heads = a.B * a.H, columns = kColumns<Real>;
  const int threads = thread_count(heads, heads * a.L * a.D * 2 * int64_t(sizeof(T)));
  FewWorkspace<Real>* workspaces = nullptr;
  return with_workspace(
      [&](Arena& arena) {
        workspaces = arena.take<FewWorkspace<Real>>(threads);
        for (int t = 0; t < threads; ++t) {
          const auto w = FewWorkspace<Real>::make(round_up(a.L, columns), round_up(a.D, columns), arena);
          if (workspaces) workspaces[t] = w;
        }
      },
      [&] {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t head = 0; head < heads; ++head) attend_head(f, Head<T>(a, head), workspaces[thread_number()]);
      });
}

template <typename T>
const char* attend(const CachedAttention& c) {
  const HeadRows k = cache_rows(c, c.cache), v = cache_rows(c, (T*)c.cache + c.B * c.H * c.N * c.D);
  const HeadRows q = {c.q, c.H * c.n * c.D, c.n * c.D, c.D}, out = {c.out, c.n * c.H * c.D, c.D, c.H * c.D};
  if (!append<T>(c, q, k, v)) return kAttentionOutOfMemory;
  const int64_t lengths[] = {c.position, c.n};
  const BlockCausalAttention args = {q,   k,   v,   nullptr,          nullptr, nullptr, lengths, 2,
                                     c.B, c.H, c.position + c.n, c.D, c.n,     c.dtype, 1.0};
  const BlockCausalAttentionForward f = {args, out, nullptr, nullptr};
  if (c.n > kFewQueries) return block_causal_attention_forward(f);
  return attend_few<T>(f) ? nullptr : kAttentionOutOfMemory;
}

}  // namespace

const char* cached_attention(const CachedAttention& args) {
  return dispatch_element(args.dtype, [&](auto element) { return attend<decltype(element)>(args); });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

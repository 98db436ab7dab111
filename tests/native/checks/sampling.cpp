// Runs csrc/cuda/sampling.cu against an oracle in float64 that sorts: every dtype, with and without guidance, top-k and
// top-p, rows in registers and rows that are read again.
#include "cuda/sampling.cu"

#include <math.h>

#include <algorithm>
#include <vector>

#include "check.h"

using check::Array;
using check::Buffer;
using varkern::DType;

namespace {

struct Case {
  int64_t B, n, V, top_k;
  double guidance, top_p;
  bool guided;
};

// The best and the second-best p / noise of a row, and the code of the best.
struct Draw {
  double best = -1, second = -1;
  int64_t code = -1;
};

Draw oracle(const std::vector<float>& logits, const float* noise, const Case& c) {
  std::vector<int64_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return logits[size_t(a)] != logits[size_t(b)] ? logits[size_t(a)] > logits[size_t(b)] : a > b;
  });
  size_t kept = order.size();
  if (c.top_k > 0) {  // equal logits stay together
    const float threshold = logits[size_t(order[size_t(c.top_k) - 1])];
    for (kept = 0; kept < order.size() && logits[size_t(order[kept])] >= threshold;) ++kept;
  }
  std::vector<double> p(kept);
  double total = 0, above = 0;
  for (size_t i = 0; i < kept; ++i) total += p[i] = exp(double(logits[size_t(order[i])]) - logits[size_t(order[0])]);
  Draw draw;
  for (size_t i = 0; i < kept; ++i) {
    if (c.top_p > 0 && i > 0 && total - above <= (1 - c.top_p) * total) break;
    above += p[i];
    const double ratio = p[i] / noise[order[i]];
    if (ratio > draw.best) {
      draw = {ratio, draw.best, order[i]};
    } else if (ratio > draw.second) {
      draw.second = ratio;
    }
  }
  return draw;
}

void run(const Case& c, DType dtype) {
  const int64_t rows = c.B * c.n, stride = c.V + 3, halves = c.guided ? 2 : 1;
  std::mt19937 random{unsigned(c.V + c.top_k)};
  Array logits(dtype, (halves * rows - 1) * stride + c.V);
  Buffer<float> noise(rows * c.V);
  Buffer<int64_t> tokens(rows);
  for (int64_t i = 0; i < logits.size(); ++i) logits.set(i, float(int32_t(random())) * 0x1p-29f);
  for (int64_t i = 0; i < noise.size(); ++i) noise[i] = -logf((float(random() >> 8) + 1) * 0x1p-24f) + 1e-7f;
  check::ran(varkern::cuda::sample_tokens({logits.data(), noise.data(), tokens.data(), nullptr, c.B, c.n, c.V,
                                           c.n * stride, stride, c.top_k, c.guidance, c.top_p, dtype, c.guided},
                                          nullptr));
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> row(size_t(c.V));
    for (int64_t v = 0; v < c.V; ++v) {
      const float cond = logits.at(r * stride + v);
      row[size_t(v)] = c.guided ? float(1 + c.guidance) * cond - float(c.guidance) * logits.at((rows + r) * stride + v)
                                : cond;
    }
    const Draw draw = oracle(row, noise.data() + r * c.V, c);
    const bool near_tie = draw.second > draw.best * (1 - 1e-4);
    check::expect(tokens[r] == draw.code || near_tie, "row %lld of V %lld, top_k %lld, top_p %g, dtype %d: %lld, not %lld",
                  (long long)r, (long long)c.V, (long long)c.top_k, c.top_p, int(dtype), (long long)tokens[r],
                  (long long)draw.code);
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 2, 50, 0, 0, 0, false},   {2, 1, 200, 20, 1.5, 0.9, true}, {1, 2, 33, 33, 0, 0.5, false},
      {1, 1, 1, 1, 0, 1.0, false},  {1, 2, 300, 0, 3.0, 0.96, true}, {1, 1, 4500, 900, 1.5, 0.96, true},
      {1, 1, 4500, 0, 0, 0, false},
  };
  for (const Case& c : cases) {
    for (DType dtype : {varkern::kFloat32, varkern::kFloat16, varkern::kBFloat16}) run(c, dtype);
  }
  return check::result();
}

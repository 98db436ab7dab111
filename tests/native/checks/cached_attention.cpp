// Runs csrc/cuda/cached_attention.cu against float64: every dtype, width and kernel, the keys split and not.
//
// Two steps, so that no rounding is judged twice: what the append left in the scratch and in the cache against the
// projection, then the output against softmax attention over what it left.
#include "cuda/cached_attention.cu"

#include <math.h>

#include <algorithm>
#include <vector>

#include "check.h"

using check::Array;
using check::Buffer;
using varkern::DType;

// Not an unnamed namespace: nvcc's stubs would confuse it with the unnamed one of csrc.
namespace cached_attention_check {

constexpr double kLog2e = 1.4426950408889634;

struct Shape {
  int64_t B, n, H, D, position, spare, splits;
  bool prologue;  // biases and norms
};

struct Step {
  Shape s;
  DType dtype;
  int64_t N, stride_n;  // of the cache, and between the tokens of qkv, with a gap
  Array qkv, cache, before, q, out;
  Buffer<float> q_bias, v_bias, log_scale, workspace;

  Step(const Shape& shape, DType type)
      : s(shape), dtype(type), N(s.position + s.n + s.spare), stride_n(3 * s.H * s.D + 8),
        qkv(type, (s.B * s.n - 1) * stride_n + 3 * s.H * s.D), cache(type, 2 * s.B * s.H * N * s.D),
        before(type, cache.size()), q(type, s.B * s.n * s.H * s.D), out(type, q.size()), q_bias(s.H * s.D),
        v_bias(s.H * s.D), log_scale(s.H), workspace(s.splits > 1 ? s.splits * s.B * s.H * s.n * (s.D + 2) : 1) {
    std::mt19937 random{unsigned(s.n * 1000 + s.D)};
    qkv.fill(random), before.fill(random);
    const auto uniform = [&] { return float(int32_t(random())) * 0x1p-31f; };
    for (int64_t i = 0; i < s.H * s.D; ++i) q_bias[i] = uniform(), v_bias[i] = uniform();
    for (int64_t h = 0; h < s.H; ++h) log_scale[h] = 1.0f + 4.0f * float(h);  // the second is above log 100
    for (int64_t part = 0; part < 2; ++part) {
      for (int64_t row = 0; row < s.B * s.H * N; ++row) {
        for (int64_t d = 0; d < s.D; ++d) {
          const int64_t i = (part * s.B * s.H * N + row) * s.D + d;
          if (row % N < s.position) {
            cache.set(i, before.at(i) * (part ? 1.0f : 0.25f));
          } else {
            cache.set(i, NAN);
          }
          before.set(i, cache.at(i));
        }
      }
    }
  }

  varkern::CachedAttention args(double softmax_scale) const {
    return {qkv.data(),
            s.prologue ? q_bias.data() : nullptr,
            s.prologue ? v_bias.data() : nullptr,
            s.prologue ? log_scale.data() : nullptr,
            cache.data(),
            q.data(),
            out.data(),
            s.B,
            s.n,
            s.H,
            s.D,
            N,
            s.position,
            s.n * stride_n,
            stride_n,
            s.H * s.D,
            s.D,
            dtype,
            softmax_scale};
  }

  double at(int64_t b, int64_t i, int64_t part, int64_t h, int64_t d) const {
    return qkv.at((b * s.n + i) * stride_n + (part * s.H + h) * s.D + d);
  }
  int64_t cached(int64_t part, int64_t b, int64_t h, int64_t row) const {
    return (((part * s.B + b) * s.H + h) * N + row) * s.D;
  }
};

void expect_close(const Step& t, const char* name, int64_t i, double ours, double exact, double bound) {
  check::expect(fabs(ours - exact) <= bound,  // false for NaN
                "%s[%lld] of (%lld, %lld, 3, %lld, %lld) at %lld, %lld splits, dtype %d: %g, expected %g within %g",
                name, (long long)i, (long long)t.s.B, (long long)t.s.n, (long long)t.s.H, (long long)t.s.D,
                (long long)t.s.position, (long long)t.s.splits, int(t.dtype), ours, exact, bound);
}

// One rounding to the dtype, near zero to float16's steps of 2^-24, and of float32: a sum of D squares, eight
// operations, and 2^-23 where a bias of up to 1 is added.
void check_append(const Step& t, double softmax_scale) {
  const int64_t B = t.s.B, n = t.s.n, H = t.s.H, D = t.s.D, position = t.s.position;
  const bool prologue = t.s.prologue;
  const double relative = check::epsilon(t.dtype) / 2 + double(D + 8) * 0x1p-24;
  const double step = t.dtype == varkern::kFloat16 ? 0x1p-25 : 0.0;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      const double temperature = exp(std::min(double(t.log_scale[h]), varkern::kMaxLogScale));
      for (int64_t i = 0; i < n; ++i) {
        double q_square = 0, k_square = 0;
        const auto q = [&](int64_t d) { return t.at(b, i, 0, h, d) + (prologue ? double(t.q_bias[h * D + d]) : 0.0); };
        for (int64_t d = 0; d < D; ++d) q_square += q(d) * q(d), k_square += pow(t.at(b, i, 1, h, d), 2);
        const double q_factor = softmax_scale * kLog2e * (prologue ? temperature / sqrt(q_square) : 1.0);
        const double k_factor = prologue ? 1.0 / sqrt(k_square) : 1.0;
        for (int64_t d = 0; d < D; ++d) {
          const int64_t at = ((b * H + h) * n + i) * D + d;
          const int64_t k = t.cached(0, b, h, position + i) + d, v = t.cached(1, b, h, position + i) + d;
          expect_close(t, "q", at, t.q.at(at), q(d) * q_factor, (relative * fabs(q(d)) + 0x1p-23) * q_factor + step);
          expect_close(t, "k", k, t.cache.at(k), t.at(b, i, 1, h, d) * k_factor,
                       relative * fabs(t.at(b, i, 1, h, d)) * k_factor + step);
          const double value = t.at(b, i, 2, h, d) + (prologue ? double(t.v_bias[h * D + d]) : 0.0);
          expect_close(t, "v", v, t.cache.at(v), value, relative * fabs(value) + 0x1p-23 + step);
        }
      }
    }
  }
  for (int64_t i = 0; i < t.cache.size(); ++i) {
    const int64_t row = i / D % t.N;
    if (row >= position && row < position + n) continue;
    const float now = t.cache.at(i), was = t.before.at(i);
    check::expect(now == was || (now != now && was != was), "cache[%lld] was %g and became %g", (long long)i, was, now);
  }
}

// What rounds: the powers and the result to the dtype; in float32 D products a score, then the powers and their sums.
void check_output(const Step& t) {
  const int64_t B = t.s.B, n = t.s.n, H = t.s.H, D = t.s.D, keys = t.s.position + n;
  std::vector<double> powers(static_cast<size_t>(keys)), sums(static_cast<size_t>(D));
  for (int64_t row = 0; row < B * H * n; ++row) {
    const int64_t b = row / (H * n), h = row / n % H, i = row % n;
    double largest = -INFINITY, size = 0, total = 0, widest = 0;
    for (int64_t j = 0; j < keys; ++j) {
      double score = 0, terms = 0;
      for (int64_t d = 0; d < D; ++d) {
        const double product = double(t.q.at(row * D + d)) * t.cache.at(t.cached(0, b, h, j) + d);
        score += product, terms += fabs(product);
      }
      powers[size_t(j)] = score;
      largest = std::max(largest, score), size = std::max(size, terms);
    }
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t j = 0; j < keys; ++j) {
      const double power = exp2(powers[size_t(j)] - largest);
      total += power;
      for (int64_t d = 0; d < D; ++d) {
        const double value = t.cache.at(t.cached(1, b, h, j) + d);
        sums[size_t(d)] += power * value, widest = std::max(widest, fabs(value));
      }
    }
    const double bound = widest * (check::epsilon(t.dtype) + 0x1p-23 * (double(D) * size + double(keys) + 16.0));
    for (int64_t d = 0; d < D; ++d) {
      const int64_t at = ((b * n + i) * H + h) * D + d;
      expect_close(t, "out", at, t.out.at(at), sums[size_t(d)] / total, bound);
    }
  }
}

void run(const Shape& shape, DType dtype) {
  const Step t(shape, dtype);
  const double softmax_scale = shape.prologue ? 1.0 : 0.125;
  float* workspace = shape.splits > 1 ? t.workspace.data() : nullptr;
  check::ran(varkern::cuda::cached_attention({t.args(softmax_scale), workspace, shape.splits}, nullptr));
  check_append(t, softmax_scale);
  check_output(t);
}

// The kernel with 32 rows a warp, which the launch would choose for many more heads.
void run_wide_tile(DType dtype) {
  const Shape shape = {1, 130, 1, 64, 20, 0, 1, true};
  const Step t(shape, dtype);
  check::ran(varkern::cuda::cached_attention({t.args(1.0), nullptr, 1}, nullptr));
  Array keep(dtype, t.out.size());
  for (int64_t i = 0; i < keep.size(); ++i) keep.set(i, t.out.at(i)), const_cast<Array&>(t.out).set(i, NAN);
  const varkern::cuda::Attention a = {t.q.data(), t.cache.data(), static_cast<uint16_t*>(t.cache.data()) + t.N * 64,
                                      t.out.data(), nullptr, 1, 1, 1, 130, int(t.N), 150};
  check::ran(dtype == varkern::kFloat16 ? varkern::cuda::launch_half<varkern::float16, 64, 4, 2>(a, nullptr)
                                        : varkern::cuda::launch_half<varkern::bfloat16, 64, 4, 2>(a, nullptr));
  check_output(t);
  for (int64_t i = 0; i < keep.size(); ++i) {
    check::expect(t.out.at(i) == keep.at(i), "the wide tile's out[%lld]: %g, and %g of the other", (long long)i,
                  t.out.at(i), keep.at(i));
  }
}

}  // namespace cached_attention_check

int main() {
  using cached_attention_check::Shape;
  const Shape shapes[] = {
      {2, 1, 1, 32, 0, 2, 1, true},     // a key alone
      {1, 3, 2, 128, 70, 1, 2, true},   // one warp, or eight rows of float32; a part of a tile in the last split
      {2, 9, 3, 64, 5, 3, 1, false},    // heads that fill no warp of the append
      {1, 2, 1, 64, 3, 0, 2, true},     // a split without keys
      {1, 37, 2, 32, 40, 1, 1, true},   // whole warps of a block without queries
      {1, 66, 1, 64, 100, 0, 3, true},  // two tiles of queries, three splits
      {1, 17, 1, 128, 64, 1, 1, false},
  };
  for (DType dtype : {varkern::kFloat32, varkern::kFloat16, varkern::kBFloat16}) {
    for (const Shape& shape : shapes) cached_attention_check::run(shape, dtype);
    if (dtype != varkern::kFloat32) cached_attention_check::run_wide_tile(dtype);
  }
  return check::result();
}

// Runs csrc/cuda/norm.cu against sums in float64: every dtype, both kinds of kernel, shapes that fill no block.
//
// What this is for are the sanitizers; norm_check.py judges the accuracy. The bound here is rounding in the output's
// dtype and a float32 rounding for each term of the sums.
#include "cuda/norm.cu"

#include <math.h>

#include <vector>

#include "check.h"

using check::Array;
using check::Buffer;
using varkern::DType;

namespace {

struct Shape {
  int64_t B, L, C;
  bool padded;  // rows have a gap of three elements, which takes the generic kernels
};

struct Case {
  Shape shape;
  DType x_dtype, cond_dtype, out_dtype;
};

void expect_close(const Case& c, const char* name, int64_t i, double ours, double exact, double terms, DType dtype) {
  const double bound = check::epsilon(dtype) * fabs(exact) + 0x1p-23 * terms;
  check::expect(fabs(ours - exact) <= bound,  // false for NaN
                "%s[%lld] of (%lld, %lld, %lld), padded %d, dtypes %d and %d: %g, expected %g within %g", name,
                (long long)i, (long long)c.shape.B, (long long)c.shape.L, (long long)c.shape.C, int(c.shape.padded),
                int(c.x_dtype), int(c.cond_dtype), ours, exact, bound);
}

void run(const Case& c) {
  const auto [B, L, C, padded] = c.shape;
  const int64_t stride = padded ? C + 3 : C, chunks = 2;
  std::mt19937 random{unsigned(C)};
  // A padded row's gap would follow the last row too, so the buffers end with it.
  const int64_t rows = (B * L - 1) * stride + C, conds = (B - 1) * stride + C;
  Array x(c.x_dtype, rows), scale(c.cond_dtype, conds), shift(c.cond_dtype, conds), grad_out(c.out_dtype, rows);
  for (Array* input : {&x, &scale, &shift, &grad_out}) input->fill(random);

  Array out(c.out_dtype, B * L * C), grad_x(c.x_dtype, B * L * C);
  Buffer<float> mean(B * L), rstd(B * L), grad_scale(B * C), grad_shift(B * C), workspace(2 * B * chunks * C);
  const float eps = 1e-6f;
  check::ran(varkern::cuda::modulated_layer_norm_forward(
      {x.data(), scale.data(), shift.data(), out.data(), mean.data(), rstd.data(), B, L, C, L * stride, stride, stride,
       stride, c.x_dtype, c.cond_dtype, c.out_dtype, eps},
      nullptr));
  check::ran(varkern::cuda::modulated_layer_norm_backward(
      {{grad_out.data(), x.data(), scale.data(), mean.data(), rstd.data(), grad_x.data(), grad_scale.data(),
        grad_shift.data(), B, L, C, L * stride, stride, L * stride, stride, stride, c.x_dtype, c.cond_dtype,
        c.out_dtype},
       workspace.data(), chunks},
      nullptr));

  for (int64_t b = 0; b < B; ++b) {
    std::vector<double> scale_sum(size_t(C), 0.0), shift_sum(size_t(C), 0.0);
    for (int64_t l = 0; l < L; ++l) {
      const int64_t row = b * L + l;
      double m = 0.0, variance = 0.0, sum_d = 0.0, sum_dh = 0.0;
      for (int64_t i = 0; i < C; ++i) m += x.at(row * stride + i) / double(C);
      for (int64_t i = 0; i < C; ++i) variance += pow(x.at(row * stride + i) - m, 2) / double(C);
      const double r = 1.0 / sqrt(variance + eps), terms = double(C + L + 8) * (1.0 + r * r);
      const auto h = [&](int64_t i) { return (x.at(row * stride + i) - m) * r; };
      const auto d = [&](int64_t i) { return grad_out.at(row * stride + i) * (1.0 + scale.at(b * stride + i)); };
      for (int64_t i = 0; i < C; ++i) sum_d += d(i), sum_dh += d(i) * h(i);
      for (int64_t i = 0; i < C; ++i) {
        const double g = grad_out.at(row * stride + i), y = h(i) * (1.0 + scale.at(b * stride + i));
        expect_close(c, "out", row * C + i, out.at(row * C + i), y + shift.at(b * stride + i), terms, c.out_dtype);
        expect_close(c, "grad_x", row * C + i, grad_x.at(row * C + i),
                     r * (d(i) - sum_d / double(C) - h(i) * sum_dh / double(C)), terms, c.x_dtype);
        scale_sum[size_t(i)] += g * h(i), shift_sum[size_t(i)] += g;
      }
      expect_close(c, "mean", row, mean[row], m, terms, varkern::kFloat32);
      expect_close(c, "rstd", row, rstd[row], r, terms * r, varkern::kFloat32);
    }
    for (int64_t i = 0; i < C; ++i) {
      const double terms = double(C + L + 8) * 4.0;
      expect_close(c, "grad_scale", b * C + i, grad_scale[b * C + i], scale_sum[size_t(i)], terms, varkern::kFloat32);
      expect_close(c, "grad_shift", b * C + i, grad_shift[b * C + i], shift_sum[size_t(i)], terms, varkern::kFloat32);
    }
  }
}

}  // namespace

int main() {
  const DType dtypes[] = {varkern::kFloat32, varkern::kFloat16, varkern::kBFloat16};
  // Less than a warp's share of a row, and two warps with a part of the second.
  const Shape shapes[] = {{2, 3, 40, false}, {1, 5, 520, false}, {2, 3, 13, true}};
  for (DType x : dtypes) {
    for (DType cond : dtypes) {
      for (const Shape& shape : shapes) run({shape, x, cond, x == cond ? x : varkern::kFloat32});
    }
  }
  return check::result();
}

// Runs csrc/cuda/gated_norm.cu against float64: every mixture of dtypes, both kinds of kernel.
//
// Two steps, so that no rounding is judged twice: the updated x against its inputs, then out against the layer norm of
// the x that was left.
#include "cuda/gated_norm.cu"

#include <math.h>

#include "check.h"

using check::Array;
using varkern::DType;

namespace gated_norm_check {

struct Shape {
  int64_t B, L, C;
  bool padded;  // rows of h have a gap of three elements, which takes the generic kernel
};

void expect_close(const Shape& s, const char* name, int64_t i, double ours, double exact, double bound, DType x,
                  DType h, DType cond) {
  check::expect(fabs(ours - exact) <= bound,  // false for NaN
                "%s[%lld] of (%lld, %lld, %lld), padded %d, dtypes %d, %d and %d: %g, expected %g within %g", name,
                (long long)i, (long long)s.B, (long long)s.L, (long long)s.C, int(s.padded), int(x), int(h), int(cond),
                ours, exact, bound);
}

void run(const Shape& s, DType x_dtype, DType h_dtype, DType cond_dtype) {
  const auto [B, L, C, padded] = s;
  const DType out_dtype = x_dtype == cond_dtype ? x_dtype : varkern::kFloat32;
  const int64_t stride = padded ? C + 3 : C, conds = (B - 1) * 2 * C + C;
  std::mt19937 random{unsigned(C)};
  // Every other condition belongs to something else; the buffers end with the last one's.
  Array x(x_dtype, B * L * C), h(h_dtype, (B * L - 1) * stride + C), gate(cond_dtype, conds), scale(cond_dtype, conds),
      shift(cond_dtype, conds), out(out_dtype, B * L * C), before(x_dtype, B * L * C);
  for (Array* input : {&x, &h, &gate, &scale, &shift}) input->fill(random);
  for (int64_t i = 0; i < x.size(); ++i) before.set(i, x.at(i));
  const float eps = 1e-6f;
  check::ran(varkern::cuda::gated_residual_layer_norm(
      {x.data(), h.data(), gate.data(), scale.data(), shift.data(), out.data(), B, L, C, L * stride, stride, 2 * C,
       2 * C, 2 * C, x_dtype, h_dtype, cond_dtype, out_dtype, eps},
      nullptr));

  for (int64_t row = 0; row < B * L; ++row) {
    const int64_t b = row / L;
    double mean = 0.0, variance = 0.0;
    for (int64_t c = 0; c < C; ++c) {
      const int64_t at = row * C + c;
      const double exact = before.at(at) + double(gate.at(b * 2 * C + c)) * h.at(row * stride + c);
      // One rounding to the dtype, near zero to float16's steps, and two of float32 terms of at most 1.
      const double bound = check::epsilon(x_dtype) / 2 * fabs(exact) + 0x1p-23 + 0x1p-25;
      expect_close(s, "x", at, x.at(at), exact, bound, x_dtype, h_dtype, cond_dtype);
      mean += x.at(at) / double(C);
    }
    for (int64_t c = 0; c < C; ++c) variance += pow(x.at(row * C + c) - mean, 2) / double(C);
    const double rstd = 1.0 / sqrt(variance + eps), terms = double(C + 8) * (1.0 + rstd * rstd);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t at = row * C + c;
      const double exact = (x.at(at) - mean) * rstd * (1.0 + scale.at(b * 2 * C + c)) + shift.at(b * 2 * C + c);
      expect_close(s, "out", at, out.at(at), exact, check::epsilon(out_dtype) * fabs(exact) + 0x1p-23 * terms, x_dtype,
                   h_dtype, cond_dtype);
    }
  }
}

}  // namespace gated_norm_check

int main() {
  const DType dtypes[] = {varkern::kFloat32, varkern::kFloat16, varkern::kBFloat16};
  // Less than a warp's share of a row, two warps with a part of the second, and rows without packs.
  const gated_norm_check::Shape shapes[] = {{2, 3, 40, false}, {1, 5, 520, false}, {2, 3, 13, true}};
  for (DType x : dtypes) {
    for (DType h : dtypes) {
      for (DType cond : dtypes) {
        for (const auto& shape : shapes) gated_norm_check::run(shape, x, h, cond);
      }
    }
  }
  return check::result();
}

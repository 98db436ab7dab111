// Runs csrc/cuda/group_norm.cu against float64: every dtype, memory format and kernel, chunks that end anywhere.
#include "cuda/group_norm.cu"

#include <math.h>

#include <vector>

#include "check.h"

using check::Array;
using check::Buffer;
using varkern::DType;

// Not an unnamed namespace: nvcc's stubs would confuse it with the unnamed one of csrc.
namespace group_norm_check {

struct Shape {
  int64_t B, C, P, groups, chunk_pixels;
  bool channels_last;
  double offset;  // of all elements
};

void run(const Shape& s, DType dtype, bool silu, bool affine) {
  const auto [B, C, P, groups, chunk_pixels, channels_last, offset] = s;
  const int64_t width = C / groups, chunks = (P + chunk_pixels - 1) / chunk_pixels;
  std::mt19937 random{unsigned(C * P)};
  Array x(dtype, B * C * P), out(dtype, B * C * P);
  Buffer<float> weight(C), bias(C), coefficients((affine ? 2 : 3) * B * C);
  Buffer<double> partial(B * groups * chunks * 2);
  x.fill(random);
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, float(double(x.at(i)) + offset));
  for (int64_t c = 0; c < C; ++c) {
    weight[c] = 1.0f + 0.5f * float(int32_t(random())) * 0x1p-31f, bias[c] = float(int32_t(random())) * 0x1p-31f;
  }
  check::ran(varkern::cuda::group_norm({{x.data(), weight.data(), bias.data(), affine ? nullptr : out.data(),
                                         coefficients.data(), B, C, P, groups, dtype, channels_last, silu, 1e-6},
                                        partial.data(), chunk_pixels},
                                       nullptr));
  const auto at = [&](int64_t b, int64_t c, int64_t p) {
    return channels_last ? (b * P + p) * C + c : (b * C + c) * P + p;
  };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      const int64_t first = c / width * width;
      double mean = 0.0, variance = 0.0;
      for (int64_t i = 0; i < width * P; ++i) mean += x.at(at(b, first + i / P, i % P)) / double(width * P);
      for (int64_t i = 0; i < width * P; ++i) {
        variance += pow(x.at(at(b, first + i / P, i % P)) - mean, 2) / double(width * P);
      }
      const double multiplier = weight[c] / sqrt(variance + 1e-6);
      // Sums of P squares, the multiplier's rounding and that of what is added to it.
      const double relative = double(P + 8) * 0x1p-24, small = 0x1p-23 * (1.0 + fabs(multiplier));
      const double centre = affine ? 0.0 : double(float(mean));
      const double exact_offset = bias[c] - (mean - centre) * double(coefficients[b * C + c]);
      check::expect(fabs(coefficients[b * C + c] - multiplier) <= relative * fabs(multiplier) + small,
                    "multiplier %lld of dtype %d, channels_last %d: %g, expected %g", (long long)c, int(dtype),
                    int(channels_last), double(coefficients[b * C + c]), multiplier);
      check::expect(fabs(coefficients[(B + b) * C + c] - exact_offset) <= 0x1p-24 * fabs(exact_offset) + small,
                    "offset %lld of dtype %d, channels_last %d: %g, expected %g", (long long)c, int(dtype),
                    int(channels_last), double(coefficients[(B + b) * C + c]), exact_offset);
      for (int64_t p = 0; p < P && !affine; ++p) {
        const double z = (x.at(at(b, c, p)) - mean) * multiplier + bias[c], exact = silu ? z / (1.0 + exp(-z)) : z;
        const double terms = (relative + 16.0 * 0x1p-24) * (fabs(z) + 1.0) + small;
        const double bound = check::epsilon(dtype) * fabs(exact) + terms;
        const double ours = out.at(at(b, c, p));
        check::expect(fabs(ours - exact) <= bound,  // false for NaN
                      "out[%lld, %lld, %lld] of (%lld, %lld, %lld), dtype %d, channels_last %d: %g, not %g within %g",
                      (long long)b, (long long)c, (long long)p, (long long)B, (long long)C, (long long)P, int(dtype),
                      int(channels_last), ours, exact, bound);
      }
    }
  }
}

}  // namespace group_norm_check

int main() {
  const group_norm_check::Shape shapes[] = {
      {2, 40, 21, 8, 16, true, 0.0},    // packs of channels, groups across them, few pixels in the last chunk
      {1, 264, 37, 11, 16, true, 30.0},  // rows that leave threads idle
      {1, 640, 5, 32, 4, true, 0.0},
      {2, 6, 19, 3, 8, true, 0.0},       // no packs
      {2, 6, 40, 3, 16, false, 30.0},    // packs of pixels
      {1, 4, 2056, 2, 2056, false, 0.0},  // more than a pack a thread
      {2, 9, 35, 3, 16, false, 0.0},     // no packs
  };
  for (DType dtype : {varkern::kFloat32, varkern::kFloat16, varkern::kBFloat16}) {
    for (const auto& shape : shapes) {
      group_norm_check::run(shape, dtype, true, false);
      group_norm_check::run(shape, dtype, false, true);
    }
    group_norm_check::run(shapes[0], dtype, false, false);
  }
  return check::result();
}

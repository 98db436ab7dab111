// Modulated layer norm on the CPU: one row at a time in the first-level cache, vectorised over C, threads over rows.
#include "ops/norm.h"

#include "common/dispatch_dtype.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int64_t kBackwardRows = 32;  // rows of one partial sum of grad_scale and grad_shift

template <typename X, typename Cond, typename Out>
void forward(const ModulatedLayerNormForward& a) {
  const int64_t rows = a.B * a.L, C = a.C;
  const int threads = thread_count(rows, rows * C * int64_t(sizeof(X) + sizeof(Out)));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / a.L, l = row % a.L;
    const X* x = (const X*)a.x + b * a.x_stride_b + l * a.x_stride_l;
    const Cond* scale = (const Cond*)a.scale + b * a.scale_stride_b;
    const Cond* shift = (const Cond*)a.shift + b * a.shift_stride_b;
    Out* out = (Out*)a.out + row * C;
    const Statistics s = row_statistics(x, C, a.eps);
    normalise_row(x, s, scale, shift, out, C);
    if (a.mean) a.mean[row] = s.mean;
    if (a.rstd) a.rstd[row] = s.rstd;
  }
}

// One row: grad_x, and its terms added to the sums of the row's chunk.
template <typename X, typename Cond, typename Out>
void backward_row(const Out* grad_out, const X* x, const Cond* scale, float mean, float rstd, X* grad_x,
                  float* scale_sum, float* shift_sum, int64_t C) {
  const int64_t body = C / kWidth * kWidth, tail = C - body;
  Floats sum_d{}, sum_dh{};
  for (int64_t c = 0; c < body; c += kWidth) {
    const Floats g = load(grad_out + c), h = (load(x + c) - mean) * rstd, d = g * (1.0f + load(scale + c));
    sum_d += d;
    sum_dh += d * h;
    store(shift_sum + c, load(shift_sum + c) + g);
    store(scale_sum + c, load(scale_sum + c) + g * h);
  }
  if (tail) {  // lanes past C hold g = 0, so they add nothing
    const Floats g = load(grad_out + body, tail), h = (load(x + body, tail) - mean) * rstd;
    const Floats d = g * (1.0f + load(scale + body, tail));
    sum_d += d;
    sum_dh += select(first_lanes(tail), d * h, Floats{});
    store(shift_sum + body, load(shift_sum + body, tail) + g, tail);
    store(scale_sum + body, load(scale_sum + body, tail) + g * h, tail);
  }
  const float mean_d = sum_lanes(sum_d) / float(C), mean_dh = sum_lanes(sum_dh) / float(C);
  for (int64_t c = 0; c < body; c += kWidth) {
    const Floats g = load(grad_out + c), h = (load(x + c) - mean) * rstd, d = g * (1.0f + load(scale + c));
    store(grad_x + c, rstd * (d - mean_d - h * mean_dh));
  }
  if (tail) {
    const Floats g = load(grad_out + body, tail), h = (load(x + body, tail) - mean) * rstd;
    const Floats d = g * (1.0f + load(scale + body, tail));
    store(grad_x + body, rstd * (d - mean_d - h * mean_dh), tail);
  }
}

// out[c] = sum over chunks of partial[chunk * stride + c], in the order of the chunks.
void sum_chunks(const float* partial, int64_t chunks, int64_t stride, float* out, int64_t C) {
  const int64_t body = C / kWidth * kWidth;
  for (int64_t c = 0; c < C; c += kWidth) {
    const int64_t n = c < body ? kWidth : C - body;
    Floats sum{};
    for (int64_t k = 0; k < chunks; ++k) sum += load(partial + k * stride + c, n);
    store(out + c, sum, n);
  }
}

template <typename X, typename Cond, typename Out>
const char* backward(const ModulatedLayerNormBackward& a) {
  const int64_t C = a.C, chunks = (a.L + kBackwardRows - 1) / kBackwardRows;
  const int threads = thread_count(a.B * chunks, a.B * a.L * C * int64_t(2 * sizeof(X) + sizeof(Out)));
  // (B, chunks, 2, C): sums of grad_scale and grad_shift over kBackwardRows rows. The chunks depend on L alone, so
  // the result does not depend on the number of threads.
  float* partial = (float*)__builtin_calloc(a.B * chunks * 2 * C + 1, sizeof(float));
  if (!partial) return "out of memory for the partial sums of the modulated layer norm's backward pass";
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.B * chunks; ++task) {
      const int64_t b = task / chunks, begin = task % chunks * kBackwardRows;
      const int64_t end = begin + kBackwardRows < a.L ? begin + kBackwardRows : a.L;
      const Cond* scale = (const Cond*)a.scale + b * a.scale_stride_b;
      float* sums = partial + task * 2 * C;
      for (int64_t l = begin; l < end; ++l) {
        const int64_t row = b * a.L + l;
        backward_row((const Out*)a.grad_out + b * a.grad_out_stride_b + l * a.grad_out_stride_l,
                     (const X*)a.x + b * a.x_stride_b + l * a.x_stride_l, scale, a.mean[row], a.rstd[row],
                     (X*)a.grad_x + row * C, sums, sums + C, C);
      }
    }
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.B; ++b) {
      const float* sums = partial + b * chunks * 2 * C;
      sum_chunks(sums, chunks, 2 * C, a.grad_scale + b * C, C);
      sum_chunks(sums + C, chunks, 2 * C, a.grad_shift + b * C, C);
    }
  }
  __builtin_free(partial);
  return nullptr;
}

}  // namespace

const char* modulated_layer_norm_forward(const ModulatedLayerNormForward& args) {
  return dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) -> const char* {
    typedef decltype(types) T;
    forward<typename T::x, typename T::cond, typename T::out>(args);
    return nullptr;
  });
}

const char* modulated_layer_norm_backward(const ModulatedLayerNormBackward& args) {
  return dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) {
    typedef decltype(types) T;
    return backward<typename T::x, typename T::cond, typename T::out>(args);
  });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

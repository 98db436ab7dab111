// Modulated layer norm on the CPU, alone and after a gated residual: one row at a time in the first-level cache,
// vectorised over C, threads over rows.
#include "common/dispatch_dtype.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "varkern.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int64_t kBackwardRows = 32;  // rows of one partial sum of grad_scale and grad_shift

struct Statistics {
  float mean, rstd;
};

// Two passes, the second around the mean: E[x^2] - mean^2 would cancel when |mean| is large.
template <typename X>
Statistics row_statistics(const X* x, int64_t C, float eps) {
  const int64_t body = C / kWidth * kWidth, tail = C - body, unrolled = body / (4 * kWidth) * (4 * kWidth);
  Floats sum[4] = {};
  int64_t c = 0;
  for (; c < unrolled; c += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) sum[k] += load(x + c + k * kWidth);
  }
  for (; c < body; c += kWidth) sum[0] += load(x + c);
  if (tail) sum[1] += load(x + body, tail);
  const float mean = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(C);

  Floats square[4] = {};
  for (c = 0; c < unrolled; c += 4 * kWidth) {
    for (int k = 0; k < 4; ++k) {
      const Floats d = load(x + c + k * kWidth) - mean;
      square[k] += d * d;
    }
  }
  for (; c < body; c += kWidth) {
    const Floats d = load(x + c) - mean;
    square[0] += d * d;
  }
  if (tail) {
    const Floats d = select(first_lanes(tail), load(x + body, tail) - mean, Floats{});
    square[1] += d * d;
  }
  const float variance = sum_lanes((square[0] + square[1]) + (square[2] + square[3])) / float(C);
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

template <typename X, typename Cond, typename Out>
void normalise_row(const X* x, Statistics s, const Cond* scale, const Cond* shift, Out* out, int64_t C) {
  for_each_vector(C, [&](int64_t c, auto lanes) {
    const Floats h = (load(x + c, lanes) - s.mean) * s.rstd;
    store(out + c, h * (1.0f + load(scale + c, lanes)) + load(shift + c, lanes), lanes);
  });
}

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

// A row is updated and then normalised while it is in the first-level cache.
template <typename X, typename H, typename Cond, typename Out>
void gated_forward(const GatedResidualLayerNorm& a) {
  const int64_t rows = a.B * a.L, C = a.C;
  const int threads = thread_count(rows, rows * C * int64_t(2 * sizeof(X) + sizeof(H) + sizeof(Out)));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / a.L, l = row % a.L;
    X* x = (X*)a.x + row * C;
    const H* h = (const H*)a.h + b * a.h_stride_b + l * a.h_stride_l;
    const Cond* gate = (const Cond*)a.gate + b * a.gate_stride_b;
    for_each_vector(C, [&](int64_t c, auto lanes) {
      store(x + c, load(x + c, lanes) + load(gate + c, lanes) * load(h + c, lanes), lanes);
    });
    normalise_row((const X*)x, row_statistics(x, C, a.eps), (const Cond*)a.scale + b * a.scale_stride_b,
                  (const Cond*)a.shift + b * a.shift_stride_b, (Out*)a.out + row * C, C);
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

const char* gated_residual_layer_norm(const GatedResidualLayerNorm& args) {
  return dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) {
    typedef decltype(types) T;
    return dispatch_dtype(args.h_dtype, [&](auto h) -> const char* {
      gated_forward<typename T::x, decltype(h), typename T::cond, typename T::out>(args);
      return nullptr;
    });
  });
}

const char* modulated_layer_norm_backward(const ModulatedLayerNormBackward& args) {
  return dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) {
    typedef decltype(types) T;
    return backward<typename T::x, typename T::cond, typename T::out>(args);
  });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

// Modulated layer norm on CUDA. Memory-bound: the floor is x read once and out written once.
//
// A block takes one row at a time and keeps it in registers, kPacks packs of eight neighbouring elements a thread; the
// block is just large enough for the row. Rows too long or not aligned to 16 bytes, and the mixtures of float16 with
// bfloat16, take the generic kernels, which read the row again from the cache.
#include "common/device.cuh"
#include "common/dispatch_dtype.h"
#include "common/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/norm.h"

namespace varkern::cuda {
namespace {

template <typename X, typename Cond, typename Out>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(ModulatedLayerNormForward a) {
  __shared__ float buffers[2][kMaxWarps];
  const int C = int(a.C);
  for (int64_t row = blockIdx.x; row < a.B * a.L; row += gridDim.x) {
    const int64_t b = row / a.L, l = row % a.L;
    const X* x = static_cast<const X*>(a.x) + b * a.x_stride_b + l * a.x_stride_l;
    const Cond* scale = static_cast<const Cond*>(a.scale) + b * a.scale_stride_b;
    const Cond* shift = static_cast<const Cond*>(a.shift) + b * a.shift_stride_b;
    Out* out = static_cast<Out*>(a.out) + row * a.C;

    // All loads first, so that they are in flight together.
    Pack<X> x_packs[kPacks];
    Pack<Cond> scale_packs[kPacks], shift_packs[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = pack_column(k);
      x_packs[k] = Pack<X>{}, scale_packs[k] = Pack<Cond>{}, shift_packs[k] = Pack<Cond>{};
      if (c < C) {
        x_packs[k] = load_pack(x + c), scale_packs[k] = load_pack(scale + c), shift_packs[k] = load_pack(shift + c);
      }
    }

    float v[kPacks][kPack];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) unpack(x_packs[k], v[k]);
    const RowStatistics row_statistics = centre_row(v, C, a.eps, buffers);
    const float mean = row_statistics.mean, rstd = row_statistics.rstd;

#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = pack_column(k);
      if (c < C) {
        float s[kPack], t[kPack];
        unpack(scale_packs[k], s), unpack(shift_packs[k], t);
#pragma unroll
        for (int i = 0; i < kPack; ++i) v[k][i] = v[k][i] * rstd * (1.0f + s[i]) + t[i];
        store_pack(out + c, pack_floats(v[k], Out{}));
      }
    }
    if (threadIdx.x == 0 && a.mean) a.mean[row] = mean;
    if (threadIdx.x == 0 && a.rstd) a.rstd[row] = rstd;
  }
}

template <typename X, typename Cond, typename Out>
__global__ void __launch_bounds__(kMaxThreads) forward_generic_kernel(ModulatedLayerNormForward a) {
  __shared__ float buffers[2][kMaxWarps];
  const int64_t C = a.C;
  for (int64_t row = blockIdx.x; row < a.B * a.L; row += gridDim.x) {
    const int64_t b = row / a.L, l = row % a.L;
    const X* x = static_cast<const X*>(a.x) + b * a.x_stride_b + l * a.x_stride_l;
    const Cond* scale = static_cast<const Cond*>(a.scale) + b * a.scale_stride_b;
    const Cond* shift = static_cast<const Cond*>(a.shift) + b * a.shift_stride_b;
    Out* out = static_cast<Out*>(a.out) + row * C;
    float sum = 0.0f, square = 0.0f;
    for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) sum += to_float(x[c]);
    const float mean = block_sum(sum, buffers[0]) / float(C);
    for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) {
      const float d = to_float(x[c]) - mean;
      square += d * d;
    }
    const float rstd = 1.0f / sqrtf(block_sum(square, buffers[1]) / float(C) + a.eps);
    for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) {
      const float h = (to_float(x[c]) - mean) * rstd;
      out[c] = From<Out>::value(h * (1.0f + to_float(scale[c])) + to_float(shift[c]));
    }
    if (threadIdx.x == 0 && a.mean) a.mean[row] = mean;
    if (threadIdx.x == 0 && a.rstd) a.rstd[row] = rstd;
  }
}

// A block takes one chunk of rows of one batch element, row by row. Each thread owns its columns, so their sums over
// the chunk stay in registers and need no atomics.
template <typename X, typename Cond, typename Out>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(ModulatedLayerNormBackward a, float* workspace, int64_t chunks) {
  __shared__ float2 buffers[2][kMaxWarps];
  const int64_t C = a.C, chunk_rows = (a.L + chunks - 1) / chunks;
  int parity = 0;  // rows alternate between the buffers: one barrier a row
  for (int64_t task = blockIdx.x; task < a.B * chunks; task += gridDim.x) {
    const int64_t b = task / chunks, begin = task % chunks * chunk_rows;
    const int64_t end = begin + chunk_rows < a.L ? begin + chunk_rows : a.L;
    const Cond* scale = static_cast<const Cond*>(a.scale) + b * a.scale_stride_b;
    float factor[kPacks][kPack], scale_sum[kPacks][kPack], shift_sum[kPacks][kPack];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = pack_column(k);
      unpack(c < C ? load_pack(scale + c) : Pack<Cond>{}, factor[k]);
#pragma unroll
      for (int i = 0; i < kPack; ++i) factor[k][i] += 1.0f, scale_sum[k][i] = 0.0f, shift_sum[k][i] = 0.0f;
    }
    for (int64_t l = begin; l < end; ++l) {
      const int64_t row = b * a.L + l;
      const Out* grad_out = static_cast<const Out*>(a.grad_out) + b * a.grad_out_stride_b + l * a.grad_out_stride_l;
      const X* x = static_cast<const X*>(a.x) + b * a.x_stride_b + l * a.x_stride_l;
      X* grad_x = static_cast<X*>(a.grad_x) + row * C;
      Pack<Out> g_packs[kPacks];
      Pack<X> x_packs[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int c = pack_column(k);
        g_packs[k] = Pack<Out>{}, x_packs[k] = Pack<X>{};
        if (c < C) g_packs[k] = load_pack(grad_out + c), x_packs[k] = load_pack(x + c);
      }
      const float mean = a.mean[row], rstd = a.rstd[row];
      float2 sums = make_float2(0.0f, 0.0f);  // of d and d * h; columns past C have d = 0
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        float g[kPack], v[kPack];
        unpack(g_packs[k], g), unpack(x_packs[k], v);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const float h = (v[i] - mean) * rstd, d = g[i] * factor[k][i];
          sums.x += d, sums.y += d * h;
          scale_sum[k][i] += g[i] * h, shift_sum[k][i] += g[i];
        }
      }
      sums = block_sum(sums, buffers[parity]);
      parity ^= 1;
      const float mean_d = sums.x / float(C), mean_dh = sums.y / float(C);
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int c = pack_column(k);
        if (c < C) {
          float g[kPack], v[kPack];
          unpack(g_packs[k], g), unpack(x_packs[k], v);
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            const float h = (v[i] - mean) * rstd;
            v[i] = rstd * (g[i] * factor[k][i] - mean_d - h * mean_dh);
          }
          store_pack(grad_x + c, pack_floats(v, X{}));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = pack_column(k);
      if (c < C) {
        store_pack(workspace + task * C + c, pack_floats(scale_sum[k], float{}));
        store_pack(workspace + (a.B * chunks + task) * C + c, pack_floats(shift_sum[k], float{}));
      }
    }
  }
}

template <typename X, typename Cond, typename Out>
__global__ void __launch_bounds__(kMaxThreads)
    backward_generic_kernel(ModulatedLayerNormBackward a, float* workspace, int64_t chunks) {
  __shared__ float2 buffers[2][kMaxWarps];
  const int64_t C = a.C, chunk_rows = (a.L + chunks - 1) / chunks;
  int parity = 0;
  for (int64_t task = blockIdx.x; task < a.B * chunks; task += gridDim.x) {
    const int64_t b = task / chunks, begin = task % chunks * chunk_rows;
    const int64_t end = begin + chunk_rows < a.L ? begin + chunk_rows : a.L;
    const Cond* scale = static_cast<const Cond*>(a.scale) + b * a.scale_stride_b;
    float* scale_sum = workspace + task * C;
    float* shift_sum = workspace + (a.B * chunks + task) * C;
    for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) scale_sum[c] = 0.0f, shift_sum[c] = 0.0f;
    for (int64_t l = begin; l < end; ++l) {
      const int64_t row = b * a.L + l;
      const Out* grad_out = static_cast<const Out*>(a.grad_out) + b * a.grad_out_stride_b + l * a.grad_out_stride_l;
      const X* x = static_cast<const X*>(a.x) + b * a.x_stride_b + l * a.x_stride_l;
      X* grad_x = static_cast<X*>(a.grad_x) + row * C;
      const float mean = a.mean[row], rstd = a.rstd[row];
      float2 sums = make_float2(0.0f, 0.0f);
      for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) {
        const float g = to_float(grad_out[c]), h = (to_float(x[c]) - mean) * rstd;
        const float d = g * (1.0f + to_float(scale[c]));
        sums.x += d, sums.y += d * h;
        scale_sum[c] += g * h, shift_sum[c] += g;
      }
      sums = block_sum(sums, buffers[parity]);
      parity ^= 1;
      const float mean_d = sums.x / float(C), mean_dh = sums.y / float(C);
      for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) {
        const float g = to_float(grad_out[c]), h = (to_float(x[c]) - mean) * rstd;
        const float d = g * (1.0f + to_float(scale[c]));
        grad_x[c] = From<X>::value(rstd * (d - mean_d - h * mean_dh));
      }
    }
  }
}

// workspace (2, B, chunks, C) -> grad_scale, grad_shift (B, C), adding the chunks in order.
__global__ void __launch_bounds__(kMaxThreads)
    reduce_kernel(const float* workspace, int64_t chunks, float* grad_scale, float* grad_shift, int64_t B, int64_t C) {
  const int64_t step = int64_t(gridDim.x) * kMaxThreads;
  for (int64_t i = int64_t(blockIdx.x) * kMaxThreads + threadIdx.x; i < 2 * B * C; i += step) {
    const float* partial = workspace + i / C * chunks * C + i % C;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t k = 0; k < chunks; ++k) sum += partial[k * C];
    if (i < B * C) {
      grad_scale[i] = sum;
    } else {
      grad_shift[i - B * C] = sum;
    }
  }
}

// Mixing the two half types happens in no model; their register kernels would only lengthen the build.
template <typename X, typename Cond, typename Out>
constexpr bool kHasRegisterKernel = sizeof(Out) == 2 || sizeof(X) == 4 || sizeof(Cond) == 4;

template <typename X, typename Cond, typename Out>
const char* forward(const ModulatedLayerNormForward& a, void* stream) {
  if constexpr (kHasRegisterKernel<X, Cond, Out>) {
    if (a.C % kPack == 0 && a.C <= kMaxRow && aligned(static_cast<const Out*>(a.out), 0, 0) &&
        aligned(static_cast<const X*>(a.x), a.x_stride_b, a.x_stride_l) &&
        aligned(static_cast<const Cond*>(a.scale), a.scale_stride_b, 0) &&
        aligned(static_cast<const Cond*>(a.shift), a.shift_stride_b, 0)) {
      return launch(forward_kernel<X, Cond, Out>, a.B * a.L, row_threads(a.C), stream, a);
    }
  }
  return launch(forward_generic_kernel<X, Cond, Out>, a.B * a.L, kMaxThreads, stream, a);
}

template <typename X, typename Cond, typename Out>
const char* backward(const ModulatedLayerNormBackward& a, float* workspace, int64_t chunks, void* stream) {
  if constexpr (kHasRegisterKernel<X, Cond, Out>) {
    if (a.C % kPack == 0 && a.C <= kMaxRow && aligned(workspace, 0, 0) &&
        aligned(static_cast<const X*>(a.grad_x), 0, 0) &&
        aligned(static_cast<const Out*>(a.grad_out), a.grad_out_stride_b, a.grad_out_stride_l) &&
        aligned(static_cast<const X*>(a.x), a.x_stride_b, a.x_stride_l) &&
        aligned(static_cast<const Cond*>(a.scale), a.scale_stride_b, 0)) {
      return launch(backward_kernel<X, Cond, Out>, a.B * chunks, row_threads(a.C), stream, a, workspace, chunks);
    }
  }
  return launch(backward_generic_kernel<X, Cond, Out>, a.B * chunks, kMaxThreads, stream, a, workspace, chunks);
}

}  // namespace

const char* modulated_layer_norm_forward(const ModulatedLayerNormForward& args, void* stream) {
  if (args.B * args.L * args.C == 0) return nullptr;
  return dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) {
    using T = decltype(types);
    return forward<typename T::x, typename T::cond, typename T::out>(args, stream);
  });
}

const char* modulated_layer_norm_backward(const CudaModulatedLayerNormBackward& args, void* stream) {
  if (args.chunks < 1) return "the number of chunks must be at least 1";
  if (args.B * args.C == 0) return nullptr;
  const char* error = dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) {
    using T = decltype(types);
    return backward<typename T::x, typename T::cond, typename T::out>(args, args.workspace, args.chunks, stream);
  });
  if (error) return error;
  const int64_t blocks = (2 * args.B * args.C + kMaxThreads - 1) / kMaxThreads;
  return launch(reduce_kernel, blocks, kMaxThreads, stream, static_cast<const float*>(args.workspace),
                args.chunks, args.grad_scale, args.grad_shift, args.B, args.C);
}

}  // namespace varkern::cuda

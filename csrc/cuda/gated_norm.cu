// A gated residual and the modulated layer norm after it on CUDA, in one pass: x and h are read once, x and out are
// written once.
//
// As in norm.cu a block keeps a row in registers, and the generic kernel takes what is too long, not aligned to 16
// bytes, or mixes float16 with bfloat16.
#include "common/device.cuh"
#include "common/dispatch_dtype.h"
#include "common/launch.cuh"
#include "cuda/rows.cuh"
#include "ops/gated_norm.h"

namespace varkern::cuda {
namespace {

template <typename X, typename H, typename Cond, typename Out>
struct Row {
  X* x;
  const H* h;
  const Cond *gate, *scale, *shift;
  Out* out;

  __device__ __forceinline__ Row(const GatedResidualLayerNorm& a, int64_t row) {
    const int64_t b = row / a.L, l = row % a.L;
    x = static_cast<X*>(a.x) + row * a.C;
    h = static_cast<const H*>(a.h) + b * a.h_stride_b + l * a.h_stride_l;
    gate = static_cast<const Cond*>(a.gate) + b * a.gate_stride_b;
    scale = static_cast<const Cond*>(a.scale) + b * a.scale_stride_b;
    shift = static_cast<const Cond*>(a.shift) + b * a.shift_stride_b;
    out = static_cast<Out*>(a.out) + row * a.C;
  }
};

template <typename X, typename H, typename Cond, typename Out>
__global__ void __launch_bounds__(kMaxThreads) gated_kernel(GatedResidualLayerNorm a) {
  __shared__ float buffers[2][kMaxWarps];
  const int C = int(a.C);
  for (int64_t i_row = blockIdx.x; i_row < a.B * a.L; i_row += gridDim.x) {
    const Row<X, H, Cond, Out> row(a, i_row);

    // All loads first, so that they are in flight together.
    Pack<X> x_packs[kPacks];
    Pack<H> h_packs[kPacks];
    Pack<Cond> gate_packs[kPacks], scale_packs[kPacks], shift_packs[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = pack_column(k);
      x_packs[k] = Pack<X>{}, h_packs[k] = Pack<H>{}, gate_packs[k] = Pack<Cond>{};
      scale_packs[k] = Pack<Cond>{}, shift_packs[k] = Pack<Cond>{};
      if (c < C) {
        x_packs[k] = load_pack(row.x + c), h_packs[k] = load_pack(row.h + c), gate_packs[k] = load_pack(row.gate + c);
        scale_packs[k] = load_pack(row.scale + c), shift_packs[k] = load_pack(row.shift + c);
      }
    }

    float v[kPacks][kPack];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = pack_column(k);
      float h[kPack], gate[kPack];
      unpack(x_packs[k], v[k]), unpack(h_packs[k], h), unpack(gate_packs[k], gate);
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[k][i] += gate[i] * h[i];
      const Pack<X> rounded = pack_floats(v[k], X{});
      if (c < C) store_pack(row.x + c, rounded);
      unpack(rounded, v[k]);  // what the next operation reads is what is normalised
    }
    const float rstd = centre_row(v, C, a.eps, buffers).rstd;

#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = pack_column(k);
      if (c < C) {
        float s[kPack], t[kPack];
        unpack(scale_packs[k], s), unpack(shift_packs[k], t);
#pragma unroll
        for (int i = 0; i < kPack; ++i) v[k][i] = v[k][i] * rstd * (1.0f + s[i]) + t[i];
        store_pack(row.out + c, pack_floats(v[k], Out{}));
      }
    }
  }
}

// Each thread reads again what it wrote itself, so the row needs no barrier of its own.
template <typename X, typename H, typename Cond, typename Out>
__global__ void __launch_bounds__(kMaxThreads) gated_generic_kernel(GatedResidualLayerNorm a) {
  __shared__ float buffers[2][kMaxWarps];
  const int64_t C = a.C;
  for (int64_t i_row = blockIdx.x; i_row < a.B * a.L; i_row += gridDim.x) {
    const Row<X, H, Cond, Out> row(a, i_row);
    float sum = 0.0f, square = 0.0f;
    for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) {
      const X rounded = From<X>::value(to_float(row.x[c]) + to_float(row.gate[c]) * to_float(row.h[c]));
      row.x[c] = rounded;
      sum += to_float(rounded);
    }
    const float mean = block_sum(sum, buffers[0]) / float(C);
    for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) {
      const float d = to_float(row.x[c]) - mean;
      square += d * d;
    }
    const float rstd = 1.0f / sqrtf(block_sum(square, buffers[1]) / float(C) + a.eps);
    for (int64_t c = threadIdx.x; c < C; c += kMaxThreads) {
      const float d = (to_float(row.x[c]) - mean) * rstd;
      row.out[c] = From<Out>::value(d * (1.0f + to_float(row.scale[c])) + to_float(row.shift[c]));
    }
  }
}

// Whether one half type at most occurs.
template <typename A, typename B>
constexpr bool kMixed = sizeof(A) == 2 && sizeof(B) == 2;
template <typename A>
constexpr bool kMixed<A, A> = false;

template <typename X, typename H, typename Cond, typename Out>
const char* gated(const GatedResidualLayerNorm& a, void* stream) {
  if constexpr (!kMixed<X, H> && !kMixed<X, Cond> && !kMixed<H, Cond>) {
    if (a.C % kPack == 0 && a.C <= kMaxRow && aligned(static_cast<const X*>(a.x), 0, 0) &&
        aligned(static_cast<const Out*>(a.out), 0, 0) &&
        aligned(static_cast<const H*>(a.h), a.h_stride_b, a.h_stride_l) &&
        aligned(static_cast<const Cond*>(a.gate), a.gate_stride_b, 0) &&
        aligned(static_cast<const Cond*>(a.scale), a.scale_stride_b, 0) &&
        aligned(static_cast<const Cond*>(a.shift), a.shift_stride_b, 0)) {
      return launch(gated_kernel<X, H, Cond, Out>, a.B * a.L, row_threads(a.C), stream, a);
    }
  }
  return launch(gated_generic_kernel<X, H, Cond, Out>, a.B * a.L, kMaxThreads, stream, a);
}

}  // namespace

const char* gated_residual_layer_norm(const GatedResidualLayerNorm& args, void* stream) {
  if (args.B * args.L * args.C == 0) return nullptr;
  return dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) {
    using T = decltype(types);
    return dispatch_dtype(args.h_dtype, [&](auto h) {
      return gated<typename T::x, decltype(h), typename T::cond, typename T::out>(args, stream);
    });
  });
}

}  // namespace varkern::cuda

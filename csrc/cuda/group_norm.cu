// Group normalisation with SiLU on CUDA: the statistics of chunks of pixels, their combination, one pass that applies
// it. The floor is x read twice, of which small maps find the second time in the cache, and out written once.
//
// Channels next to each other (channels_last): a thread owns a pack of eight channels and walks over pixels, its
// coefficients in registers. Contiguous maps, and channels that make no packs: a block takes a chunk of one group.
#include "common/device.cuh"
#include "common/dispatch_dtype.h"
#include "common/launch.cuh"
#include "ops/group_norm.h"

namespace varkern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kSampled = 4;  // every fourth of a thread's loads decides around what it takes the squares

// How the pixels of an image are cut.
struct Cut {
  int64_t pixels, chunks;
  double share, last_share;  // of one element in a chunk's part of a group: divisions in float64 spill registers
  __device__ __forceinline__ int64_t size(const GroupNorm& a, int64_t chunk) const {
    const int64_t left = a.P - chunk * pixels;
    return left < pixels ? left : pixels;
  }
  __device__ __forceinline__ double element_share(int64_t chunk) const {
    return chunk + 1 == chunks ? last_share : share;
  }
};

// A thread's elements: how many, a centre near their mean, the sums of x - centre and of its square. The mean of a share
// p of the elements is at most sqrt((1 - p) / p) standard deviations off, so that float32 loses at most the factor 1 / p
// of its precision to it.
__device__ __forceinline__ double total(double n, float centre, float sum) { return n * double(centre) + double(sum); }

// The sum of squares around mean.
__device__ __forceinline__ double spread(double n, float centre, float sum, float square, double mean) {
  const double d = double(centre) - mean;
  return n > 0.0 ? double(square) + d * (2.0 * double(sum) + n * d) : 0.0;
}

// The mean and the sum of squares around it of chunk k of group g of image b.
__device__ __forceinline__ double* partial_of(const GroupNorm& a, const Cut& cut, double* partial, int64_t b, int64_t g,
                                              int64_t k) {
  return partial + ((b * a.groups + g) * cut.chunks + k) * 2;
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }

// C is a multiple of kPack and at most kThreads * kPack. A block takes one chunk of one image.
template <typename T>
__global__ void __launch_bounds__(kThreads) channels_statistics_kernel(GroupNorm a, Cut cut, double* partial) {
  __shared__ float centres[kThreads * kPack], sums[kThreads * kPack], squares[kThreads * kPack];  // (rows, C)
  const int C = int(a.C), packs = C / kPack, rows = kThreads / packs, width = C / int(a.groups);
  const int row = int(threadIdx.x) / packs, c = int(threadIdx.x) % packs * kPack;
  for (int64_t task = blockIdx.x; task < a.B * cut.chunks; task += gridDim.x) {
    const int64_t b = task / cut.chunks, chunk = task % cut.chunks;
    const int pixels = int(cut.size(a, chunk));
    const T* x = static_cast<const T*>(a.x) + (b * a.P + chunk * cut.pixels) * C + c;
    if (row < rows) {
      float centre[kPack] = {}, sum[kPack] = {}, square[kPack] = {}, v[kPack];
      int samples = 0;
      for (int p = row; p < pixels; p += kSampled * rows, ++samples) {
        unpack(load_pack(x + int64_t(p) * C), v);
#pragma unroll
        for (int i = 0; i < kPack; ++i) centre[i] += v[i];
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) centre[i] = samples ? centre[i] / float(samples) : 0.0f;
#pragma unroll 4
      for (int p = row; p < pixels; p += rows) {
        unpack(load_pack(x + int64_t(p) * C), v);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const float d = v[i] - centre[i];
          sum[i] += d, square[i] += d * d;
        }
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const int at = row * C + c + i;
        centres[at] = centre[i], sums[at] = sum[i], squares[at] = square[i];
      }
    }
    __syncthreads();
    const int lane = int(threadIdx.x) % kWarpSize;
    for (int g = int(threadIdx.x) / kWarpSize; g < int(a.groups); g += kWarps) {
      double sum = 0.0, square = 0.0;
      const auto for_each = [&](const auto& body) {
        for (int e = lane; e < rows * width; e += kWarpSize) {
          const int r = e / width;
          body(double(r < pixels ? (pixels - r + rows - 1) / rows : 0), r * C + g * width + e % width);
        }
      };
      for_each([&](double n, int at) { sum += total(n, centres[at], sums[at]); });
      const double mean = warp_sum(sum) * cut.element_share(chunk);
      for_each([&](double n, int at) { square += spread(n, centres[at], sums[at], squares[at], mean); });
      square = warp_sum(square);
      if (lane == 0) {
        double* out = partial_of(a, cut, partial, b, g, chunk);
        out[0] = mean, out[1] = square;
      }
    }
    __syncthreads();  // before the next chunk overwrites what is read here
  }
}

// The elements of a chunk of one group, kStep neighbours at a time.
template <typename T, bool kPacked>
struct GroupChunk {
  static constexpr int kStep = kPacked ? kPack : 1;
  int64_t base, stride;  // of the first channel, and between channels
  unsigned pixels, width, steps;
  int64_t b, g, chunk;
  bool channels_last;

  __device__ __forceinline__ GroupChunk(const GroupNorm& a, const Cut& cut, int64_t task) {
    chunk = task % cut.chunks, g = task / cut.chunks % a.groups, b = task / cut.chunks / a.groups;
    pixels = unsigned(cut.size(a, chunk)), width = unsigned(a.C / a.groups), steps = pixels * width / kStep;
    channels_last = a.channels_last;
    const int64_t begin = chunk * cut.pixels;
    stride = channels_last ? 1 : a.P;
    base = channels_last ? (b * a.P + begin) * a.C + g * width : (b * a.C + g * width) * a.P + begin;
  }
  __device__ __forceinline__ unsigned channel(unsigned step) const {
    return channels_last ? step % width : step / (pixels / kStep);
  }
  __device__ __forceinline__ int64_t at(unsigned step, unsigned c, int64_t C) const {
    if (channels_last) return base + int64_t(step / width) * C + c;
    return base + int64_t(c) * stride + step % (pixels / kStep) * kStep;
  }
  __device__ __forceinline__ void load(const T* x, float (&v)[kStep]) const {
    if constexpr (kPacked) {
      unpack(load_pack(x), v);
    } else {
      v[0] = to_float(*x);
    }
  }
};

// kPacked: contiguous maps, P and the chunks are multiples of kPack.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads) group_statistics_kernel(GroupNorm a, Cut cut, double* partial) {
  __shared__ double buffers[2][kWarps];
  using Chunk = GroupChunk<T, kPacked>;
  const T* x = static_cast<const T*>(a.x);
  for (int64_t task = blockIdx.x; task < a.B * a.groups * cut.chunks; task += gridDim.x) {
    const Chunk chunk(a, cut, task);
    float centre = 0.0f, sum = 0.0f, square = 0.0f, v[Chunk::kStep];
    int samples = 0, steps = 0;
    for (unsigned e = threadIdx.x; e < chunk.steps; e += kSampled * kThreads, ++samples) {
      chunk.load(x + chunk.at(e, chunk.channel(e), a.C), v);
      float all = 0.0f;
#pragma unroll
      for (int i = 0; i < Chunk::kStep; ++i) all += v[i];
      centre += all;
    }
    centre = samples ? centre / float(samples * Chunk::kStep) : 0.0f;
#pragma unroll(kPacked ? 2 : 1)
    for (unsigned e = threadIdx.x; e < chunk.steps; e += kThreads, ++steps) {
      chunk.load(x + chunk.at(e, chunk.channel(e), a.C), v);
      float all = 0.0f, all_squares = 0.0f;
#pragma unroll
      for (int i = 0; i < Chunk::kStep; ++i) {
        const float d = v[i] - centre;
        all += d, all_squares += d * d;
      }
      sum += all, square += all_squares;
    }
    const double n = double(steps) * Chunk::kStep;
    const double mean = block_sum(total(n, centre, sum), buffers[0]) * cut.element_share(chunk.chunk);
    const double squares = block_sum(spread(n, centre, sum, square, mean), buffers[1]);
    if (threadIdx.x == 0) {
      double* out = partial_of(a, cut, partial, chunk.b, chunk.g, chunk.chunk);
      out[0] = mean, out[1] = squares;
    }
  }
}

// A warp takes a group of an image: the chunks in order, a lane every 32nd, then the coefficients of its channels.
__global__ void __launch_bounds__(kThreads) combine_kernel(GroupNorm a, Cut cut, double* partial) {
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t width = a.C / a.groups;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; i < a.B * a.groups;
       i += int64_t(gridDim.x) * kWarps) {
    const int64_t b = i / a.groups, g = i % a.groups;
    const double* chunk = partial_of(a, cut, partial, b, g, 0);
    double sum = 0.0, square = 0.0;
    for (int64_t k = lane; k < cut.chunks; k += kWarpSize) sum += double(cut.size(a, k)) * chunk[2 * k];
    const double mean = warp_sum(sum) / double(a.P);
    for (int64_t k = lane; k < cut.chunks; k += kWarpSize) {
      const double d = chunk[2 * k] - mean;
      square += chunk[2 * k + 1] + double(cut.size(a, k)) * double(width) * d * d;
    }
    const double variance = warp_sum(square) / (double(a.P) * double(width));
    const double rstd = 1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + a.eps);
    const float centre = a.out ? float(mean) : 0.0f;
    for (int64_t c = g * width + lane; c < (g + 1) * width; c += kWarpSize) {
      // From the rounded multiplier, so that its rounding is relative to x - mean and not to x.
      const float multiplier = float(rstd * double(a.weight[c]));
      float* out = a.coefficients + b * a.C + c;
      out[0] = multiplier;
      out[a.B * a.C] = float(double(a.bias[c]) - (mean - double(centre)) * double(multiplier));
      if (a.out) out[2 * a.B * a.C] = centre;
    }
  }
}

// As channels_statistics_kernel.
template <typename T>
__global__ void __launch_bounds__(kThreads) channels_apply_kernel(GroupNorm a, Cut cut) {
  const int C = int(a.C), packs = C / kPack, rows = kThreads / packs;
  const int row = int(threadIdx.x) / packs, c = int(threadIdx.x) % packs * kPack;
  if (row >= rows) return;
  for (int64_t task = blockIdx.x; task < a.B * cut.chunks; task += gridDim.x) {
    const int64_t b = task / cut.chunks, chunk = task % cut.chunks, begin = (b * a.P + chunk * cut.pixels) * C + c;
    const int pixels = int(cut.size(a, chunk));
    float multiplier[kPack], offset[kPack], centre[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float* coefficients = a.coefficients + b * C + c + i;
      multiplier[i] = coefficients[0], offset[i] = coefficients[a.B * C], centre[i] = coefficients[2 * a.B * C];
    }
#pragma unroll 4
    for (int p = row; p < pixels; p += rows) {
      float v[kPack];
      unpack(load_pack(static_cast<const T*>(a.x) + begin + int64_t(p) * C), v);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        v[i] = (v[i] - centre[i]) * multiplier[i] + offset[i];
        v[i] = a.silu ? silu(v[i]) : v[i];
      }
      store_pack(static_cast<T*>(a.out) + begin + int64_t(p) * C, pack_floats(v, T{}));
    }
  }
}

// As group_statistics_kernel.
template <typename T, bool kPacked>
__global__ void __launch_bounds__(kThreads) group_apply_kernel(GroupNorm a, Cut cut) {
  using Chunk = GroupChunk<T, kPacked>;
  for (int64_t task = blockIdx.x; task < a.B * a.groups * cut.chunks; task += gridDim.x) {
    const Chunk chunk(a, cut, task);
    const float* coefficients = a.coefficients + chunk.b * a.C + chunk.g * chunk.width;
    for (unsigned e = threadIdx.x; e < chunk.steps; e += kThreads) {
      const unsigned c = chunk.channel(e);
      const int64_t at = chunk.at(e, c, a.C);
      const float multiplier = coefficients[c], offset = coefficients[a.B * a.C + c];
      const float centre = coefficients[2 * a.B * a.C + c];
      float v[Chunk::kStep];
      chunk.load(static_cast<const T*>(a.x) + at, v);
#pragma unroll
      for (int i = 0; i < Chunk::kStep; ++i) {
        v[i] = (v[i] - centre) * multiplier + offset;
        v[i] = a.silu ? silu(v[i]) : v[i];
      }
      T* out = static_cast<T*>(a.out) + at;
      if constexpr (kPacked) {
        store_pack(out, pack_floats(v, T{}));
      } else {
        *out = From<T>::value(v[0]);
      }
    }
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T>
const char* group_norm_of(const GroupNorm& a, double* partial, int64_t chunk_pixels, void* stream) {
  const int64_t chunks = (a.P + chunk_pixels - 1) / chunk_pixels, width = a.C / a.groups;
  const int64_t last = a.P - (chunks - 1) * chunk_pixels;
  const Cut cut = {chunk_pixels, chunks, 1.0 / double(chunk_pixels * width), 1.0 / double(last * width)};
  const int64_t blocks = a.B * cut.chunks;
  const bool packs = aligned(a.x) && aligned(a.out);
  const bool by_channels = packs && a.channels_last && a.C % kPack == 0 && a.C <= kThreads * kPack;
  const bool packed = packs && !a.channels_last && a.P % kPack == 0 && chunk_pixels % kPack == 0;
  const char* error;
  if (by_channels) {
    error = launch(channels_statistics_kernel<T>, blocks, kThreads, stream, a, cut, partial);
  } else if (packed) {
    error = launch(group_statistics_kernel<T, true>, blocks * a.groups, kThreads, stream, a, cut, partial);
  } else {
    error = launch(group_statistics_kernel<T, false>, blocks * a.groups, kThreads, stream, a, cut, partial);
  }
  if (error) return error;
  error = launch(combine_kernel, (a.B * a.groups + kWarps - 1) / kWarps, kThreads, stream, a, cut, partial);
  if (error || !a.out) return error;
  if (by_channels) return launch(channels_apply_kernel<T>, blocks, kThreads, stream, a, cut);
  if (packed) return launch(group_apply_kernel<T, true>, blocks * a.groups, kThreads, stream, a, cut);
  return launch(group_apply_kernel<T, false>, blocks * a.groups, kThreads, stream, a, cut);
}

}  // namespace

const char* group_norm(const CudaGroupNorm& args, void* stream) {
  if (args.B * args.C * args.P == 0) return nullptr;
  if (args.chunk_pixels < 1 || args.chunk_pixels > 0x7fffffff / args.C) return "a chunk must have 1 to 2^31 / C pixels";
  return dispatch_dtype(args.dtype, [&](auto element) {
    return group_norm_of<decltype(element)>(args, args.partial, args.chunk_pixels, stream);
  });
}

}  // namespace varkern::cuda

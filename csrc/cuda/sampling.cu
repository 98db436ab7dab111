// Token sampling on CUDA, one block a row. Memory-bound: the floor is logits and noise read once.
//
// Nothing is sorted. Top-k needs a threshold: a histogram of the row, linear in the logit, finds the bin of the k-th
// largest, whose few members are then ranked. Top-p needs none: the row is drawn first, and a draw that top-p excludes
// removes itself and everything below it before the row is drawn again, which happens to 1 - top_p of the rows.
//
// A thread keeps kItems logits and their noise in registers, threads apart so that accesses coalesce whatever the
// alignment. Longer rows (kItems = 0) are read again from the cache at each step.
#include "common/device.cuh"
#include "common/launch.cuh"
#include "ops/sampling.h"

namespace varkern::cuda {
namespace {

constexpr int kThreads = 512, kMaxWarps = kThreads / kWarpSize;  // at most
constexpr int kBins = 256, kCandidates = 512;
constexpr float kUnderflow = -104.0f;  // exp is zero in float32 from here down: as good as excluded

// Any struct of eight bytes, to be shuffled and reduced.
union Bits64 {
  uint64_t bits;
  float2 floats;
};

struct Shared {
  uint64_t partial[2][kMaxWarps];
  int histogram[kBins];
  float candidates[kCandidates];
  int bin, before, count, collected;
  float threshold, drawn;  // logits
};

__device__ __forceinline__ float infinity() { return bits_float(0x7f800000u); }

// Reductions over the block. They alternate between two buffers, so each has one barrier, and one always.
struct Block {
  Shared& shared;
  int parity;

  // combine(a, b) over the block, in every thread, in an order fixed by the block's size. All threads call it.
  template <typename Combine>
  __device__ __forceinline__ uint64_t reduce(uint64_t v, const Combine& combine) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) v = combine(v, __shfl_xor_sync(0xffffffffu, v, mask));
    const int warps = int(blockDim.x) / kWarpSize;
    uint64_t* partial = shared.partial[parity];
    parity ^= 1;
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = v;
    __syncthreads();
    v = partial[0];
    for (int i = 1; i < warps; ++i) v = combine(v, partial[i]);
    return v;
  }

  __device__ __forceinline__ uint64_t max(uint64_t v) {
    return reduce(v, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  }

  __device__ __forceinline__ float2 max(float2 v) {
    return pairs(v, [](float a, float b) { return fmaxf(a, b); });
  }

  __device__ __forceinline__ float2 sum(float2 v) {
    return pairs(v, [](float a, float b) { return a + b; });
  }

 private:
  template <typename Combine>
  __device__ __forceinline__ float2 pairs(float2 v, const Combine& combine) {
    Bits64 pun;
    pun.floats = v;
    pun.bits = reduce(pun.bits, [&](uint64_t a, uint64_t b) {
      Bits64 x, y;
      x.bits = a, y.bits = b;
      x.floats = make_float2(combine(x.floats.x, y.floats.x), combine(x.floats.y, y.floats.y));
      return x.bits;
    });
    return pun.floats;
  }
};

// The guided logits of a row in device memory, rounded after each operation as PyTorch rounds them.
template <typename T>
struct Source {
  const T *cond, *uncond;  // uncond: nullptr without guidance
  const float* noise;
  float scale, guidance;
  int V;

  __device__ __forceinline__ float logit(int c) const {
    const float x = to_float(cond[c]);
    return uncond ? __fsub_rn(__fmul_rn(scale, x), __fmul_rn(guidance, to_float(uncond[c]))) : x;
  }
};

// each(f): f(column, logit, noise) for every column of this thread. Columns past V may appear, with a logit of -inf.
template <typename T, int kItems>
struct Row {
  float x[kItems], q[kItems];

  __device__ __forceinline__ explicit Row(const Source<T>& source) {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int c = column(k);
      x[k] = c < source.V ? source.logit(c) : -infinity(), q[k] = c < source.V ? source.noise[c] : 1.0f;
    }
  }

  __device__ __forceinline__ static int column(int k) { return int(threadIdx.x) + k * int(blockDim.x); }

  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) body(column(k), x[k], q[k]);
  }
};

template <typename T>
struct Row<T, 0> {
  Source<T> source;

  __device__ __forceinline__ explicit Row(const Source<T>& source) : source(source) {}

  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
    for (int c = int(threadIdx.x); c < source.V; c += int(blockDim.x)) body(c, source.logit(c), source.noise[c]);
  }
};

// The bin of the wanted-th member, in the order of the bins, by one warp: into shared bin (-1 where there are too few),
// before (members of earlier bins) and count.
__device__ __forceinline__ void find_bin(Shared& shared, int wanted) {
  constexpr int kShare = kBins / kWarpSize;
  const int lane = int(threadIdx.x);
  int own = 0, before = 0;
  for (int i = 0; i < kShare; ++i) own += shared.histogram[lane * kShare + i];
  int total = own;
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {  // over growing groups of lanes: their total, and of those before
    const int other = __shfl_xor_sync(0xffffffffu, total, mask);
    if (lane & mask) before += other;
    total += other;
  }
  if (lane == 0 && total < wanted) shared.bin = -1;
  if (before < wanted && wanted <= before + own) {
    int bin = lane * kShare;
    while (before + shared.histogram[bin] < wanted) before += shared.histogram[bin++];
    shared.bin = bin, shared.before = before, shared.count = shared.histogram[bin];
  }
}

// A float that separates the logits which top-k keeps, those not below the k-th largest, from the others. Where logits
// that underflow would be kept it may exclude them: they have no probability.
template <typename R>
__device__ __forceinline__ float top_k_threshold(Block& block, const R& row, int k, float low, float high) {
  Shared& shared = block.shared;
  low = fmaxf(low, high + kUnderflow);
  while (low < high) {  // the k-th of those in [low, high]
    const float scale = fminf(float(kBins - 1) / (high - low), 3e38f);
    const auto bin_of = [&](float x) {  // never decreasing with -x; the ends of the interval are in different bins
      const int bin = int((high - x) * scale);
      return x <= low || bin >= kBins ? kBins - 1 : bin;
    };
    for (int i = int(threadIdx.x); i < kBins; i += int(blockDim.x)) shared.histogram[i] = 0;
    if (threadIdx.x == 0) shared.collected = 0;
    __syncthreads();
    row.each([&](int, float x, float) {
      if (x >= low && x <= high) atomicAdd(&shared.histogram[bin_of(x)], 1);
    });
    __syncthreads();
    if (threadIdx.x < kWarpSize) find_bin(shared, k);
    __syncthreads();
    const int bin = shared.bin, count = shared.count;
    if (bin < 0) return low;  // the k-th underflows
    k -= shared.before;
    const auto member = [&](float x) { return x >= low && x <= high && bin_of(x) == bin; };
    if (count > kCandidates) {  // too many to rank: a histogram of the bin alone
      float2 extent = make_float2(high + kUnderflow, -high);
      row.each([&](int, float x, float) {
        if (member(x)) extent = make_float2(fmaxf(extent.x, x), fmaxf(extent.y, -x));
      });
      extent = block.max(extent);
      high = extent.x, low = -extent.y;
      continue;
    }
    row.each([&](int, float x, float) {
      if (member(x)) shared.candidates[atomicAdd(&shared.collected, 1)] = x;
    });
    __syncthreads();
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
      const float x = shared.candidates[i];
      int greater = 0, equal_before = 0;
      for (int j = 0; j < count; ++j) {
        greater += shared.candidates[j] > x;
        equal_before += j < i && shared.candidates[j] == x;
      }
      if (greater + equal_before == k - 1) shared.threshold = x;
    }
    __syncthreads();
    return shared.threshold;
  }
  return low;
}

// The token of a row; 0 where it has no distribution. excluded: 1 - top_p.
template <typename R>
__device__ __forceinline__ int sample_row(Block& block, const R& row, int top_k, bool top_p, float excluded) {
  float2 extent = make_float2(-infinity(), -infinity());  // of x and of -x
  row.each([&](int, float x, float) {
    extent = make_float2(fmaxf(extent.x, x == x ? x : infinity()), fmaxf(extent.y, -x));
  });
  extent = block.max(extent);
  const float max = extent.x;
  if (!(max - max == 0.0f)) return 0;

  // What is left: logits above floor, and those equal to it with an index above last. Dropped: the mass of what top-p
  // has dropped from what top-k has left.
  float floor = top_k > 0 ? top_k_threshold(block, row, top_k, -extent.y, max) : -infinity(), total = 0.0f;
  float dropped = 0.0f;
  int last = -1;
  while (true) {
    uint64_t best = 0;  // ratio, then the complement of the index: the first of equal ratios
    row.each([&](int c, float x, float q) {
      const float e = x > floor || (x == floor && c > last) ? expf(x - max) : 0.0f;
      const uint64_t entry = uint64_t(float_bits(e / q)) << 32 | ~uint32_t(c);
      best = entry > best ? entry : best;
    });
    const int drawn = int(~uint32_t(block.max(best)));
    if (!top_p) return drawn;

    // Top-p drops those whose cumulated probability, in ascending order and with the code itself, is at most 1 - top_p,
    // and never the last. Equal logits are in the order of their indices.
    row.each([&](int c, float x, float) {
      if (c == drawn) block.shared.drawn = x;
    });
    __syncthreads();
    const float value = block.shared.drawn;
    float2 mass = make_float2(0.0f, 0.0f);  // up to the drawn code, and above it
    row.each([&](int c, float x, float) {
      const float e = x > floor || (x == floor && c > last) ? expf(x - max) : 0.0f;
      const bool above = x > value || (x == value && c > drawn);
      mass.x += above ? 0.0f : e, mass.y += above ? e : 0.0f;
    });
    mass = block.sum(mass);
    dropped += mass.x;
    if (last < 0) total = mass.x + mass.y;
    if (dropped > excluded * total || mass.y == 0.0f) return drawn;
    floor = value, last = drawn;
  }
}

template <typename T, int kItems>
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleTokens a) {
  __shared__ Shared shared;
  const bool top_p = a.top_p > 0;
  const int top_k = a.top_k < a.V ? int(a.top_k) : 0;
  Block block{shared, 0};
  for (int64_t r = blockIdx.x; r < a.B * a.n; r += gridDim.x) {
    const T* cond = static_cast<const T*>(a.logits) + r / a.n * a.stride_b + r % a.n * a.stride_n;
    const Source<T> source{cond,
                           a.guided ? cond + a.B * a.stride_b : nullptr,
                           a.noise + r * a.V,
                           float(1 + a.guidance),
                           float(a.guidance),
                           int(a.V)};
    const Row<T, kItems> row(source);
    const int token = sample_row(block, row, top_k, top_p, float(1 - a.top_p));
    if (threadIdx.x == 0) a.tokens[r] = token;
  }
}

template <typename T, int kItems>
const char* launch_rows(const SampleTokens& a, void* stream) {
  const int64_t items = kItems ? (a.V + kItems - 1) / kItems : kThreads;
  const int threads = int((items + kWarpSize - 1) / kWarpSize) * kWarpSize;
  return launch(sample_kernel<T, kItems>, a.B * a.n, threads, stream, a);
}

template <typename T>
const char* sample(const SampleTokens& a, void* stream) {
  constexpr int kItems = 8;
  return a.V <= kItems * kThreads ? launch_rows<T, kItems>(a, stream) : launch_rows<T, 0>(a, stream);
}

}  // namespace

const char* sample_tokens(const SampleTokens& args, void* stream) {
  if (args.B * args.n == 0) return nullptr;
  switch (args.dtype) {
    case kFloat32: return sample<float>(args, stream);
    case kFloat16: return sample<float16>(args, stream);
    case kBFloat16: return sample<bfloat16>(args, stream);
    default: return "unknown dtype code: 0 is float32, 1 float16, 2 bfloat16";
  }
}

}  // namespace varkern::cuda

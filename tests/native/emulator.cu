// Checks the emulation against scalar models: sums over a block, shuffles, votes, atomics, shared memory, asynchronous
// copies, matrix instructions. nvcc compiles the same file, so that on a GPU the models are checked too.
#include <math.h>

#include <algorithm>
#include <random>

#include "check.h"
#include "common/device.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"

// Not an unnamed namespace: nvcc's stubs would confuse it with the unnamed one of csrc/common.
namespace varkern::emulator {

using check::Buffer;
using check::expect;

constexpr unsigned kAllLanes = 0xffffffffu;

// --- Sums over blocks, more of them than the emulation has at a time.
__global__ void sum_kernel(const float* in, float* out, int rows, int columns) {
  __shared__ float buffers[2][32];
  int parity = 0;
  for (int row = int(blockIdx.x); row < rows; row += int(gridDim.x), parity ^= 1) {
    float sum = 0.0f;
    for (int c = int(threadIdx.x); c < columns; c += int(blockDim.x)) sum += in[row * columns + c];
    sum = block_sum(sum, buffers[parity]);
    if (threadIdx.x == blockDim.x - 1) out[row] = sum;
  }
}

void check_block_sum() {
  for (int threads : {32, 96, 256}) {
    const int rows = 7, columns = 1500;
    Buffer<float> in(rows * columns), out(rows);
    for (int64_t i = 0; i < in.size(); ++i) in[i] = float(i % 1000);  // sums below 2^24 are exact
    check::ran(launch(sum_kernel, rows, threads, nullptr, static_cast<const float*>(in.data()), out.data(), rows,
                      columns));
    for (int row = 0; row < rows; ++row) {
      float exact = 0.0f;
      for (int c = 0; c < columns; ++c) exact += in[row * columns + c];
      expect(out[row] == exact, "sum of row %d by %d threads: %g, expected %g", row, threads, out[row], exact);
    }
  }
}

// --- Shuffles, votes, reductions: 64 threads, so that the second warp must not see the first.
constexpr int kLaneResults = 11;

__global__ void lanes_kernel(const int* in, long long* out, int width, int delta) {
  const int i = int(threadIdx.x), value = in[i];
  const long long results[kLaneResults] = {
      __shfl_sync(kAllLanes, value, delta, width),
      __shfl_up_sync(kAllLanes, value, unsigned(delta), width),
      __shfl_down_sync(kAllLanes, value, unsigned(delta), width),
      __shfl_xor_sync(kAllLanes, (long long)value << 32, delta, width) >> 32,
      __ballot_sync(kAllLanes, value > 0),
      __any_sync(kAllLanes, value > 990),
      __all_sync(kAllLanes, value > -990),
      __reduce_add_sync(kAllLanes, value),
      __reduce_min_sync(kAllLanes, value),
      __reduce_max_sync(kAllLanes, value),
      __reduce_or_sync(kAllLanes, unsigned(value)),
  };
  for (int k = 0; k < kLaneResults; ++k) out[k * int(blockDim.x) + i] = results[k];
}

void check_lanes() {
  const int threads = 64;
  Buffer<int> in(threads);
  Buffer<long long> out(kLaneResults * threads);
  std::mt19937 random(0);
  for (int i = 0; i < threads; ++i) in[i] = int(random() % 2001) - 1000;
  for (int width : {4, 32}) {
    for (int delta : {0, 1, 3, 5, 18}) {
      check::ran(launch(lanes_kernel, 1, threads, nullptr, static_cast<const int*>(in.data()), out.data(), width,
                        delta));
      for (int i = 0; i < threads; ++i) {
        const int *warp = &in[i / 32 * 32], *segment = &in[i / width * width], j = i % width;
        long long ballot = 0, any = 0, all = 1, bits = 0, sum = 0;
        for (int lane = 0; lane < 32; ++lane) {
          ballot |= (long long)(warp[lane] > 0) << lane, bits |= (long long)unsigned(warp[lane]);
          any |= warp[lane] > 990, all &= warp[lane] > -990, sum += warp[lane];
        }
        // From below the segment a lane may read by xor, from above never.
        const int other = (i % 32 ^ delta) < i % 32 / width * width + width ? i ^ delta : i;
        const long long expected[kLaneResults] = {segment[delta % width],
                                                  segment[j - delta < 0 ? j : j - delta],
                                                  segment[j + delta < width ? j + delta : j],
                                                  in[other],
                                                  ballot,
                                                  any,
                                                  all,
                                                  sum,
                                                  *std::min_element(warp, warp + 32),
                                                  *std::max_element(warp, warp + 32),
                                                  bits};
        for (int k = 0; k < kLaneResults; ++k) {
          expect(out[k * threads + i] == expected[k], "lane operation %d, thread %d, width %d, delta %d: %lld, not %lld",
                 k, i, width, delta, out[k * threads + i], expected[k]);
        }
      }
    }
  }
}

// --- Atomics in shared and in global memory.
struct Totals {
  int sum, largest, smallest;
  unsigned bits, swaps;
  unsigned long long wide;
  float real;
};

__global__ void atomics_kernel(const int* in, Totals* totals, unsigned* tickets, int n) {
  __shared__ int sum, largest;
  if (threadIdx.x == 0) sum = 0, largest = -1000000;
  __syncthreads();
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) {
    atomicAdd(&sum, in[i]);
    atomicMax(&largest, in[i]);
    atomicMin(&totals->smallest, in[i]);
    atomicOr(&totals->bits, 1u << (i % 32));
    atomicAdd(&totals->wide, 1ull << 40);
    atomicAdd(&totals->real, 0.5f);
    unsigned seen = 0;  // a guess that is right once
    for (unsigned old; (old = atomicCAS(&totals->swaps, seen, seen + 1)) != seen;) seen = old;
    tickets[i] = atomicExch(&tickets[i], 7u) + seen;
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&totals->sum, sum), atomicMax(&totals->largest, largest);
}

void check_atomics() {
  const int n = 1000;
  Buffer<int> in(n);
  Buffer<unsigned> tickets(n);
  Buffer<Totals> totals(1);
  std::mt19937 random(0);
  for (int i = 0; i < n; ++i) in[i] = int(random() % 2001) - 1000, tickets[i] = 0;
  totals[0] = {0, -1000000, 1000000, 0u, 0u, 0ull, 0.0f};
  check::ran(launch(atomics_kernel, 3, 128, nullptr, static_cast<const int*>(in.data()), totals.data(), tickets.data(),
                    n));
  int sum = 0;
  for (int i = 0; i < n; ++i) sum += in[i];
  const Totals& t = totals[0];
  expect(t.sum == sum, "atomicAdd: %d, expected %d", t.sum, sum);
  expect(t.largest == *std::max_element(&in[0], &in[0] + n), "atomicMax: %d", t.largest);
  expect(t.smallest == *std::min_element(&in[0], &in[0] + n), "atomicMin: %d", t.smallest);
  expect(t.bits == kAllLanes, "atomicOr: %u", t.bits);
  expect(t.wide == (unsigned long long)n << 40, "atomicAdd of 64 bits: %llu", t.wide);
  expect(t.real == 0.5f * n, "atomicAdd of floats: %g", t.real);
  expect(t.swaps == unsigned(n), "atomicCAS: %u", t.swaps);
  std::sort(&tickets[0], &tickets[0] + n);
  for (int i = 0; i < n; ++i) expect(tickets[i] == unsigned(i), "ticket %d: %u", i, tickets[i]);
}

// --- A pipeline of asynchronous copies through dynamic shared memory: each block adds up its tiles, two copies ahead.
__global__ void copies_kernel(const float* in, float* out, int tiles, int n) {
  float4* buffer = dynamic_shared<float4>();  // (3, blockDim.x)
  const int i = int(threadIdx.x), threads = int(blockDim.x);
  const auto start = [&](int tile) {
    const int first = (tile * threads + i) * 4;
    if (tile < tiles) cp_async(&buffer[tile % 3 * threads + i], in + (first < n ? first : 0), first < n);
    cp_async_commit();
  };
  start(0), start(1);
  float sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<1>();
    __syncthreads();
    start(tile + 2);
    const float4 v = buffer[tile % 3 * threads + threads - 1 - i];  // another thread's copy
    sum += v.x + v.y + v.z + v.w;
  }
  cp_async_wait<0>();
  out[i] = sum;
}

void check_copies() {
  const int threads = 64, tiles = 5, n = (tiles * threads - 40) * 4;
  Buffer<float> in(n), out(threads);
  for (int i = 0; i < n; ++i) in[i] = float(i);
  check::ran(launch_shared(copies_kernel, 1, threads, 3 * threads * 16, nullptr, static_cast<const float*>(in.data()),
                           out.data(), tiles, n));
  for (int i = 0; i < threads; ++i) {
    float exact = 0.0f;
    for (int tile = 0; tile < tiles; ++tile) {
      for (int k = 0; k < 4; ++k) {
        const int at = (tile * threads + threads - 1 - i) * 4 + k;
        exact += at < n ? in[at] : 0.0f;
      }
    }
    expect(out[i] == exact, "asynchronous copies, thread %d: %g, expected %g", i, out[i], exact);
  }
}

// --- D += A B with A (16, 16) and B (16, 8), the fragments brought in three ways.
enum Way { kByHand, kLdmatrix, kLdmatrixTransposed };

template <typename T>
__device__ uint32_t pair(const T* low, const T* high) {
  return low->bits | uint32_t(high->bits) << 16;
}

// a: A row by row, at its transpose, b: B row by row, bt its transpose.
template <typename T>
__global__ void mma_kernel(const T* a, const T* at, const T* b, const T* bt, float* d, Way way) {
  __shared__ __align__(16) T A[16][16], At[16][16], B[16][8], Bt[8][16];
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) A[i / 16][i % 16] = a[i], At[i / 16][i % 16] = at[i];
  for (int i = lane; i < 128; i += 32) B[i / 8][i % 8] = b[i], Bt[i / 16][i % 16] = bt[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  if (way == kByHand) {
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, k = 2 * t + i / 2 * 8;
      fa[i] = pair(&A[row][k], &A[row][k + 1]);
    }
    for (int i = 0; i < 2; ++i) fb[i] = pair(&B[2 * t + i * 8][g], &B[2 * t + i * 8 + 1][g]);
  } else if (way == kLdmatrix) {
    ldmatrix(fa, &A[lane % 16][lane / 16 * 8]);
    ldmatrix(fb, &Bt[lane % 8][lane / 8 % 2 * 8]);
  } else {
    ldmatrix_transposed(fa, &At[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    ldmatrix_transposed(fb, &B[lane % 16][0]);
  }
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma(fd, fa, fb, T{});
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = fd[i];
}

template <typename T>
void check_mma(Way way) {
  Buffer<T> a(256), at(256), b(128), bt(128);
  Buffer<float> d(128);
  double exact[128], size[128];
  std::mt19937 random(0);
  const auto uniform = [&] { return float(int32_t(random())) * 0x1p-31f; };
  for (int i = 0; i < 256; ++i) a[i] = at[i % 16 * 16 + i / 16] = From<T>::value(uniform());
  for (int i = 0; i < 128; ++i) b[i] = bt[i % 8 * 16 + i / 8] = From<T>::value(uniform());
  for (int i = 0; i < 128; ++i) {
    d[i] = uniform();
    exact[i] = d[i], size[i] = fabs(d[i]);
    for (int k = 0; k < 16; ++k) {
      const double product = double(to_float(a[i / 8 * 16 + k])) * to_float(b[k * 8 + i % 8]);
      exact[i] += product, size[i] += fabs(product);
    }
  }
  check::ran(launch(mma_kernel<T>, 1, 32, nullptr, static_cast<const T*>(a.data()), static_cast<const T*>(at.data()),
                    static_cast<const T*>(b.data()), static_cast<const T*>(bt.data()), d.data(), way));
  // 17 terms, each addition off by less than a float32 step, for tensor cores cut instead of rounding.
  for (int i = 0; i < 128; ++i) {
    expect(fabs(d[i] - exact[i]) <= 17 * 0x1p-23 * size[i], "mma, way %d, D[%d][%d]: %g, expected %g", int(way), i / 8,
           i % 8, d[i], exact[i]);
  }
}

// --- Powers of two.
__global__ void powers_kernel(const float* in, float* out, int n) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) out[i] = exp2_approx(in[i]);
}

void check_powers() {
  const int n = 2000;
  Buffer<float> in(n), out(n);
  for (int i = 0; i < n; ++i) in[i] = -0.0937f * float(i);
  in[n - 2] = -INFINITY, in[n - 1] = NAN;
  check::ran(launch(powers_kernel, 1, 64, nullptr, static_cast<const float*>(in.data()), out.data(), n));
  for (int i = 0; i < n - 1; ++i) {
    const double exact = in[i] < -126.0f ? 0.0 : exp2(double(in[i]));
    expect(fabs(out[i] - exact) <= 0x1p-22 * exact, "2^%g: %g, expected %g", in[i], out[i], exact);
  }
  expect(out[n - 1] != out[n - 1], "2^NaN: %g", out[n - 1]);
}

}  // namespace varkern::emulator

int main() {
  using namespace varkern::emulator;
  check_block_sum();
  check_lanes();
  check_atomics();
  check_copies();
  check_powers();
  for (Way way : {kByHand, kLdmatrix, kLdmatrixTransposed}) {
    check_mma<varkern::float16>(way);
    check_mma<varkern::bfloat16>(way);
  }
  return check::result();
}

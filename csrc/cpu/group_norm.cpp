// Group normalisation with SiLU on the CPU: statistics of chunks of pixels, their combination, then one pass that
// applies it. Vectorised over channels where they lie next to each other (channels_last), else over pixels.
#include "ops/group_norm.h"

#include "common/dispatch_dtype.h"
#include "cpu/arena.h"
#include "cpu/simd/exponential.h"
#include "cpu/simd/lanes.h"
#include "cpu/threads.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

// A chunk is read twice and stays in the cache in between. It is also what float32 sums run over, so that few terms are
// added one after another: the runs below, then their sums.
constexpr int64_t kChunkBytes = 64 * 1024, kChunkSum = 512;
constexpr int64_t kMaxChunks = 128;  // of an image: what is combined stays little beside what is read
constexpr int64_t kRun = 8;
constexpr int64_t kSampled = 4;  // every fourth pixel, or vector, decides around what the squares are taken

// How an image is cut, by its shape alone.
struct Chunks {
  int64_t pixels, count;

  Chunks(const GroupNorm& a, int64_t element) {
    pixels = a.channels_last ? minimum(kChunkBytes / (a.C * element), kChunkSum) : kChunkSum * kRun;
    pixels = maximum(pixels, (a.P + kMaxChunks - 1) / kMaxChunks);
    count = (a.P + pixels - 1) / pixels;
  }
};

// Of every channel of a chunk, or of one: a centre near the mean, and the sums of x - centre and of its square.
//
// The mean of a share p of the elements is at most sqrt((1 - p) / p) standard deviations off, so that taking the
// squares around it loses at most the factor 1 / p of float32's precision, whatever the mean. The sum of x - centre
// makes up for what the centre is off.
struct Statistics {
  float *centre, *sum, *square;

  Statistics(float* first, int64_t C) : centre(first), sum(first + C), square(first + 2 * C) {}
};

template <int64_t kPixels, typename T>
inline void accumulate(const T* x, int64_t C, const Statistics& s) {
  for_each_vector(C, [&](int64_t c, auto lanes) {
    const Floats centre = load(s.centre + c, lanes);
    Floats sum{}, square{};
    for (int64_t i = 0; i < kPixels; ++i) {
      const Floats d = load(x + i * C + c, lanes) - centre;
      sum += d;
      square += d * d;
    }
    store(s.sum + c, load(s.sum + c, lanes) + sum, lanes);
    store(s.square + c, load(s.square + c, lanes) + square, lanes);
  });
}

// x (pixels, C).
template <typename T>
void channels_statistics(const T* x, int64_t pixels, int64_t C, const Statistics& s) {
  const float samples = float((pixels + kSampled - 1) / kSampled);
  __builtin_memset(s.sum, 0, C * sizeof(float));
  for (int64_t p = 0; p < pixels; p += kSampled) {
    for_each_vector(C, [&](int64_t c, auto lanes) {
      store(s.sum + c, load(s.sum + c, lanes) + load(x + p * C + c, lanes), lanes);
    });
  }
  for (int64_t c = 0; c < C; ++c) s.centre[c] = s.sum[c] / samples, s.sum[c] = s.square[c] = 0.0f;
  int64_t p = 0;
  for (; p + kRun <= pixels; p += kRun) accumulate<kRun>(x + p * C, C, s);
  for (; p < pixels; ++p) accumulate<1>(x + p * C, C, s);
}

// x (pixels), one channel.
template <typename T>
void channel_statistics(const T* x, int64_t pixels, float& centre, float& total, float& total_square) {
  Floats sum{};
  int64_t samples = 0;
  for_each_vector(pixels, [&](int64_t p, auto lanes) {
    if (p / kWidth % kSampled) return;
    sum += load(x + p, lanes);
    samples += minimum(kWidth, pixels - p);
  });
  centre = sum_lanes(sum) / float(samples);
  Floats sums{}, squares{};
  for (int64_t begin = 0; begin < pixels; begin += kRun * kWidth) {
    Floats run{}, run_squares{};
    for_each_vector(minimum(kRun * kWidth, pixels - begin), [&](int64_t p, auto lanes) {
      const Floats d = keep(load(x + begin + p, lanes) - centre, lanes);
      run += d;
      run_squares += d * d;
    });
    sums += run;
    squares += run_squares;
  }
  total = sum_lanes(sums), total_square = sum_lanes(squares);
}

// partial (chunks, 3, C) of an image -> the coefficients of a group's channels.
void combine(const GroupNorm& a, const Chunks& chunks, float* partial, int64_t b, int64_t group) {
  const int64_t width = a.C / a.groups, first = group * width;
  const double elements = double(width) * double(a.P);
  double mean = 0.0, square = 0.0;
  for (int64_t k = 0; k < chunks.count; ++k) {
    const Statistics s(partial + k * 3 * a.C + first, a.C);
    const double n = double(minimum(chunks.pixels, a.P - k * chunks.pixels));
    for (int64_t c = 0; c < width; ++c) mean += n * double(s.centre[c]) + double(s.sum[c]);
  }
  mean /= elements;
  for (int64_t k = 0; k < chunks.count; ++k) {
    const Statistics s(partial + k * 3 * a.C + first, a.C);
    const double n = double(minimum(chunks.pixels, a.P - k * chunks.pixels));
    for (int64_t c = 0; c < width; ++c) {
      const double d = double(s.centre[c]) - mean;
      square += double(s.square[c]) + d * (2.0 * double(s.sum[c]) + n * d);
    }
  }
  const double variance = square / elements, rstd = 1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + a.eps);
  const float centre = a.out ? float(mean) : 0.0f;
  float* multiplier = a.coefficients + b * a.C + first;
  for (int64_t c = 0; c < width; ++c) {
    // From the rounded multiplier, so that its rounding is relative to x - mean and not to x.
    const float m = float(rstd * double(a.weight[first + c]));
    multiplier[c] = m;
    multiplier[c + a.B * a.C] = float(double(a.bias[first + c]) - (mean - double(centre)) * double(m));
    if (a.out) multiplier[c + 2 * a.B * a.C] = centre;
  }
}

template <bool kSilu, typename T>
void apply_channels(const T* x, T* out, int64_t pixels, int64_t C, const float* multiplier, int64_t stride) {
  for (int64_t p = 0; p < pixels; ++p, x += C, out += C) {
    for_each_vector(C, [&](int64_t c, auto lanes) {
      const float* m = multiplier + c;
      const Floats v = (load(x + c, lanes) - load(m + 2 * stride, lanes)) * load(m, lanes) + load(m + stride, lanes);
      store(out + c, kSilu ? silu(v) : v, lanes);
    });
  }
}

template <bool kSilu, typename T>
void apply_channel(const T* x, T* out, int64_t pixels, const float* multiplier, int64_t stride) {
  const float m = multiplier[0], offset = multiplier[stride], centre = multiplier[2 * stride];
  for_each_vector(pixels, [&](int64_t p, auto lanes) {
    const Floats v = (load(x + p, lanes) - centre) * m + offset;
    store(out + p, kSilu ? silu(v) : v, lanes);
  });
}

template <typename T>
const char* group_norm_of(const GroupNorm& a) {
  const Chunks chunks(a, sizeof(T));
  const int64_t lines = a.channels_last ? 1 : a.C, line = a.C / lines, tasks = a.B * lines * chunks.count;
  const int threads = thread_count(tasks, a.B * a.C * a.P * int64_t(sizeof(T)) * (a.out ? 3 : 1));
  float* partial = nullptr;  // (B, chunks, 3, C)
  // A task: a chunk of pixels of all channels, or with contiguous memory of one.
  const auto for_task = [&](int64_t task, const auto& body) {
    const int64_t k = task % chunks.count, c = task / chunks.count % lines, b = task / chunks.count / lines;
    const int64_t begin = k * chunks.pixels, pixels = minimum(chunks.pixels, a.P - begin);
    body(b, k, c, (b * lines + c) * a.P * line + begin * line, pixels);
  };
  const bool ran = with_workspace(
      [&](Arena& arena) { partial = arena.take<float>(a.B * chunks.count * 3 * a.C); },
      [&] {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
          for (int64_t task = 0; task < tasks; ++task) {
            for_task(task, [&](int64_t b, int64_t k, int64_t c, int64_t at, int64_t pixels) {
              const Statistics s(partial + (b * chunks.count + k) * 3 * a.C + c, a.C);
              const T* x = (const T*)a.x + at;
              if (a.channels_last) {
                channels_statistics(x, pixels, a.C, s);
              } else {
                channel_statistics(x, pixels, *s.centre, *s.sum, *s.square);
              }
            });
          }
#pragma omp for schedule(static)
          for (int64_t i = 0; i < a.B * a.groups; ++i) {
            const int64_t b = i / a.groups;
            combine(a, chunks, partial + b * chunks.count * 3 * a.C, b, i % a.groups);
          }
          if (a.out) {
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks; ++task) {
              for_task(task, [&](int64_t b, int64_t, int64_t c, int64_t at, int64_t pixels) {
                const float* m = a.coefficients + b * a.C + c;
                const T* x = (const T*)a.x + at;
                T* out = (T*)a.out + at;
                const int64_t stride = a.B * a.C;
                if (a.channels_last) {
                  a.silu ? apply_channels<true>(x, out, pixels, a.C, m, stride)
                         : apply_channels<false>(x, out, pixels, a.C, m, stride);
                } else {
                  a.silu ? apply_channel<true>(x, out, pixels, m, stride)
                         : apply_channel<false>(x, out, pixels, m, stride);
                }
              });
            }
          }
        }
      });
  return ran ? nullptr : "out of memory for the partial sums of the group norm";
}

}  // namespace

const char* group_norm(const GroupNorm& args) {
  return dispatch_dtype(args.dtype, [&](auto element) { return group_norm_of<decltype(element)>(args); });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

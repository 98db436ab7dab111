// A 3x3 convolution by Winograd's minimal filtering, F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308): an output tile of
// 4 x 4 costs 36 multiplications a channel pair instead of 144. Transformed, the convolution is 36 products of matrices,
// tiles x channels times channels x outputs.
//
// The interpolation points are 0, +-5/8, +-5/4 and infinity. Every constant of the data's transforms is then exact in
// float32, and the root mean square error under half of what the common 0, +-1, +-2 give (docs/ops/conv.md).
#include "ops/conv.h"

#include "cpu/arena.h"
#include "cpu/simd/exponential.h"
#include "cpu/simd/product.h"
#include "cpu/threads.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int64_t kOut = 4, kIn = 6, kPoints = kIn * kIn;  // sides of a tile, and its points
constexpr int64_t kAcross = 8, kDown = 4;                  // tiles of a block, at most: transformed, they stay in the cache
constexpr int64_t kWeightBytes = 16 << 20;                 // of transformed weights at a time
constexpr int64_t kPad = 16;  // floats between planes: their distance must be no multiple of a page
constexpr float kA = 0.625f, kB = 1.25f, kA2 = kA * kA, kB2 = kB * kB;  // points and their squares

// Which part of the work is whose.
struct Plan {
  int64_t height, width;             // of the output
  int64_t depth, panels;             // channels in whole vectors, outputs in whole panels
  int64_t across, down;              // tiles of a block
  int64_t columns, rows;             // blocks of an image
  int64_t group;                     // panels whose weights are transformed at a time
  int64_t share;                     // of them, those of a task: not all where threads would be idle
  int64_t line, pixels;              // of the input region of a block
  int64_t u_plane, v_plane, m_plane;  // floats from one point to the next
  int threads;
};

Plan make_plan(const Conv3x3& a) {
  Plan p;
  p.height = a.upsample ? 2 * a.H : a.H, p.width = a.upsample ? 2 * a.W : a.W;
  p.depth = round_up(a.C, kWidth), p.panels = divide_up(a.outputs, kColumns<float>);
  const int64_t tiles_x = divide_up(p.width, kOut), tiles_y = divide_up(p.height, kOut);
  p.columns = divide_up(tiles_x, kAcross), p.rows = divide_up(tiles_y, kDown);
  p.across = divide_up(tiles_x, p.columns), p.down = divide_up(tiles_y, p.rows);
  const int64_t blocks = a.B * p.rows * p.columns;
  p.threads = thread_count(blocks * p.panels, kPoints * p.across * p.down * p.depth * p.panels * blocks);
  p.group = maximum(1, minimum(p.panels, kWeightBytes / (kPoints * p.depth * kColumns<float> * int64_t(sizeof(float)))));
  p.group = divide_up(p.panels, divide_up(p.panels, p.group));
  p.share = divide_up(p.group, minimum(p.group, divide_up(p.threads, blocks)));
  p.line = kOut * p.across + 2, p.pixels = p.line * (kOut * p.down + 2);
  p.u_plane = p.group * kColumns<float> * p.depth + kPad;
  p.v_plane = p.across * p.down * p.depth + kPad;
  p.m_plane = p.across * p.down * p.share * kColumns<float> + kPad;
  return p;
}

// v[i * v_step] = sum over k of B^T[i][k] d[k * d_step]; the rows of B^T are the polynomials that vanish at all points
// but one.
inline void transform_input(const Floats* d, int d_step, Floats* v, int v_step) {
  const Floats d0 = d[0], d1 = d[d_step], d2 = d[2 * d_step], d3 = d[3 * d_step], d4 = d[4 * d_step];
  const Floats d5 = d[5 * d_step];
  const Floats even_a = d4 - kB2 * d2, odd_a = kA * (d3 - kB2 * d1);
  const Floats even_b = d4 - kA2 * d2, odd_b = kB * (d3 - kA2 * d1);
  v[0] = kA2 * kB2 * d0 - (kA2 + kB2) * d2 + d4;
  v[v_step] = even_a + odd_a;
  v[2 * v_step] = even_a - odd_a;
  v[3 * v_step] = even_b + odd_b;
  v[4 * v_step] = even_b - odd_b;
  v[5 * v_step] = kA2 * kB2 * d1 - (kA2 + kB2) * d3 + d5;
}

// The same for a filter of 3: its polynomial's values at the points, divided by what the input's rows are there.
inline void transform_filter(const Floats* g, int g_step, Floats* u, int u_step) {
  constexpr float at_0 = 1 / (kA2 * kB2), at_a = 1 / (2 * kA2 * (kA2 - kB2)), at_b = 1 / (2 * kB2 * (kB2 - kA2));
  const Floats g0 = g[0], g1 = g[g_step], g2 = g[2 * g_step];
  const Floats even_a = g0 + kA2 * g2, odd_a = kA * g1, even_b = g0 + kB2 * g2, odd_b = kB * g1;
  u[0] = at_0 * g0;
  u[u_step] = at_a * (even_a + odd_a);
  u[2 * u_step] = at_a * (even_a - odd_a);
  u[3 * u_step] = at_b * (even_b + odd_b);
  u[4 * u_step] = at_b * (even_b - odd_b);
  u[5 * u_step] = g2;
}

inline void transform_output(const Floats* m, int m_step, Floats* y, int y_step) {
  const Floats m0 = m[0], m5 = m[5 * m_step];
  const Floats sum_a = m[m_step] + m[2 * m_step], difference_a = m[m_step] - m[2 * m_step];
  const Floats sum_b = m[3 * m_step] + m[4 * m_step], difference_b = m[3 * m_step] - m[4 * m_step];
  y[0] = m0 + sum_a + sum_b;
  y[y_step] = kA * difference_a + kB * difference_b;
  y[2 * y_step] = kA2 * sum_a + kB2 * sum_b;
  y[3 * y_step] = (kA2 * kA) * difference_a + (kB2 * kB) * difference_b + m5;
}

// u[point][channel][output of the panel], for kWidth channels of the panel whose first output is given.
void transform_weights(const Conv3x3& a, const Plan& p, int64_t first_output, int64_t first_channel, float* u) {
  for (int64_t c = first_channel; c < first_channel + kWidth; ++c) {
    for (int64_t o = first_output; o < first_output + kColumns<float>; o += kWidth) {
      float taps[9][kWidth] = {};
      Floats g[9], half[18], full[kPoints];
      const int64_t count = c < a.C ? minimum(kWidth, a.outputs - o) : 0;
      for (int64_t lane = 0; lane < count; ++lane) {
        const float* w = a.weight + (o + lane) * a.weight_stride_o + c * a.weight_stride_c;
        for (int i = 0; i < 9; ++i) taps[i][lane] = w[i / 3 * a.weight_stride_h + i % 3 * a.weight_stride_w];
      }
      for (int i = 0; i < 9; ++i) g[i] = load(taps[i]);
      for (int j = 0; j < 3; ++j) transform_filter(g + j, 3, half + j, 3);
      for (int i = 0; i < 6; ++i) transform_filter(half + 3 * i, 1, full + 6 * i, 1);
      float* target = u + c * kColumns<float> + o - first_output;
      for (int i = 0; i < kPoints; ++i) store(target + i * p.u_plane, full[i]);
    }
  }
}

// The pixels (y0.., x0..) of the output's grid that a block reads, normalised, zeros outside the image.
void read_region(const Conv3x3& a, const Plan& p, int64_t b, int64_t y0, int64_t x0, float* region) {
  const int shift = a.upsample ? 1 : 0;
  const float* multiplier = a.multiplier ? a.multiplier + b * a.C : nullptr;
  const float* offset = a.multiplier ? a.offset + b * a.C : nullptr;
  for (int64_t i = 0; i < p.pixels; ++i, region += p.depth) {
    const int64_t y = y0 + i / p.line, x = x0 + i % p.line;
    if (y < 0 || y >= p.height || x < 0 || x >= p.width) {
      __builtin_memset(region, 0, p.depth * sizeof(float));
      continue;
    }
    const float* pixel = a.x + ((b * a.H + (y >> shift)) * a.W + (x >> shift)) * a.C;
    for (int64_t c = 0; c < p.depth; c += kWidth) {
      const int64_t n = minimum(kWidth, a.C - c);
      Floats v = n == kWidth ? load(pixel + c) : load(pixel + c, n);
      if (multiplier) v = n == kWidth ? silu(v * load(multiplier + c) + load(offset + c))
                                      : silu(v * load(multiplier + c, n) + load(offset + c, n));
      store(region + c, v);
    }
  }
}

void transform_region(const Plan& p, const float* region, float* v) {
  for (int64_t tile = 0; tile < p.across * p.down; ++tile) {
    const float* corner = region + (tile / p.across * kOut * p.line + tile % p.across * kOut) * p.depth;
    for (int64_t c = 0; c < p.depth; c += kWidth) {
      Floats d[kPoints], t[kPoints];
      for (int i = 0; i < kPoints; ++i) d[i] = load(corner + (i / 6 * p.line + i % 6) * p.depth + c);
      for (int j = 0; j < 6; ++j) transform_input(d + j, 6, t + j, 6);
      for (int i = 0; i < 6; ++i) transform_input(t + 6 * i, 1, d + 6 * i, 1);
      for (int i = 0; i < kPoints; ++i) store(v + i * p.v_plane + tile * p.depth + c, d[i]);
    }
  }
}

// The products of a block, m[point][tile][output], to pixels (y0.., x0..) of the output from column `first` on.
void write_block(const Conv3x3& a, const Plan& p, const float* m, int64_t m_line, int64_t b, int64_t y0, int64_t x0,
                 int64_t first) {
  for (int64_t tile = 0; tile < p.across * p.down; ++tile) {
    const int64_t y = y0 + tile / p.across * kOut, x = x0 + tile % p.across * kOut;
    const int64_t lines = minimum(kOut, p.height - y), columns = minimum(kOut, p.width - x);
    if (lines <= 0 || columns <= 0) continue;
    for (int64_t o = 0; o < m_line && first + o < a.outputs; o += kWidth) {
      Floats products[kPoints], half[24], result[16];
      for (int i = 0; i < kPoints; ++i) products[i] = load(m + i * p.m_plane + tile * m_line + o);
      for (int j = 0; j < 6; ++j) transform_output(products + j, 6, half + j, 6);
      for (int i = 0; i < 4; ++i) transform_output(half + 6 * i, 1, result + 4 * i, 1);
      const int64_t n = minimum(kWidth, a.outputs - first - o);
      const Floats bias = a.bias ? load(a.bias + first + o, n) : Floats{};
      for (int64_t i = 0; i < lines; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at = ((b * p.height + y + i) * p.width + x + j) * a.outputs + first + o;
          Floats sum = result[4 * i + j] + bias;
          if (n == kWidth) {
            if (a.residual) sum += load(a.residual + at);
            store(a.out + at, sum);
          } else {
            if (a.residual) sum += load(a.residual + at, n);
            store(a.out + at, sum, n);
          }
        }
      }
    }
  }
}

struct Scratch {
  float *region, *v, *m;
};

// Panels first.. of one block, with their transformed weights.
void convolve_block(const Conv3x3& a, const Plan& p, int64_t block, const float* u, int64_t first, int64_t panels,
                    const Scratch& scratch) {
  const int64_t image = block / (p.rows * p.columns), y0 = block / p.columns % p.rows * p.down * kOut;
  const int64_t x0 = block % p.columns * p.across * kOut, m_line = panels * kColumns<float>;
  read_region(a, p, image, y0 - 1, x0 - 1, scratch.region);
  transform_region(p, scratch.region, scratch.v);
  for (int i = 0; i < kPoints; ++i) {
    multiply_panels<false, false>(scratch.v + i * p.v_plane, p.depth, p.across * p.down, u + i * p.u_plane,
                                  p.depth * kColumns<float>, kColumns<float>, p.depth, panels,
                                  scratch.m + i * p.m_plane, m_line);
  }
  write_block(a, p, scratch.m, m_line, image, y0, x0, first * kColumns<float>);
}

}  // namespace

const char* conv3x3(const Conv3x3& a) {
  const Plan p = make_plan(a);
  float* u = nullptr;
  Scratch* scratch = nullptr;
  const auto prepare = [&](Arena& arena) {
    u = arena.take<float>(kPoints * p.u_plane);
    scratch = arena.take<Scratch>(p.threads);
    for (int i = 0; i < p.threads; ++i) {
      float* region = arena.take<float>(p.pixels * p.depth);
      float* v = arena.take<float>(kPoints * p.v_plane);
      float* m = arena.take<float>(kPoints * p.m_plane);
      if (arena.base) scratch[i] = {region, v, m};
    }
  };
  const bool done = with_workspace(prepare, [&] {
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
    for (int64_t begin = 0; begin < p.panels; begin += p.group) {
      const int64_t group = minimum(p.group, p.panels - begin), slices = p.depth / kWidth;
#pragma omp for schedule(static)
      for (int64_t task = 0; task < group * slices; ++task) {
        const int64_t panel = task / slices;
        transform_weights(a, p, (begin + panel) * kColumns<float>, task % slices * kWidth,
                          u + panel * p.depth * kColumns<float>);
      }
      const int64_t shares = divide_up(group, p.share);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < a.B * p.rows * p.columns * shares; ++task) {
        const int64_t first = task % shares * p.share, panels = minimum(p.share, group - first);
        convolve_block(a, p, task / shares, u + first * p.depth * kColumns<float>, begin + first, panels,
                       scratch[thread_number()]);
      }
    }
  });
  return done ? nullptr : "out of memory for the transformed weights and tiles of a 3x3 convolution";
}

}  // namespace varkern::cpu::VARKERN_LEVEL

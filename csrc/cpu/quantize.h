// What the residual quantizer's CPU kernels share: products with gathered rows, packing, and one scale's map.
//
// Maps are held channels-last, (H, W, Cp) float32 with the channels padded by zeros to Cp, a multiple of kBlock.
//
// phi(up(codes)) is computed without ever convolving the full-size map: upsampling acts on positions and the taps of
// phi act on channels, so they commute. The h * w codes are multiplied by all nine taps in one product, and upsampling
// by shifted interpolation weights then does the rest. For the 256 px schedule that is a quarter of the arithmetic.
//
// Internal linkage only, as in simd/vector.h.
#pragma once

#include "cpu/arena.h"
#include "cpu/simd/product.h"
#include "cpu/threads.h"
#include "ops/quantize.h"

namespace varkern {
namespace {

constexpr int kBlock = 32;                     // channels are padded to a multiple of this
constexpr int kBlockVectors = kBlock / kWidth;
constexpr int kPanel = int(kColumns<float>);   // columns of one register tile
constexpr int kTaps = 9;                       // of the 3 x 3 convolution

// multiply_tile with the factors in rows[r].
template <int R>
inline void multiply_rows(const float* const* rows, const float* panel, int64_t line, int64_t K, Floats (&acc)[R][2]) {
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  multiply_tile([&](int r, int64_t k) { return row[r][k]; }, panel, line, K, acc);
}

// out[m] (N floats, out_line apart) = or += rows[m] (K floats) times panels (N / kPanel, K, kPanel), or, with
// panel_step = kPanel, times a plain (K, N) matrix of that line.
template <bool kAdd>
inline void product(const float* const* rows, int64_t M, const float* panels, int64_t panel_step, int64_t line,
                    int64_t K, int64_t N, float* out, int64_t out_line) {
  for (int64_t m = 0; m < M; m += kRows) {
    with_rows(minimum(kRows, M - m), [&](auto count) {
      constexpr int R = decltype(count)::value;
      for (int64_t n = 0; n < N; n += kPanel) {
        Floats acc[R][2] = {};
        float* target = out + m * out_line + n;
        if (kAdd) {
          for (int r = 0; r < R; ++r) {
            acc[r][0] = load(target + r * out_line), acc[r][1] = load(target + r * out_line + kWidth);
          }
        }
        multiply_rows<R>(rows + m, panels + n / kPanel * panel_step, line, K, acc);
        for (int r = 0; r < R; ++r) {
          store(target + r * out_line, acc[r][0]), store(target + r * out_line + kWidth, acc[r][1]);
        }
      }
    });
  }
}

// One line of an interpolation matrix: out = sum over t < count of weight[t] * in[first + t].
struct Taps {
  int32_t first, count;
  float weight[4];
};

// F.interpolate(mode="bicubic", align_corners=False): cubic convolution with a = -0.75, positions clamped to the map.
inline void bicubic_taps(int64_t in, int64_t out, Taps* taps) {
  const double a = -0.75;
  for (int64_t y = 0; y < out; ++y) {
    const double source = (double(y) + 0.5) * double(in) / double(out) - 0.5, floor = __builtin_floor(source);
    const double t = source - floor, u = 1 - t;
    const double far_left = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a;
    const double far_right = ((a * (u + 1) - 5 * a) * (u + 1) + 8 * a) * (u + 1) - 4 * a;
    const double weights[4] = {far_left, ((a + 2) * t - (a + 3)) * t * t + 1, ((a + 2) * u - (a + 3)) * u * u + 1,
                               far_right};
    const int64_t count = minimum(4, in), start = int64_t(floor) - 1;
    const int64_t first = maximum(0, minimum(start, in - count));
    double sums[4] = {};
    for (int i = 0; i < 4; ++i) sums[maximum(0, minimum(start + i, in - 1)) - first] += weights[i];
    taps[y].first = int32_t(first), taps[y].count = int32_t(count);
    for (int i = 0; i < 4; ++i) taps[y].weight[i] = float(sums[i]);
  }
}

inline void identity_taps(int64_t size, Taps* taps) {
  for (int64_t y = 0; y < size; ++y) taps[y] = {int32_t(y), 1, {1, 0, 0, 0}};
}

struct Scale {
  int64_t h, w, first;  // first: of its positions in the concatenated maps
  int64_t phi;
  Taps *rows, *columns;  // (H), (W): from the map to the full size
};

// The scales of a call and the packed phis. Without a phi one identity is packed: everything else is then the same.
struct Plan {
  const ResidualMaps* maps;
  int64_t Cp, N;  // N = kTaps * Cp, the columns of a product with all taps of phi
  int64_t positions, largest, widest, highest;  // of all scales together; of the largest, widest and highest one
  Scale* scales;                                // (K)
  float* kernels;                               // (phis, N / kPanel, Cv, kPanel)
  float* biases;                                // (phis, Cp)

  int64_t phis() const { return maximum(1, maps->num_phis); }
  const float* kernel(const Scale& scale) const { return kernels + scale.phi * N * maps->Cv; }
  const float* bias(const Scale& scale) const { return biases + scale.phi * Cp; }
};

inline Plan make_plan(const ResidualMaps& maps, Arena& arena) {
  Plan plan{};
  plan.maps = &maps;
  plan.Cp = round_up(maps.Cv, kBlock), plan.N = kTaps * plan.Cp;
  plan.scales = arena.take<Scale>(maps.K);
  Taps* taps = arena.take<Taps>(maps.K * (maps.H + maps.W));
  plan.kernels = arena.take<float>(plan.phis() * plan.N * maps.Cv);
  plan.biases = arena.take<float>(plan.phis() * plan.Cp);
  for (int64_t k = 0; k < maps.K; ++k) {
    const int64_t h = maps.scales[3 * k], w = maps.scales[3 * k + 1];
    if (plan.scales) {
      Taps* rows = taps + k * (maps.H + maps.W);
      Taps* columns = rows + maps.H;
      if (h == maps.H && w == maps.W) {
        identity_taps(h, rows), identity_taps(w, columns);
      } else {
        bicubic_taps(h, maps.H, rows), bicubic_taps(w, maps.W, columns);
      }
      plan.scales[k] = {h, w, plan.positions, maps.num_phis ? maps.scales[3 * k + 2] : 0, rows, columns};
    }
    plan.positions += h * w;
    plan.largest = maximum(plan.largest, h * w);
    plan.widest = maximum(plan.widest, w), plan.highest = maximum(plan.highest, h);
  }
  return plan;
}

// Weight of phi from channel ci to channel co at a tap: ratio * conv + (1 - ratio) * identity.
inline float phi_tap(const ResidualMaps& maps, int64_t phi, int64_t co, int64_t ci, int64_t tap) {
  const float identity = co == ci && tap == kTaps / 2 ? 1.0f : 0.0f;
  if (!maps.num_phis) return identity;
  return maps.ratio * maps.phi_weight[((phi * maps.Cv + co) * maps.Cv + ci) * kTaps + tap] +
         (1.0f - maps.ratio) * identity;
}

// Column tap * Cp + co, line ci. All threads of the team call it; a barrier has to follow.
inline void pack_phis(const Plan& plan, Team team) {
  const ResidualMaps& maps = *plan.maps;
  const int64_t tasks = plan.phis() * plan.Cp;
  for (int64_t task = team.begin(tasks); task < team.end(tasks); ++task) {
    const int64_t phi = task / plan.Cp, co = task % plan.Cp;
    plan.biases[task] = maps.num_phis && co < maps.Cv ? maps.ratio * maps.phi_bias[phi * maps.Cv + co] : 0.0f;
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const int64_t column = tap * plan.Cp + co;
      float* target = plan.kernels + (phi * plan.N + column / kPanel * kPanel) * maps.Cv + column % kPanel;
      for (int64_t ci = 0; ci < maps.Cv; ++ci) {
        target[ci * kPanel] = co < maps.Cv ? phi_tap(maps, phi, co, ci, tap) : 0.0f;
      }
    }
  }
}

// First half of a scale's map, one line of codes (w pointers to Cv floats): all taps of phi, then upsampling along x.
// products: (w, N), scratch; spread: (3, W, Cp), for each vertical tap what the line gives.
inline void spread_line(const Plan& plan, const Scale& scale, const float* const* codes, float* products,
                        float* spread) {
  const int64_t Cv = plan.maps->Cv, W = plan.maps->W, Cp = plan.Cp, N = plan.N;
  product<false>(codes, scale.w, plan.kernel(scale), Cv * kPanel, kPanel, Cv, N, products, N);
  for (int64_t dy = 0; dy < 3; ++dy) {
    for (int64_t x = 0; x < W; ++x) {
      for (int64_t c = 0; c < Cp; c += kBlock) {
        Floats sum[kBlockVectors] = {};
        for (int64_t dx = 0; dx < 3; ++dx) {
          if (x + dx < 1 || x + dx > W) continue;
          const Taps& taps = scale.columns[x + dx - 1];
          const float* source = products + taps.first * N + (dy * 3 + dx) * Cp + c;
          for (int t = 0; t < taps.count; ++t, source += N) {
            for (int v = 0; v < kBlockVectors; ++v) sum[v] += taps.weight[t] * load(source + v * kWidth);
          }
        }
        float* target = spread + (dy * W + x) * Cp + c;
        for (int v = 0; v < kBlockVectors; ++v) store(target + v * kWidth, sum[v]);
      }
    }
  }
}

// Second half, line y of the full map: upsampling along y of spread (h, 3, W, Cp), plus the bias; added to f_hat and,
// where there is one, subtracted from rest, both (H, W, Cp).
inline void gather_line(const Plan& plan, const Scale& scale, const float* spread, int64_t y, float* f_hat,
                        float* rest) {
  const int64_t H = plan.maps->H, line = plan.maps->W * plan.Cp;
  const float* sources[12];
  float weights[12];
  int terms = 0;
  for (int64_t dy = 0; dy < 3; ++dy) {
    if (y + dy < 1 || y + dy > H) continue;
    const Taps& taps = scale.rows[y + dy - 1];
    for (int t = 0; t < taps.count; ++t, ++terms) {
      sources[terms] = spread + ((taps.first + t) * 3 + dy) * line, weights[terms] = taps.weight[t];
    }
  }
  const float* bias = plan.bias(scale);
  f_hat += y * line;
  if (rest) rest += y * line;
  for (int64_t i = 0; i < line; i += kBlock) {
    Floats sum[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) sum[v] = load(bias + i % plan.Cp + v * kWidth);
    for (int term = 0; term < terms; ++term) {
      for (int v = 0; v < kBlockVectors; ++v) sum[v] += weights[term] * load(sources[term] + i + v * kWidth);
    }
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t at = i + v * kWidth;
      store(f_hat + at, load(f_hat + at) + sum[v]);
      if (rest) store(rest + at, load(rest + at) - sum[v]);
    }
  }
}

// Line i of the (h, w) area-downsampling of a map (H, W, Cp), as adaptive average pooling does it: w rows of C
// channels, out_line apart. C = Cp, or the Cv channels that are no padding.
inline void area_line(const Plan& plan, const float* map, int64_t h, int64_t w, int64_t i, int64_t C, float* out,
                      int64_t out_line) {
  const int64_t H = plan.maps->H, W = plan.maps->W, Cp = plan.Cp;
  const int64_t top = i * H / h, bottom = ((i + 1) * H + h - 1) / h;
  for (int64_t j = 0; j < w; ++j, out += out_line) {
    const int64_t left = j * W / w, right = ((j + 1) * W + w - 1) / w;
    for (int64_t c = 0; c < C; c += kBlock) {
      Floats sum[kBlockVectors] = {};
      for (int64_t y = top; y < bottom; ++y) {
        for (int64_t x = left; x < right; ++x) {
          const float* source = map + (y * W + x) * Cp + c;
          for (int v = 0; v < kBlockVectors; ++v) sum[v] += load(source + v * kWidth);
        }
      }
      for (int v = 0; v < kBlockVectors; ++v) {
        const int64_t lanes = minimum(kWidth, C - c - v * kWidth);
        const Floats mean = sum[v] / float(bottom - top) / float(right - left);
        if (lanes > 0) store(out + c + v * kWidth, mean, lanes);
      }
    }
  }
}

inline void fill_zero(float* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(float)); }

// Channel c of a map (H * W, Cp) to or from a plane of H * W floats.
inline void copy_channel_out(const float* map, int64_t Cp, int64_t c, int64_t positions, float* plane) {
  for (int64_t p = 0; p < positions; ++p) plane[p] = map[p * Cp + c];
}

// Pointers to the codes of n positions. Indices are checked before the launch.
inline void code_pointers(const ResidualMaps& maps, const int64_t* indices, int64_t n, const float** codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = maps.codebook + indices[i] * maps.Cv;
}

constexpr const char* kOutOfMemory = "out of memory for the workspace of the residual quantizer";

}  // namespace
}  // namespace varkern

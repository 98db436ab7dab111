// Gradients of the residual quantizer on the CPU, through the same factorisation as the forward pass: transposed
// upsampling first, so that phi is differentiated on the h * w codes and not on the full-size map.
//
// A task is one scale of one chunk of images. Chunks depend on B alone and partial sums are added in their order, so
// the result does not depend on the number of threads.
#include "cpu/quantize.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int64_t kChunks = 8;

struct Gradients {
  float* kernels;       // (phis, N, Cp): row tap * Cp + co, column ci
  float* code_grads;    // (B, positions, Cp)
  float* weight_sums;   // (chunks, K, rows of Cp, N): gradient of the weight from ci at column tap * Cp + co
  float* bias_sums;     // (chunks, K, Cp)
  float* planes;        // (threads, Cv, H * W)
  float* map;           // (threads, H * W, Cp): gradient of one scale's map
  float* spread;        // (threads, highest, 3, W, Cp)
  float* products;      // (threads, largest, N)
  float* codes;         // (threads, Cp, largest): transposed
  const float** rows;   // (threads, largest or Cp)
};

void add(float* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(out + i) + load(in + i));
  if (i < n) store(out + i, load(out + i, n - i) + load(in + i, n - i), n - i);
}

// out (N floats) += weight * in, N a multiple of kBlock.
void add_scaled(float* out, float weight, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) store(out + i, load(out + i) + weight * load(in + i));
}

void unpack_kernels(const Plan& plan, float* kernels, Team team) {
  const ResidualMaps& maps = *plan.maps;
  const int64_t tasks = plan.phis() * plan.Cp;
  for (int64_t task = team.begin(tasks); task < team.end(tasks); ++task) {
    const int64_t phi = task / plan.Cp, co = task % plan.Cp;
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      float* target = kernels + (phi * plan.N + tap * plan.Cp + co) * plan.Cp;
      for (int64_t ci = 0; ci < plan.Cp; ++ci) {
        target[ci] = co < maps.Cv && ci < maps.Cv ? phi_tap(maps, phi, co, ci, tap) : 0.0f;
      }
    }
  }
}

// The gradient of the map of scale k of image b, (H * W, Cp): the sum of grad_f_hats from the last scale down to k.
void map_gradient(const ResidualQuantizeBackward& a, int64_t Cp, int64_t k, int64_t b, float* planes, float* map) {
  const int64_t Cv = a.Cv, area = a.H * a.W, step = a.B * Cv * area;
  const float* source = a.grad_f_hats + b * Cv * area;
  __builtin_memcpy(planes, source + (a.K - 1) * step, Cv * area * sizeof(float));
  for (int64_t j = a.K - 2; j >= k; --j) add(planes, source + j * step, Cv * area);
  for (int64_t p = 0; p < area; ++p) {
    for (int64_t c = 0; c < Cp; ++c) map[p * Cp + c] = c < Cv ? planes[c * area + p] : 0.0f;
  }
}

// Transposed upsampling: products (h * w, N) from the map (H, W, Cp), by way of spread (h, 3, W, Cp).
void products_gradient(const Plan& plan, const Scale& scale, const float* map, float* spread, float* products) {
  const int64_t H = plan.maps->H, W = plan.maps->W, Cp = plan.Cp, N = plan.N, line = W * Cp;
  fill_zero(spread, scale.h * 3 * line);
  for (int64_t y = 0; y < H; ++y) {
    for (int64_t dy = 0; dy < 3; ++dy) {
      if (y + dy < 1 || y + dy > H) continue;
      const Taps& taps = scale.rows[y + dy - 1];
      for (int t = 0; t < taps.count; ++t) {
        add_scaled(spread + ((taps.first + t) * 3 + dy) * line, taps.weight[t], map + y * line, line);
      }
    }
  }
  fill_zero(products, scale.h * scale.w * N);
  for (int64_t i = 0; i < scale.h; ++i) {
    for (int64_t dy = 0; dy < 3; ++dy) {
      for (int64_t x = 0; x < W; ++x) {
        const float* source = spread + ((i * 3 + dy) * W + x) * Cp;
        for (int64_t dx = 0; dx < 3; ++dx) {
          if (x + dx < 1 || x + dx > W) continue;
          const Taps& taps = scale.columns[x + dx - 1];
          for (int t = 0; t < taps.count; ++t) {
            add_scaled(products + (i * scale.w + taps.first + t) * N + (dy * 3 + dx) * Cp, taps.weight[t], source, Cp);
          }
        }
      }
    }
  }
}

// Scale k of images [begin, end): their code gradients, and the chunk's sums for weight and bias.
void backward_scale(const ResidualQuantizeBackward& a, const Plan& plan, const Gradients& g, int64_t rank, int64_t k,
                    int64_t chunk, int64_t begin, int64_t end) {
  const Scale& scale = plan.scales[k];
  const int64_t Cp = plan.Cp, N = plan.N, Cv = a.Cv, area = a.H * a.W, P = scale.h * scale.w;
  float *map = g.map + rank * area * Cp, *products = g.products + rank * plan.largest * N;
  float *codes = g.codes + rank * Cp * plan.largest, *spread = g.spread + rank * plan.highest * 3 * a.W * Cp;
  const float** rows = g.rows + rank * maximum(plan.largest, Cp);
  float* weight_sum = g.weight_sums + (chunk * a.K + k) * Cp * N;
  float* bias_sum = g.bias_sums + (chunk * a.K + k) * Cp;
  fill_zero(bias_sum, Cp);
  fill_zero(weight_sum, Cp * N);
  for (int64_t b = begin; b < end; ++b) {
    map_gradient(a, Cp, k, b, g.planes + rank * Cv * area, map);
    products_gradient(plan, scale, map, spread, products);
    for (int64_t p = 0; p < P; ++p) rows[p] = products + p * N;
    float* code_grad = g.code_grads + (b * plan.positions + scale.first) * Cp;
    product<false>(rows, P, g.kernels + scale.phi * N * Cp, kPanel, Cp, N, Cp, code_grad, Cp);
    if (!a.num_phis) continue;
    for (int64_t p = 0; p < area; ++p) add(bias_sum, map + p * Cp, Cp);
    const int64_t* indices = a.indices + b * plan.positions + scale.first;
    for (int64_t p = 0; p < P; ++p) {
      const float* code = a.codebook + indices[p] * Cv;
      for (int64_t c = 0; c < Cv; ++c) codes[c * P + p] = code[c];
    }
    for (int64_t c = 0; c < Cv; ++c) rows[c] = codes + c * P;
    product<true>(rows, Cv, products, kPanel, N, P, N, weight_sum, N);
  }
}

// The sums of all scales of a phi and all chunks, as (Cv, Cv, 3, 3) and (Cv): what goes into output channel co.
void reduce_phi(const ResidualQuantizeBackward& a, const Plan& plan, const Gradients& g, int64_t chunks, int64_t phi,
                int64_t co) {
  const int64_t Cv = a.Cv, Cp = plan.Cp, N = plan.N;
  float* weight = a.grad_phi_weight + (phi * Cv + co) * Cv * kTaps;
  float bias = 0;
  fill_zero(weight, Cv * kTaps);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t k = 0; k < a.K; ++k) {
      if (plan.scales[k].phi != phi) continue;
      const float* sums = g.weight_sums + (chunk * a.K + k) * Cp * N;
      for (int64_t ci = 0; ci < Cv; ++ci) {
        for (int64_t tap = 0; tap < kTaps; ++tap) weight[ci * kTaps + tap] += sums[ci * N + tap * Cp + co];
      }
      bias += g.bias_sums[(chunk * a.K + k) * Cp + co];
    }
  }
  for (int64_t i = 0; i < Cv * kTaps; ++i) weight[i] *= a.ratio;
  a.grad_phi_bias[phi * Cv + co] = a.ratio * bias;
}

}  // namespace

const char* residual_quantize_backward(const ResidualQuantizeBackward& a) {
  const int64_t B = a.B, K = a.K, V = a.V, Cv = a.Cv, area = a.H * a.W;
  const int64_t chunks = minimum(B, kChunks);
  int64_t positions = 0;
  for (int64_t k = 0; k < K; ++k) positions += a.scales[3 * k] * a.scales[3 * k + 1];
  const int threads =
      thread_count(INT64_MAX, B * (positions * 2 * kTaps * Cv * Cv + 16 * K * area * Cv) / kWorkPerByte);
  Plan plan;
  Gradients g{};
  const auto prepare = [&](Arena& arena) {
    plan = make_plan(a, arena);
    g.kernels = arena.take<float>(plan.phis() * plan.N * plan.Cp);
    g.code_grads = arena.take<float>(B * plan.positions * plan.Cp);
    g.weight_sums = arena.take<float>(chunks * K * plan.Cp * plan.N);
    g.bias_sums = arena.take<float>(chunks * K * plan.Cp);
    g.planes = arena.take<float>(threads * Cv * area);
    g.map = arena.take<float>(threads * area * plan.Cp);
    g.spread = arena.take<float>(threads * plan.highest * 3 * a.W * plan.Cp);
    g.products = arena.take<float>(threads * plan.largest * plan.N);
    g.codes = arena.take<float>(threads * plan.Cp * plan.largest);
    g.rows = arena.take<const float*>(threads * maximum(plan.largest, plan.Cp));
  };
  const bool ran = with_workspace(prepare, [&] {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Team team = current_team();
      unpack_kernels(plan, g.kernels, team);
      team.barrier();
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < K * chunks; ++task) {  // the last scales, the largest, first
        const int64_t k = K - 1 - task / chunks, chunk = task % chunks;
        backward_scale(a, plan, g, team.rank, k, chunk, B * chunk / chunks, B * (chunk + 1) / chunks);
      }
      // Each thread adds to its own codes, in the order of images and positions.
      const int64_t first = team.begin(V), last = team.end(V);
      fill_zero(a.grad_codebook + first * Cv, (last - first) * Cv);
      for (int64_t i = 0; i < B * plan.positions; ++i) {
        const int64_t code = a.indices[i];
        if (code >= first && code < last) add(a.grad_codebook + code * Cv, g.code_grads + i * plan.Cp, Cv);
      }
      const int64_t outputs = a.num_phis * Cv;
      for (int64_t i = team.begin(outputs); i < team.end(outputs); ++i) reduce_phi(a, plan, g, chunks, i / Cv, i % Cv);
    }
  });
  return ran ? nullptr : kOutOfMemory;
}

}  // namespace varkern::cpu::VARKERN_LEVEL

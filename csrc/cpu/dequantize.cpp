// From codes to maps on the CPU: f_hat of every scale, the teacher-forcing input, and one step of generation.
#include "cpu/quantize.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

// Threads for B images: teams that share an image where there are fewer images than threads.
struct Division {
  int threads;
  bool together;

  Division(int64_t B, int64_t work) {
    threads = thread_count(INT64_MAX, work / kWorkPerByte);
    together = threads > 1 && B < 4 * threads && B % threads != 0;
  }
  int64_t teams() const { return together ? 1 : threads; }

  // body(team, number of the team, first image, end) in every thread.
  template <typename Body>
  void run(int64_t B, Team all, const Body& body) const {
    if (together) {
      body(all, int64_t(0), int64_t(0), B);
    } else {
      body(Team{0, 1}, all.rank, all.begin(B), all.end(B));
    }
  }
};

// Multiply-adds of the maps of an image and its area-downsampled inputs, roughly.
int64_t map_work(const ResidualMaps& maps) {
  int64_t work = 0;
  for (int64_t k = 0; k < maps.K; ++k) {
    const int64_t positions = maps.scales[3 * k] * maps.scales[3 * k + 1];
    work += positions * kTaps * maps.Cv * maps.Cv + 16 * maps.H * maps.W * maps.Cv;
  }
  return work;
}

}  // namespace

const char* residual_dequantize(const ResidualDequantize& a) {
  const ResidualMaps& maps = a;
  const int64_t B = maps.B, K = maps.K, Cv = maps.Cv, H = maps.H, W = maps.W;
  const Division division(B, B * map_work(maps));
  int64_t inputs = 0;  // positions of all inputs of an image
  for (int64_t k = 1; a.inputs && k <= K; ++k) inputs += maps.scales[3 * k] * maps.scales[3 * k + 1];

  Plan plan;
  float *f_hats = nullptr, *spreads = nullptr, *products = nullptr;
  const float** codes = nullptr;
  int64_t map = 0, spread_size = 0;
  const auto prepare = [&](Arena& arena) {
    plan = make_plan(maps, arena);
    map = H * W * plan.Cp, spread_size = plan.highest * 3 * W * plan.Cp;
    f_hats = arena.take<float>(division.teams() * map);
    spreads = arena.take<float>(division.teams() * spread_size);
    products = arena.take<float>(division.threads * plan.widest * plan.N);
    codes = arena.take<const float*>(division.threads * plan.widest);
  };
  const auto dequantize = [&](Team team, int64_t rank, int64_t number, int64_t b) {
    float *f_hat = f_hats + number * map, *spread = spreads + number * spread_size;
    float* input = a.inputs + b * inputs * Cv;
    fill_zero(f_hat + team.begin(H) * W * plan.Cp, (team.end(H) - team.begin(H)) * W * plan.Cp);
    for (int64_t k = 0; k < K; ++k) {
      const Scale& scale = plan.scales[k];
      const int64_t* indices = a.indices + b * a.index_stride + scale.first;
      for (int64_t i = team.begin(scale.h); i < team.end(scale.h); ++i) {
        const float** line = codes + rank * plan.widest;
        code_pointers(maps, indices + i * scale.w, scale.w, line);
        spread_line(plan, scale, line, products + rank * plan.widest * plan.N, spread + i * 3 * W * plan.Cp);
      }
      team.barrier();
      for (int64_t y = team.begin(H); y < team.end(H); ++y) gather_line(plan, scale, spread, y, f_hat, nullptr);
      team.barrier();
      if (a.f_hats) {
        float* out = a.f_hats + (k * B + b) * Cv * H * W;
        for (int64_t c = team.begin(Cv); c < team.end(Cv); ++c) {
          copy_channel_out(f_hat, plan.Cp, c, H * W, out + c * H * W);
        }
      }
      if (a.inputs) {
        const int64_t h = maps.scales[3 * k + 3], w = maps.scales[3 * k + 4];
        for (int64_t i = team.begin(h); i < team.end(h); ++i) {
          area_line(plan, f_hat, h, w, i, Cv, input + i * w * Cv, Cv);
        }
        input += h * w * Cv;
      }
    }
    team.barrier();
  };
  const bool ran = with_workspace(prepare, [&] {
#pragma omp parallel num_threads(division.threads) if (division.threads > 1)
    {
      const Team all = current_team();
      pack_phis(plan, all);
      all.barrier();
      division.run(B, all, [&](Team team, int64_t number, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) dequantize(team, all.rank, number, b);
      });
    }
  });
  return ran ? nullptr : kOutOfMemory;
}

const char* next_scale_input(const NextScaleInput& a) {
  const int64_t B = a.B, Cv = a.Cv, H = a.H, W = a.W, area = H * W;
  const int64_t schedule[3] = {a.h, a.w, 0};
  const int64_t num_phis = a.phi_weight ? 1 : 0;
  const ResidualMaps maps{nullptr, a.phi_weight, a.phi_bias, schedule, num_phis, B, 0, Cv, H, W, 1, a.ratio};
  const Division division(B, B * map_work(maps));

  Plan plan;
  float *sums = nullptr, *spreads = nullptr, *products = nullptr, *lines = nullptr, *following = nullptr;
  const float** codes = nullptr;
  int64_t map = 0, spread_size = 0, next_size = 0;
  const auto prepare = [&](Arena& arena) {
    plan = make_plan(maps, arena);
    map = area * plan.Cp, spread_size = a.h * 3 * W * plan.Cp, next_size = a.next_h * a.next_w * plan.Cp;
    sums = arena.take<float>(division.teams() * map);
    spreads = arena.take<float>(division.teams() * spread_size);
    following = arena.take<float>(division.teams() * next_size);
    products = arena.take<float>(division.threads * a.w * plan.N);
    lines = arena.take<float>(division.threads * a.w * Cv);
    codes = arena.take<const float*>(division.threads * a.w);
  };
  const auto step = [&](Team team, int64_t rank, int64_t number, int64_t b) {
    float *sum = sums + number * map, *spread = spreads + number * spread_size, *next = following + number * next_size;
    float *f_hat = a.f_hat + b * Cv * area, *line = lines + rank * a.w * Cv;
    const float** pointers = codes + rank * a.w;
    const Scale& scale = plan.scales[0];
    for (int64_t i = team.begin(a.h); i < team.end(a.h); ++i) {
      const float* source = a.codes + b * a.stride_b + i * a.stride_h;
      for (int64_t j = 0; j < a.w; ++j) {
        for (int64_t c = 0; c < Cv; ++c) line[j * Cv + c] = source[c * a.stride_c + j * a.stride_w];
        pointers[j] = line + j * Cv;
      }
      spread_line(plan, scale, pointers, products + rank * a.w * plan.N, spread + i * 3 * W * plan.Cp);
    }
    for (int64_t y = team.begin(H); y < team.end(H); ++y) {
      for (int64_t p = y * W; p < (y + 1) * W; ++p) {
        for (int64_t c = 0; c < plan.Cp; ++c) sum[p * plan.Cp + c] = c < Cv ? f_hat[c * area + p] : 0.0f;
      }
    }
    team.barrier();
    for (int64_t y = team.begin(H); y < team.end(H); ++y) gather_line(plan, scale, spread, y, sum, nullptr);
    team.barrier();
    for (int64_t c = team.begin(Cv); c < team.end(Cv); ++c) copy_channel_out(sum, plan.Cp, c, area, f_hat + c * area);
    if (!a.next) return team.barrier();
    for (int64_t i = team.begin(a.next_h); i < team.end(a.next_h); ++i) {
      area_line(plan, sum, a.next_h, a.next_w, i, plan.Cp, next + i * a.next_w * plan.Cp, plan.Cp);
    }
    team.barrier();
    const int64_t positions = a.next_h * a.next_w;
    for (int64_t c = team.begin(Cv); c < team.end(Cv); ++c) {
      copy_channel_out(next, plan.Cp, c, positions, a.next + (b * Cv + c) * positions);
    }
    team.barrier();
  };
  const bool ran = with_workspace(prepare, [&] {
#pragma omp parallel num_threads(division.threads) if (division.threads > 1)
    {
      const Team all = current_team();
      pack_phis(plan, all);
      all.barrier();
      division.run(B, all, [&](Team team, int64_t number, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) step(team, all.rank, number, b);
      });
    }
  });
  return ran ? nullptr : kOutOfMemory;
}

}  // namespace varkern::cpu::VARKERN_LEVEL

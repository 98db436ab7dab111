// Multi-scale residual quantization on the CPU. A block of images goes through all scales together: residuals stay in
// the second-level cache, and a panel of the codebook is read once a scale for all their positions. The distance
// matrix never exists: each register tile of z.e ends in a comparison with the best so far.
#include "cpu/quantize.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

constexpr int64_t kImages = 4;       // that go through the scales together
constexpr int64_t kChunk = 16384;    // bytes of codebook that stay in the first-level cache while all positions pass

// z.e - |e|^2 / 2 is largest where |z - e|^2 is smallest. For cosine: z.e with both normalised.
struct Codebook {
  float* panels;   // (V / kPanel, Cv, kPanel)
  float* offsets;  // (V / kPanel, kPanel): -|e|^2 / 2 or 0, -inf past V so that no padding is ever chosen
  int64_t count;   // panels
};

float norm_or_one(float square) {
  const float norm = __builtin_sqrtf(square);
  return norm > 1e-12f ? norm : 1e-12f;
}

void pack_codes(const ResidualQuantize& a, const Codebook& book, int64_t panel) {
  const int64_t Cv = a.Cv, codes = minimum(kPanel, a.V - panel * kPanel);
  const float* source = a.codebook + panel * kPanel * Cv;
  float* target = book.panels + panel * Cv * kPanel;
  for (int64_t k = 0; k < Cv; ++k) {
    for (int64_t i = 0; i < kPanel; ++i) target[k * kPanel + i] = i < codes ? source[i * Cv + k] : 0.0f;
  }
  for (int64_t v = 0; v < kPanel; v += kWidth) {
    Floats square{};
    for (int64_t k = 0; k < Cv; ++k) square += load(target + k * kPanel + v) * load(target + k * kPanel + v);
    float squares[kWidth];
    store(squares, square);
    for (int64_t i = 0; i < kWidth; ++i) {
      const bool real = v + i < codes;
      if (a.cosine && real) {
        const float norm = norm_or_one(squares[i]);
        for (int64_t k = 0; k < Cv; ++k) target[k * kPanel + v + i] /= norm;
      }
      book.offsets[panel * kPanel + v + i] = !real ? -__builtin_inff() : a.cosine ? 0.0f : -0.5f * squares[i];
    }
  }
}

// The best code so far in each lane of a position: its value, and which vector of the codebook it came from.
struct Best {
  Floats value;
  Mask vector;
};

template <int R>
void search_panels(const float* const* z, const Codebook& book, int64_t begin, int64_t end, int64_t Cv, Best* best) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const float* offsets = book.offsets + panel * kPanel;
    Floats acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = load(offsets), acc[r][1] = load(offsets + kWidth);
    multiply_rows<R>(z, book.panels + panel * Cv * kPanel, kPanel, Cv, acc);
    const Mask low = Mask{} + int32_t(2 * panel), high = low + 1;
    for (int r = 0; r < R; ++r) {  // strictly greater, and panels in ascending order: the first of equals stays
      const Mask second = acc[r][1] > acc[r][0];
      const Floats value = select(second, acc[r][1], acc[r][0]);
      const Mask vector = select(second, high, low), better = value > best[r].value;
      best[r].value = select(better, value, best[r].value);
      best[r].vector = select(better, vector, best[r].vector);
    }
  }
}

// Best of the codes in [begin, end) panels for M positions z (M, Cp).
void search(const float* z, int64_t M, int64_t Cp, const Codebook& book, int64_t begin, int64_t end, int64_t Cv,
            Best* best) {
  for (int64_t m = 0; m < M; ++m) best[m] = {Floats{} - __builtin_inff(), Mask{}};
  const int64_t step = maximum(1, kChunk / int64_t(kPanel * sizeof(float) * maximum(Cv, 1)));
  for (int64_t chunk = begin; chunk < end; chunk += step) {
    for (int64_t m = 0; m < M; m += kRows) {
      const int64_t count = minimum(kRows, M - m);
      const float* rows[kRows];
      for (int64_t r = 0; r < count; ++r) rows[r] = z + (m + r) * Cp;
      with_rows(count, [&](auto n) {
        search_panels<decltype(n)::value>(rows, book, chunk, minimum(end, chunk + step), Cv, best + m);
      });
    }
  }
}

struct Candidate {
  float value;
  int32_t code;

  bool beats(const Candidate& other) const {
    return value > other.value || (value == other.value && code < other.code);
  }
};

Candidate best_lane(const Best& best) {
  Candidate found{best.value[0], best.vector[0] * kWidth};
  for (int i = 1; i < kWidth; ++i) {
    const Candidate other{best.value[i], best.vector[i] * kWidth + i};
    if (other.beats(found)) found = other;
  }
  return found;
}

// What one block of images needs; with a team of several threads also what each of them needs.
struct Block {
  float *rest, *f_hat;    // (images, H, W, Cp)
  float* z;               // (images * largest, Cp)
  float* spread;          // (images or 1, highest, 3, W, Cp)
  Best* best;             // (threads, images * largest)
  Candidate* candidates;  // (threads, images * largest)
  float* products;        // (threads, widest, N)
  const float** codes;    // (threads, widest)
};

Block make_block(const Plan& plan, int64_t images, int64_t threads, Arena& arena) {
  const int64_t map = plan.maps->H * plan.maps->W * plan.Cp, spread = plan.highest * 3 * plan.maps->W * plan.Cp;
  Block block;
  block.rest = arena.take<float>(images * map);
  block.f_hat = arena.take<float>(images * map);
  block.z = arena.take<float>(images * plan.largest * plan.Cp);
  block.spread = arena.take<float>((threads > 1 ? images : 1) * spread);
  block.best = arena.take<Best>(threads * images * plan.largest);
  block.candidates = arena.take<Candidate>(threads * images * plan.largest);
  block.products = arena.take<float>(threads * plan.widest * plan.N);
  block.codes = arena.take<const float*>(threads * plan.widest);
  return block;
}

void load_line(const ResidualQuantize& a, int64_t Cp, int64_t b, int64_t y, float* rest) {
  const float* source = a.features + b * a.stride_b + y * a.stride_h;
  for (int64_t x = 0; x < a.W; ++x) {
    float* row = rest + (y * a.W + x) * Cp;
    for (int64_t c = 0; c < a.Cv; ++c) row[c] = source[c * a.stride_c + x * a.stride_w];
    for (int64_t c = a.Cv; c < Cp; ++c) row[c] = 0.0f;
  }
}

void normalise(float* row, int64_t Cp) {
  Floats square{};
  for (int64_t c = 0; c < Cp; c += kWidth) square += load(row + c) * load(row + c);
  const float norm = norm_or_one(sum_lanes(square));
  for (int64_t c = 0; c < Cp; c += kWidth) store(row + c, load(row + c) / norm);
}

// All scales of images [first, first + images). The work of every step is cut between the threads of the team.
void encode(const ResidualQuantize& a, const Plan& plan, const Codebook& book, const Block& block, Team team,
            int64_t first, int64_t images) {
  const int64_t Cp = plan.Cp, Cv = a.Cv, H = a.H, W = a.W, map = H * W * Cp;
  const int64_t spread = plan.highest * 3 * W * Cp;
  for (int64_t task = team.begin(images * H); task < team.end(images * H); ++task) {
    const int64_t image = task / H, y = task % H;
    load_line(a, Cp, first + image, y, block.rest + image * map);
    fill_zero(block.f_hat + image * map + y * W * Cp, W * Cp);
  }
  team.barrier();
  for (int64_t k = 0; k < a.K; ++k) {
    const Scale& scale = plan.scales[k];
    const int64_t positions = scale.h * scale.w, all = images * positions, lines = images * scale.h;
    for (int64_t task = team.begin(lines); task < team.end(lines); ++task) {
      const int64_t image = task / scale.h, i = task % scale.h;
      float* z = block.z + task * scale.w * Cp;
      area_line(plan, block.rest + image * map, scale.h, scale.w, i, Cp, z, Cp);
      if (a.cosine) {
        for (int64_t j = 0; j < scale.w; ++j) normalise(z + j * Cp, Cp);
      }
    }
    team.barrier();

    Best* best = block.best + team.rank * images * plan.largest;
    Candidate* candidates = block.candidates + team.rank * all;
    search(block.z, all, Cp, book, team.begin(book.count), team.end(book.count), Cv, best);
    for (int64_t m = 0; m < all; ++m) candidates[m] = best_lane(best[m]);
    team.barrier();

    // A team shares the lines of all images. One thread alone finishes an image before the next: less memory in use.
    float* products = block.products + team.rank * plan.widest * plan.N;
    const float** codes = block.codes + team.rank * plan.widest;
    const auto choose_and_spread = [&](int64_t image, int64_t i, float* target) {
      const int64_t m = image * positions + i * scale.w;
      int64_t* indices = a.indices + (first + image) * plan.positions + scale.first + i * scale.w;
      for (int64_t j = 0; j < scale.w; ++j) {
        Candidate found = block.candidates[m + j];
        for (int64_t t = 1; t < team.size; ++t) {
          if (block.candidates[t * all + m + j].beats(found)) found = block.candidates[t * all + m + j];
        }
        indices[j] = found.code;
      }
      code_pointers(a, indices, scale.w, codes);
      spread_line(plan, scale, codes, products, target + i * 3 * W * Cp);
    };
    if (team.size > 1) {
      for (int64_t task = team.begin(lines); task < team.end(lines); ++task) {
        choose_and_spread(task / scale.h, task % scale.h, block.spread + task / scale.h * spread);
      }
      team.barrier();
      for (int64_t task = team.begin(images * H); task < team.end(images * H); ++task) {
        const int64_t image = task / H;
        gather_line(plan, scale, block.spread + image * spread, task % H, block.f_hat + image * map,
                    block.rest + image * map);
      }
      team.barrier();
    } else {
      for (int64_t image = 0; image < images; ++image) {
        for (int64_t i = 0; i < scale.h; ++i) choose_and_spread(image, i, block.spread);
        for (int64_t y = 0; y < H; ++y) {
          gather_line(plan, scale, block.spread, y, block.f_hat + image * map, block.rest + image * map);
        }
      }
    }

    if (!a.all_f_hats && k + 1 < a.K) continue;
    float* out = a.f_hats + (a.all_f_hats ? k : 0) * a.B * Cv * H * W;
    for (int64_t task = team.begin(images * Cv); task < team.end(images * Cv); ++task) {
      const int64_t image = task / Cv, c = task % Cv;
      copy_channel_out(block.f_hat + image * map, Cp, c, H * W, out + ((first + image) * Cv + c) * H * W);
    }
  }
  team.barrier();  // the next block writes into this one's memory
}

}  // namespace

const char* residual_quantize(const ResidualQuantize& a) {
  const int64_t V = a.V, Cv = a.Cv, B = a.B;
  int64_t positions = 0;
  for (int64_t k = 0; k < a.K; ++k) positions += a.scales[3 * k] * a.scales[3 * k + 1];
  const int threads = thread_count(INT64_MAX, B * positions * (V + 18 * Cv) * Cv / kWorkPerByte);
  // With few images the threads share each of them, else each takes images of its own and needs no barrier.
  const bool together = threads > 1 && B < 4 * threads && B % threads != 0;
  const int64_t blocks = together ? 1 : threads, images = minimum(kImages, (B + blocks - 1) / blocks);

  Plan plan;
  Codebook book;
  Block first;
  int64_t block_bytes = 0;
  const auto prepare = [&](Arena& arena) {
    plan = make_plan(a, arena);
    book.count = (V + kPanel - 1) / kPanel;
    book.panels = arena.take<float>(book.count * kPanel * Cv);
    book.offsets = arena.take<float>(book.count * kPanel);
    const int64_t begin = arena.used;
    first = make_block(plan, images, together ? threads : 1, arena);
    block_bytes = arena.used - begin;
    arena.used += (blocks - 1) * block_bytes;
  };
  const auto shifted = [&](int64_t i) {
    Block block = first;
    const auto move = [&](auto*& pointer) { pointer = (decltype(+pointer))((char*)pointer + i * block_bytes); };
    move(block.rest), move(block.f_hat), move(block.z), move(block.spread), move(block.best);
    move(block.candidates), move(block.products), move(block.codes);
    return block;
  };
  const bool ran = with_workspace(prepare, [&] {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Team team = current_team();
      for (int64_t panel = team.begin(book.count); panel < team.end(book.count); ++panel) pack_codes(a, book, panel);
      pack_phis(plan, team);
      team.barrier();
      if (together) {
        for (int64_t b = 0; b < B; b += images) encode(a, plan, book, first, team, b, minimum(images, B - b));
      } else {
        const Block block = shifted(team.rank);
        const int64_t end = team.end(B);
        for (int64_t b = team.begin(B); b < end; b += images) {
          encode(a, plan, book, block, Team{0, 1}, b, minimum(images, end - b));
        }
      }
    }
  });
  return ran ? nullptr : kOutOfMemory;
}

}  // namespace varkern::cpu::VARKERN_LEVEL

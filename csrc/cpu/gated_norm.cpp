// A gated residual and the modulated layer norm after it on the CPU: a row is updated and then normalised while it is
// in the first-level cache. Vectorised over C, threads over rows.
#include "ops/gated_norm.h"

#include "common/dispatch_dtype.h"
#include "cpu/rows.h"
#include "cpu/threads.h"

namespace varkern::cpu::VARKERN_LEVEL {
namespace {

template <typename X, typename H, typename Cond, typename Out>
void forward(const GatedResidualLayerNorm& a) {
  const int64_t rows = a.B * a.L, C = a.C;
  const int threads = thread_count(rows, rows * C * int64_t(2 * sizeof(X) + sizeof(H) + sizeof(Out)));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / a.L, l = row % a.L;
    X* x = (X*)a.x + row * C;
    const H* h = (const H*)a.h + b * a.h_stride_b + l * a.h_stride_l;
    const Cond* gate = (const Cond*)a.gate + b * a.gate_stride_b;
    for_each_vector(C, [&](int64_t c, auto lanes) {
      store(x + c, load(x + c, lanes) + load(gate + c, lanes) * load(h + c, lanes), lanes);
    });
    normalise_row((const X*)x, row_statistics(x, C, a.eps), (const Cond*)a.scale + b * a.scale_stride_b,
                  (const Cond*)a.shift + b * a.shift_stride_b, (Out*)a.out + row * C, C);
  }
}

}  // namespace

const char* gated_residual_layer_norm(const GatedResidualLayerNorm& args) {
  return dispatch_promoted(args.x_dtype, args.cond_dtype, args.out_dtype, [&](auto types) {
    typedef decltype(types) T;
    return dispatch_dtype(args.h_dtype, [&](auto h) -> const char* {
      forward<typename T::x, decltype(h), typename T::cond, typename T::out>(args);
      return nullptr;
    });
  });
}

}  // namespace varkern::cpu::VARKERN_LEVEL

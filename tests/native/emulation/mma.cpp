// Compiled without sanitizers, as scheduler.cpp is, and optimised: under ThreadSanitizer it would take most of the time.
#include "common/ptx.cuh"

namespace emulation {
namespace {

template <typename T>
float half(uint32_t pair, int i) {
  return varkern::to_float(T{uint16_t(pair >> 16 * i)});
}

// The products are exact in float64; their sum is rounded once.
template <typename T>
void multiply(float (&d)[4]) {
  const int g = int(lane()) / 4, t = int(lane()) % 4;
  double sum[4] = {d[0], d[1], d[2], d[3]};
  // Lane s of a row's four holds the halves of columns 2s, 2s+1, 2s+8, 2s+9; so it is with the rows of a column of B.
  for (int s = 0; s < 4; ++s) {
    const Operands rows = shown<Operands>(unsigned(g * 4 + s));
    for (int column = 0; column < 2; ++column) {
      const Operands columns = shown<Operands>(unsigned((2 * t + column) * 4 + s));
      for (int row = 0; row < 2; ++row) {
        for (int k = 0; k < 4; ++k) {
          sum[2 * row + column] += double(half<T>(rows.a[k / 2 * 2 + row], k % 2)) * half<T>(columns.b[k / 2], k % 2);
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = float(sum[i]);
}

}  // namespace

void multiply_shown(float (&d)[4], bool bfloat16) {
  bfloat16 ? multiply<varkern::bfloat16>(d) : multiply<varkern::float16>(d);
}

}  // namespace emulation

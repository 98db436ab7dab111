// Takes the place of csrc/common/ptx.cuh, which says what the functions do.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <vector>

#include "common/dtype.h"

namespace emulation {

struct alignas(16) Bytes16 {
  uint64_t at[2];
};

struct Copy {
  Bytes16* target;
  Bytes16 value;
};

// A thread's asynchronous copies: the groups under way, the oldest first; the last one is not committed yet.
struct Thread {
  std::deque<std::vector<Copy>> copies;
};

inline Thread threads[kMaxThreads];
inline Thread& self() { return threads[threadIdx.x]; }

inline void require_aligned(const void* p, const char* message) {
  require(reinterpret_cast<uintptr_t>(p) % 16 == 0, message);
}

// Half i of row r of the matrix whose rows the lanes from 8 * matrix on have shown.
inline uint32_t half(int matrix, int row, int i) { return shown<const uint16_t*>(unsigned(8 * matrix + row))[i]; }

inline void show_row(const void* row, int matrices, const char* operation) {
  if (int(lane()) < 8 * matrices) require_aligned(row, "ldmatrix: a row is not aligned to 16 bytes");
  show(row, operation);
}

struct Operands {
  uint32_t a[4], b[2];
};

// d += A B of the operands that the lanes have shown.
void multiply_shown(float (&d)[4], bool bfloat16);

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
  show(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, "mma");
  multiply_shown(d, bfloat16);
}

}  // namespace emulation

namespace varkern {
namespace {

// The value is read now and lands as late as it may; until then there is NaN, written now so that
// ThreadSanitizer sees a reader of what was there before.
inline void cp_async(void* shared, const void* source, bool inside = true) {
  emulation::require_aligned(shared, "cp_async: the target is not aligned to 16 bytes");
  emulation::require_aligned(source, "cp_async: the source is not aligned to 16 bytes");
  auto& groups = emulation::self().copies;
  if (groups.empty()) groups.emplace_back();
  auto* target = static_cast<emulation::Bytes16*>(shared);
  groups.back().push_back({target, inside ? *static_cast<const emulation::Bytes16*>(source) : emulation::Bytes16{}});
  *target = {~uint64_t(0), ~uint64_t(0)};
}

inline void cp_async_commit() {
  auto& groups = emulation::self().copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

template <int kPending>
void cp_async_wait() {
  auto& groups = emulation::self().copies;
  for (; groups.size() > kPending + 1; groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) *copy.target = copy.value;
  }
}

inline float exp2_approx(float x) {
  const float power = exp2f(x);
  return power < 0x1p-126f ? 0.0f : power;
}

template <int kMatrices>
void ldmatrix(uint32_t (&matrices)[kMatrices], const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  emulation::show_row(row, kMatrices, "ldmatrix");
  const int g = int(emulation::lane()) / 4, t = int(emulation::lane()) % 4;
  for (int i = 0; i < kMatrices; ++i) {
    matrices[i] = emulation::half(i, g, 2 * t) | emulation::half(i, g, 2 * t + 1) << 16;
  }
}

template <int kMatrices>
void ldmatrix_transposed(uint32_t (&matrices)[kMatrices], const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  emulation::show_row(row, kMatrices, "ldmatrix_transposed");
  const int g = int(emulation::lane()) / 4, t = int(emulation::lane()) % 4;
  for (int i = 0; i < kMatrices; ++i) {
    matrices[i] = emulation::half(i, 2 * t, g) | emulation::half(i, 2 * t + 1, g) << 16;
  }
}

inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float16) {
  emulation::mma(d, a, b, false);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16) {
  emulation::mma(d, a, b, true);
}

}  // namespace
}  // namespace varkern

// Scratch memory, and register tiles of a height known at compile time. Internal linkage only, as in vector.h.
#pragma once

#include "cpu/vector.h"

namespace varkern {
namespace {

constexpr int kRows = kWidth == 16 ? 8 : 6;  // rows of a register tile: with two vectors each, what the registers hold

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// Cuts one allocation into pieces. A first pass without memory measures, a second one hands out.
struct Arena {
  char* base;
  int64_t used;

  template <typename T>
  T* take(int64_t count) {
    T* piece = (T*)(base + used);
    used += round_up(count * int64_t(sizeof(T)), 64);
    return base ? piece : nullptr;
  }
};

// Runs prepare(arena) to measure, allocates, runs it again, then body(). False: out of memory.
template <typename Prepare, typename Body>
inline bool with_workspace(const Prepare& prepare, const Body& body) {
  Arena arena{nullptr, 0};
  prepare(arena);
  char* memory = (char*)__builtin_malloc(arena.used + 64);
  if (!memory) return false;
  arena = {memory + (64 - uintptr_t(memory) % 64), 0};
  prepare(arena);
  body();
  __builtin_free(memory);
  return true;
}

template <int N>
struct Count {
  enum { value = N };
};

// body(Count<rows>{}) for 1 <= rows <= kRows, a constant for the compiler.
template <int R = kRows, typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, body);
  }
  body(Count<R>{});
}

}  // namespace
}  // namespace varkern

// Scratch memory. Internal linkage only, as in simd/vector.h.
#pragma once

#include "cpu/integers.h"

namespace varkern {
namespace {

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

}  // namespace
}  // namespace varkern

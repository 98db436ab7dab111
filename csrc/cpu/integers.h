// Arithmetic of sizes. Internal linkage only, as in simd/vector.h.
#pragma once

#include <stdint.h>

namespace varkern {
namespace {

inline int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace varkern

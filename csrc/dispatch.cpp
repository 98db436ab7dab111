// Chooses the SIMD level once and forwards every CPU operation to it. Compiled for the baseline processor only.
#include <stdlib.h>

#include <stdexcept>
#include <string>

#include "varkern.h"

namespace varkern::cpu {

#define VARKERN_CPU_OP(name, Args) const char* name(const Args& args);
namespace baseline {
#include "cpu/ops.def"
}
#ifdef VARKERN_X86_LEVELS
namespace avx2 {
#include "cpu/ops.def"
}
namespace avx512 {
#include "cpu/ops.def"
}
#endif
#undef VARKERN_CPU_OP

namespace {

enum Level { kBaseline, kAvx2, kAvx512 };
const char* const kLevelNames[] = {"baseline", "avx2", "avx512"};

Level supported_level() {
#ifdef VARKERN_X86_LEVELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return kBaseline;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? kAvx512 : kAvx2;
#else
  return kBaseline;
#endif
}

Level choose_level() {
  const Level supported = supported_level();
  const char* cap = getenv("VARKERN_SIMD");
  if (cap == nullptr || *cap == '\0') return supported;
  for (int level = kBaseline; level <= kAvx512; ++level) {
    if (std::string(cap) == kLevelNames[level]) return level < supported ? Level(level) : supported;
  }
  throw std::runtime_error("VARKERN_SIMD='" + std::string(cap) +
                           "' is not a SIMD level: unset it, or set it to baseline, avx2 or avx512");
}

Level level() {
  static const Level chosen = choose_level();
  return chosen;
}

}  // namespace

const char* simd_level() { return kLevelNames[level()]; }

#ifdef VARKERN_X86_LEVELS
#define VARKERN_CPU_OP(name, Args)                \
  const char* name(const Args& args) {            \
    switch (level()) {                            \
      case kAvx512: return avx512::name(args);    \
      case kAvx2: return avx2::name(args);        \
      default: return baseline::name(args);       \
    }                                             \
  }
#else
#define VARKERN_CPU_OP(name, Args) \
  const char* name(const Args& args) { return level(), baseline::name(args); }
#endif
#include "cpu/ops.def"
#undef VARKERN_CPU_OP

}  // namespace varkern::cpu

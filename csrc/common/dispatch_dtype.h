// Turns the run-time dtype codes of (x, cond, out) into types. Internal linkage only.
#pragma once

#include "common/dtype.h"
#include "ops/arguments.h"

namespace varkern {
namespace {

template <typename X, typename Cond, typename Out>
struct Types {
  typedef X x;
  typedef Cond cond;
  typedef Out out;
};

// Calls body(Types<X, Cond, Out>{}) for out = promote_types(x, cond), the only output dtype there is.
template <typename Body>
inline const char* dispatch_promoted(int x, int cond, int out, const Body& body) {
  static const int kPromoted[3][3] = {{0, 0, 0}, {0, 1, 0}, {0, 0, 2}};
  if (x < 0 || x > 2 || cond < 0 || cond > 2) return "unknown dtype code: 0 is float32, 1 float16, 2 bfloat16";
  if (out != kPromoted[x][cond]) return "the output dtype must be torch.promote_types(x.dtype, scale.dtype)";
  switch (x * 3 + cond) {
    case 0: return body(Types<float, float, float>{});
    case 1: return body(Types<float, float16, float>{});
    case 2: return body(Types<float, bfloat16, float>{});
    case 3: return body(Types<float16, float, float>{});
    case 4: return body(Types<float16, float16, float16>{});
    case 5: return body(Types<float16, bfloat16, float>{});
    case 6: return body(Types<bfloat16, float, float>{});
    case 7: return body(Types<bfloat16, float16, float>{});
    default: return body(Types<bfloat16, bfloat16, bfloat16>{});
  }
}

// Calls body(T{}) for the type of one code.
template <typename Body>
inline const char* dispatch_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case kFloat32: return body(float{});
    case kFloat16: return body(float16{});
    case kBFloat16: return body(bfloat16{});
    default: return "unknown dtype code: 0 is float32, 1 float16, 2 bfloat16";
  }
}

}  // namespace
}  // namespace varkern

// Loops over elements a vector at a time, the last one partly filled. Internal linkage only, as in vector.h.
#pragma once

#include "cpu/simd/vector.h"

namespace varkern {
namespace {

// A whole vector, or the first n < kWidth elements of one.
struct Whole {};
struct Part {
  int64_t n;
};

template <typename T>
inline Floats load(const T* p, Whole) {
  return load(p);
}
template <typename T>
inline Floats load(const T* p, Part part) {
  return load(p, part.n);
}
template <typename T>
inline void store(T* p, Floats v, Whole) {
  store(p, v);
}
template <typename T>
inline void store(T* p, Floats v, Part part) {
  store(p, v, part.n);
}

template <typename Body>
inline void for_each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// Lanes beyond the part are set to zero.
inline Floats keep(Floats v, Whole) { return v; }
inline Floats keep(Floats v, Part part) { return select(first_lanes(part.n), v, Floats{}); }

}  // namespace
}  // namespace varkern

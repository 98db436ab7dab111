// What the two modules share: the argument list of every operation, and the casts from Python integers.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

#include <stdexcept>

#include "varkern.h"

namespace varkern::bindings {

// tensor.data_ptr() or a stream handle.
struct Pointer {
  uintptr_t value;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

inline ModulatedLayerNormForward modulated_layer_norm_forward(
    uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t out, uintptr_t mean, uintptr_t rstd, int64_t B, int64_t L,
    int64_t C, int64_t x_stride_b, int64_t x_stride_l, int64_t scale_stride_b, int64_t shift_stride_b, int x_dtype,
    int cond_dtype, int out_dtype, float eps) {
  return {Pointer{x},    Pointer{scale}, Pointer{shift}, Pointer{out},   Pointer{mean}, Pointer{rstd},
          B,             L,              C,              x_stride_b,     x_stride_l,    scale_stride_b,
          shift_stride_b, x_dtype,       cond_dtype,     out_dtype,      eps};
}

constexpr const char* kModulatedLayerNormForward =
    "modulated_layer_norm_forward(x, scale, shift, out, mean, rstd, B, L, C, x_stride_b, x_stride_l, scale_stride_b, "
    "shift_stride_b, x_dtype, cond_dtype, out_dtype, eps)\n\n"
    "x (B, L, C) strided, scale and shift (B, C) strided over B, out (B, L, C) contiguous,\n"
    "mean and rstd (B * L) float32 or 0 = do not store.";

inline ModulatedLayerNormBackward modulated_layer_norm_backward(
    uintptr_t grad_out, uintptr_t x, uintptr_t scale, uintptr_t mean, uintptr_t rstd, uintptr_t grad_x,
    uintptr_t grad_scale, uintptr_t grad_shift, int64_t B, int64_t L, int64_t C, int64_t grad_out_stride_b,
    int64_t grad_out_stride_l, int64_t x_stride_b, int64_t x_stride_l, int64_t scale_stride_b, int x_dtype,
    int cond_dtype, int out_dtype) {
  return {Pointer{grad_out},   Pointer{x},          Pointer{scale},
          Pointer{mean},       Pointer{rstd},       Pointer{grad_x},
          Pointer{grad_scale}, Pointer{grad_shift}, B,
          L,                   C,                   grad_out_stride_b,
          grad_out_stride_l,   x_stride_b,          x_stride_l,
          scale_stride_b,      x_dtype,             cond_dtype,
          out_dtype};
}

constexpr const char* kModulatedLayerNormBackward =
    "modulated_layer_norm_backward(grad_out, x, scale, mean, rstd, grad_x, grad_scale, grad_shift, B, L, C, "
    "grad_out_stride_b, grad_out_stride_l, x_stride_b, x_stride_l, scale_stride_b, x_dtype, cond_dtype, out_dtype)\n\n"
    "grad_out (B, L, C) strided, grad_x (B, L, C) contiguous, grad_scale and grad_shift (B, C) float32, overwritten.";

template <typename T>
struct FromPython {
  using type = T;
  static T cast(T value) { return value; }
};
template <typename T>
struct FromPython<T*> {
  using type = uintptr_t;
  static T* cast(uintptr_t value) { return Pointer{value}; }
};

// Binds launch under name: its Python arguments are those of make, then launch's own after the struct.
// The GIL is released while it runs, and the sentence it returns becomes a RuntimeError.
template <typename Args, typename... Parameters, typename... Extra>
void bind(pybind11::module_& m, const char* name, const char* doc, Args (*make)(Parameters...),
          const char* (*launch)(const Args&, Extra...)) {
  m.def(
      name,
      [make, launch](Parameters... parameters, typename FromPython<Extra>::type... extra) {
        const Args args = make(parameters...);
        pybind11::gil_scoped_release nogil;
        const char* error = launch(args, FromPython<Extra>::cast(extra)...);
        if (error) throw std::runtime_error(error);
      },
      doc);
}

}  // namespace varkern::bindings

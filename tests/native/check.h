// What the programs in checks/ and emulator.cu share: exactly sized buffers, random data, comparisons.
//
// Compiled for the host with the emulation's headers, or by nvcc. A program prints what is wrong and returns
// check::result().
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>

#include "common/dtype.h"
#include "ops/arguments.h"

namespace check {

inline int failures = 0;

// Prints the first failures, and counts all.
template <typename... Values>
void expect(bool holds, const char* format, Values... values) {
  if (holds || ++failures > 10) return;
  fprintf(stderr, format, values...);
  fputc('\n', stderr);
}

inline int result() {
  if (failures) fprintf(stderr, "%d checks failed\n", failures);
  return failures != 0;
}

// Waits for a launch's kernels; error is what the launch returned.
inline void ran(const char* error) {
#ifdef __CUDACC__
  const cudaError_t status = cudaDeviceSynchronize();
  if (!error && status != cudaSuccess) error = cudaGetErrorString(status);
#endif
  if (!error) return;
  fprintf(stderr, "the launch failed: %s\n", error);
  exit(1);
}

// Memory that host and device see. Full of NaN, aligned as CUDA's, and not a byte longer than asked for, so that
// AddressSanitizer sees every access past the end.
class Memory {
 public:
  explicit Memory(int64_t bytes) {
#ifdef __CUDACC__
    const bool failed = cudaMallocManaged(&data_, size_t(bytes)) != cudaSuccess;
#else
    const bool failed = posix_memalign(&data_, 256, size_t(bytes)) != 0;
#endif
    if (failed) ran("no memory for a buffer");
    memset(data_, 0xff, size_t(bytes));
  }
  ~Memory() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    free(data_);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), memory_(size * int64_t(sizeof(T))) {}
  T* data() const { return static_cast<T*>(memory_.data()); }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  Memory memory_;
};

// Floats of a dtype that is known when the program runs: a check that loops over dtypes compiles once.
class Array {
 public:
  Array(varkern::DType dtype, int64_t size)
      : dtype_(dtype), size_(size), memory_(size * (dtype == varkern::kFloat32 ? 4 : 2)) {}
  void* data() const { return memory_.data(); }
  varkern::DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }

  float at(int64_t i) const {
    if (dtype_ == varkern::kFloat32) return static_cast<const float*>(data())[i];
    if (dtype_ == varkern::kFloat16) return varkern::to_float(static_cast<const varkern::float16*>(data())[i]);
    return varkern::to_float(static_cast<const varkern::bfloat16*>(data())[i]);
  }
  void set(int64_t i, float value) {
    if (dtype_ == varkern::kFloat32) {
      static_cast<float*>(data())[i] = value;
    } else if (dtype_ == varkern::kFloat16) {
      static_cast<varkern::float16*>(data())[i] = varkern::From<varkern::float16>::value(value);
    } else {
      static_cast<varkern::bfloat16*>(data())[i] = varkern::From<varkern::bfloat16>::value(value);
    }
  }

  // Uniform in [-1, 1), rounded to the dtype.
  void fill(std::mt19937& random) {
    for (int64_t i = 0; i < size_; ++i) set(i, float(int32_t(random())) * 0x1p-31f);
  }

 private:
  varkern::DType dtype_;
  int64_t size_;
  Memory memory_;
};

// The step from 1 to the next number of the dtype.
inline double epsilon(varkern::DType dtype) {
  return dtype == varkern::kFloat32 ? 0x1p-23 : dtype == varkern::kFloat16 ? 0x1p-10 : 0x1p-7;
}

}  // namespace check

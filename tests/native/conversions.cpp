// Exposes the conversions of csrc/common/dtype.h and csrc/cpu/simd/vector.h, and csrc/cpu/simd/exponential.h, to
// test_native.py, as compiled for one level.
#include "common/dtype.h"
#include "cpu/simd/exponential.h"

using namespace varkern;

namespace {

template <typename T>
void widen(const T* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(in + i));
  if (i < n) store(out + i, load(in + i, n - i), n - i);
}

template <typename T>
void narrow_all(const float* in, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(in + i));
  if (i < n) store(out + i, load(in + i, n - i), n - i);
}

template <typename T>
void widen_scalar(const T* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

template <typename T>
void narrow_scalar(const float* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = From<T>::value(in[i]);
}

void exponentials(const float* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, exponential(load(in + i)));
  if (i < n) store(out + i, exponential(load(in + i, n - i)), n - i);
}

}  // namespace

extern "C" {
int width() { return kWidth; }
void exponential_all(const void* in, void* out, int64_t n) { exponentials((const float*)in, (float*)out, n); }
void widen_float16(const void* in, float* out, int64_t n) { widen((const float16*)in, out, n); }
void widen_bfloat16(const void* in, float* out, int64_t n) { widen((const bfloat16*)in, out, n); }
void narrow_float16(const float* in, void* out, int64_t n) { narrow_all(in, (float16*)out, n); }
void narrow_bfloat16(const float* in, void* out, int64_t n) { narrow_all(in, (bfloat16*)out, n); }
void widen_scalar_float16(const void* in, float* out, int64_t n) { widen_scalar((const float16*)in, out, n); }
void widen_scalar_bfloat16(const void* in, float* out, int64_t n) { widen_scalar((const bfloat16*)in, out, n); }
void narrow_scalar_float16(const float* in, void* out, int64_t n) { narrow_scalar(in, (float16*)out, n); }
void narrow_scalar_bfloat16(const float* in, void* out, int64_t n) { narrow_scalar(in, (bfloat16*)out, n); }
}

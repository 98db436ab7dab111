// How many threads an operation gets. Internal linkage only, as in vector.h.
#pragma once

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace varkern {
namespace {

// Below this much memory traffic a thread costs more to wake than it saves (docs/build.md).
constexpr int64_t kBytesPerThread = 128 * 1024;
constexpr int64_t kWorkPerByte = 8;  // multiply-adds that cost about as much as one byte of that traffic

// At most one thread a task and kBytesPerThread a thread; never nested in another parallel region.
inline int thread_count(int64_t tasks, int64_t bytes) {
#ifdef _OPENMP
  if (omp_in_parallel()) return 1;
  int64_t threads = omp_get_max_threads();
  if (threads > tasks) threads = tasks;
  if (threads > bytes / kBytesPerThread) threads = bytes / kBytesPerThread;
  return threads > 1 ? int(threads) : 1;
#else
  (void)tasks, (void)bytes;
  return 1;
#endif
}

// Of the thread that asks, within its parallel region.
inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace
}  // namespace varkern

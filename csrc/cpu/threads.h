// How many threads an operation gets, and which part of its work each does. Internal linkage only, as in simd/vector.h.
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

// The threads that work on one thing, and the share of one of them.
struct Team {
  int64_t rank, size;

  void barrier() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
  int64_t begin(int64_t tasks) const { return tasks * rank / size; }
  int64_t end(int64_t tasks) const { return tasks * (rank + 1) / size; }
};

// All threads of the parallel region.
inline Team current_team() {
#ifdef _OPENMP
  return {omp_get_thread_num(), omp_get_num_threads()};
#else
  return {0, 1};
#endif
}

}  // namespace
}  // namespace varkern

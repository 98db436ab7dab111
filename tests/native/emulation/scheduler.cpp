// Compiled without sanitizers, whatever the kernels are compiled with: what happens here is no part of the program under
// test. The sanitizers that are linked in are told of the fibers.
#include "scheduler.h"

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define WEAK extern "C" __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_stack, size_t* old_bytes);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 512 * 1024, kGuardBytes = 64 * 1024;
constexpr unsigned kTsanNoSync = 1;  // a switch of fibers orders no memory accesses

enum State { kReady, kAtSyncthreads, kInWarpOperation, kReturned };

struct Fiber {
  void* context[5];  // of __builtin_setjmp
  ucontext_t start;
  bool started = false;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  unsigned index = 0;
  State state = kReturned;
  unsigned turn = 0;  // of operations of the warp
};

// How many threads have arrived; the addresses of tokens stand for the two latest barriers' orderings.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  char tokens[2] = {};
};

struct Warp {
  Barrier barrier;
  unsigned arrived = 0;
  const char* operation = nullptr;
  // Two turns: a lane may show its next words while others still read the last ones.
  Words slots[2][kWarpSize];
};

Fiber host, fibers[kMaxThreads];
Fiber* current = &host;
Barrier block;
Warp warps[kMaxThreads / kWarpSize];
void* shared = nullptr;
char launch_token, return_token;
void (*thread_body)(const void*) = nullptr;
const void* thread_argument = nullptr;

void acquire(char* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}

void release(char* token) {
  if (__tsan_release) __tsan_release(token);
}

// The two halves of a switch must not share a function: __builtin_longjmp may not leave for its own.
[[gnu::noinline, noreturn]] void jump(Fiber& to) {
  if (!to.started) {
    to.started = true;
    setcontext(&to.start);
  }
  __builtin_longjmp(to.context, 1);
}

[[gnu::noinline]] void switch_to(Fiber& to) {
  Fiber& from = *current;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kTsanNoSync);
  current = &to;
  threadIdx.x = to.index;
  if (__builtin_setjmp(from.context) == 0) jump(to);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(current->fake_stack, nullptr, nullptr);
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &host.stack, &host.stack_bytes);
  for (;;) {
    acquire(&launch_token);
    thread_body(thread_argument);
    release(&return_token);
    current->state = kReturned;
    switch_to(host);
  }
}

// The fibers live as long as the process.
void create(Fiber& fiber, unsigned index) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(memory != MAP_FAILED && mprotect(memory, kGuardBytes, PROT_NONE) == 0, "no memory for a thread's stack");
  fiber.stack = static_cast<char*>(memory) + kGuardBytes;
  fiber.stack_bytes = kStackBytes;
  fiber.index = index;
  if (__tsan_create_fiber) fiber.tsan = __tsan_create_fiber(0);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
}

const char* describe(State state) {
  switch (state) {
    case kAtSyncthreads: return "waits at __syncthreads";
    case kInWarpOperation: return "waits for the lanes of its warp";
    default: return "returned";
  }
}

[[noreturn]] void fail(const char* message) {
  fflush(stdout);
  fprintf(stderr, "emulation: block %u, thread %u: %s\n", blockIdx.x, current->index, message);
  _Exit(3);
}

// Nobody can go on: says which thread is where, one for each state.
[[noreturn]] void fail_stuck(unsigned threads) {
  char text[256] = "the threads wait for each other";
  unsigned seen = 0;
  for (unsigned t = 0; t < threads; ++t) {
    if (seen >> fibers[t].state & 1) continue;
    seen |= 1u << fibers[t].state;
    const size_t used = strlen(text);
    snprintf(text + used, sizeof(text) - used, "; thread %u %s", t, describe(fibers[t].state));
  }
  current = &fibers[0];
  fail(text);
}

// Until every thread has returned. A warp runs as far as it can before the next one does.
void run_block(unsigned threads) {
  for (unsigned left = threads; left > 0;) {
    bool progress = false;
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      for (bool again = true; again;) {
        again = false;
        for (unsigned t = first; t < first + kWarpSize; ++t) {
          if (fibers[t].state != kReady) continue;
          switch_to(fibers[t]);
          again = progress = true;
          left -= fibers[t].state == kReturned;
        }
      }
    }
    if (!progress) fail_stuck(threads);
  }
}

// Waits in the state until all of the count threads from first on do.
void wait(State state, unsigned& arrived, unsigned first, unsigned count) {
  current->state = state;
  if (++arrived == count) {
    arrived = 0;
    for (unsigned t = first; t < first + count; ++t) fibers[t].state = kReady;
  }
  switch_to(host);
}

void wait(State state, Barrier& barrier, unsigned first, unsigned count) {
  char* token = &barrier.tokens[barrier.generation % 2];
  release(token);
  if (barrier.arrived + 1 == count) ++barrier.generation;
  wait(state, barrier.arrived, first, count);
  acquire(token);
}

Warp& warp() { return warps[current->index / kWarpSize]; }

void enter(const char* operation) {
  Warp& w = warp();
  if (w.arrived == 0 && w.barrier.arrived == 0) w.operation = operation;
  if (strcmp(w.operation, operation) == 0) return;
  char text[160];
  snprintf(text, sizeof(text), "the lane calls %s while others of its warp are in %s", operation, w.operation);
  fail(text);
}

}  // namespace

void require(bool condition, const char* message) {
  if (!condition) fail(message);
}

void run(unsigned blocks, unsigned threads, size_t shared_bytes, void (*body)(const void*), const void* argument) {
  require(current == &host, "a kernel launches a kernel");
  host.started = true;
  if (__tsan_get_current_fiber) host.tsan = __tsan_get_current_fiber();
  thread_body = body, thread_argument = argument;
  blockDim = {threads, 1, 1}, gridDim = {blocks, 1, 1};
  for (unsigned t = 0; t < threads; ++t) {
    if (!fibers[t].stack) create(fibers[t], t);
  }
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = {b, 0, 0};
    if (shared_bytes) {
      require(posix_memalign(&shared, 128, shared_bytes) == 0, "no memory for dynamic shared memory");
      memset(shared, 0xff, shared_bytes);
    }
    block = {};
    for (unsigned w = 0; w < threads / kWarpSize; ++w) warps[w] = {};
    for (unsigned t = 0; t < threads; ++t) fibers[t].state = kReady, fibers[t].turn = 0;
    release(&launch_token);
    run_block(threads);
    acquire(&return_token);
    free(shared);
    shared = nullptr;
  }
}

void* dynamic_shared() {
  require(shared, "the kernel was launched without dynamic shared memory");
  return shared;
}

void syncthreads() { wait(kAtSyncthreads, block, 0, blockDim.x); }

void syncwarp() {
  enter("__syncwarp");
  wait(kInWarpOperation, warp().barrier, current->index - lane(), kWarpSize);
}

void publish(const Words& words, const char* operation) {
  enter(operation);
  Warp& w = warp();
  w.slots[++current->turn % 2][lane()] = words;
  wait(kInWarpOperation, w.arrived, current->index - lane(), kWarpSize);
}

Words published(unsigned lane) { return warp().slots[current->turn % 2][lane]; }

}  // namespace emulation

// Runs the threads of CUDA blocks as fibers of one thread of the operating system, block after block.
//
// A fiber runs until it waits for others, so a run is the same every time and a wait costs no system call. For
// ThreadSanitizer every fiber is a thread of its own, and what orders their accesses is what CUDA promises to order:
// __syncthreads over the block and __syncwarp over the warp. Shuffles, votes and matrix instructions make the lanes
// wait but order no memory. The rule for both kinds of wait: all threads of the block, all 32 lanes of the warp, take
// part, and no thread returns while others wait. Otherwise the process ends with a sentence that names the threads.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulation {

constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;

// body(argument) is what one CUDA thread does. shared_bytes are the block's dynamic shared memory: on the heap, of
// exactly that size, and full of NaN when a block starts. Blocks are ordered one after another: a race between two
// blocks is not seen, and a block must not wait for a later one.
void run(unsigned blocks, unsigned threads, size_t shared_bytes, void (*body)(const void*), const void* argument);

void* dynamic_shared();

void syncthreads();
void syncwarp();

// What lanes show each other in one step.
struct Words {
  uint64_t at[4];
};

// Waits until every lane of the warp shows its words in the same operation.
void publish(const Words& words, const char* operation);

// What the lane showed in the last operation.
Words published(unsigned lane);

// Ends the process with the message unless the condition holds.
void require(bool condition, const char* message);

}  // namespace emulation

// Runs a CUDA kernel's blocks on the host, to see what a GPU would compute and what it might.
//
// Blocks run one after another, threads of a block as fibers that change only where CUDA orders them: at a barrier or
// at an instruction of the whole warp. In between they run in an order drawn from a seed, so a missing barrier shows as
// a result that is wrong or changes with the seed. Shared memory starts as NaN. cp.async writes NaN when it is issued
// and the data as late as it may: when its thread waits for it. Blocks of a cooperative launch are there together and
// change at the grid's barrier; static shared memory exists once, so what a block keeps there is lost at that barrier.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>

namespace emulate {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Geometry {
    Index grid, block;
};

// Where the running fiber is.
Index thread_index();
Index block_index();
Geometry geometry();
int lane();
void* dynamic_shared();

// All threads of the block at the same line.
void barrier(int line);

// All threads of all blocks of a cooperative launch at the same line.
void grid_barrier(int line);

// All lanes of the warp at the same operation: `all` gets each lane's argument, by lane, once.
void warp_wide(const char* operation, void* argument, const std::function<void(void* const*)>& all);

void async_copy(void* to, const void* from, int bytes);
void async_commit();
void async_wait(int pending);

// Ends the block's run; the launch reports failure with this text.
[[noreturn]] void fail(const std::string& message);

// 0, or 1 where the kernel broke a rule; the text is then `failure()`.
int run(const std::function<void()>& kernel, Index grid, Index block, size_t shared_bytes, bool cooperative);
const char* failure();

// How many bytes of dynamic shared memory a kernel may have, once it has been asked for.
int& allowed_shared(const void* kernel);

}  // namespace emulate

extern "C" void ulr_emulate_seed(uint32_t seed);  // of the order of blocks and threads

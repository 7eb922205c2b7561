#include "emulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

// Where a fiber goes on. `swapcontext` asks the kernel for the signal mask at each change, and the address sanitizer
// clears its notes on the whole stack there: together most of the time of a run.
#if defined(__x86_64__)

struct Context {
    void** stack = nullptr;  // the registers that a call keeps lie here, then the address to go on at
};

extern "C" void ulr_emulate_change(void*** from, void** to);
asm(R"(
    .pushsection .text
    .type ulr_emulate_change, @function
ulr_emulate_change:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size ulr_emulate_change, . - ulr_emulate_change
    .popsection
)");

void begin(Context& context, char* stack, void (*function)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) / 16 * 16);
    *--top = nullptr;  // as if called: the function's stack is 8 bytes from a multiple of 16, and nobody called it
    *--top = reinterpret_cast<void*>(function);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    context.stack = top;
}

void change(Context& from, Context& to) { ulr_emulate_change(&from.stack, to.stack); }

#else

using Context = ucontext_t;

void begin(Context& context, char* stack, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
}

void change(Context& from, Context& to) { swapcontext(&from, &to); }

#endif

constexpr int kWarp = 32, kPoison = 0xff;  // all ones is a NaN in fp32, bf16 and fp16

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

enum class State { kReady, kAtBarrier, kAtGridBarrier, kInWarp, kDone };

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    State state = State::kDone;
    Index index;
    int number = 0, line = 0;
    std::vector<Copy> open;  // of the group not committed yet
    std::deque<std::vector<Copy>> groups;
};

struct Warp {
    void* arguments[kWarp];
    const char* operation = nullptr;
    int arrived = 0;
};

// A block that has started: its threads, and its dynamic shared memory.
struct Block {
    Index at;
    std::vector<std::unique_ptr<Fiber>> fibers;  // kept from block to block for their stacks
    std::vector<Warp> warps;
    std::vector<Fiber*> ready;
    std::unique_ptr<void, decltype(&free)> shared{nullptr, &free};
};

std::vector<std::unique_ptr<Block>> resident;  // one, or all of a grid whose blocks wait for each other
Block* block = nullptr;                        // the one that runs
Context scheduler;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
Geometry shape;
bool together = false;  // all blocks of the grid are there at once
std::string message;
std::mt19937 order;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

// The sanitizer must be told of each change of stack.
void enter(Fiber* fiber) {
    running = fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber->stack.get(), kStackBytes);
    change(scheduler, fiber->context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    change(scheduler, fiber->context);
#endif
}

void leave(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(fiber->state == State::kDone ? nullptr : &fake_stack, scheduler_stack,
                                   scheduler_stack_bytes);
    change(fiber->context, scheduler);
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#else
    change(fiber->context, scheduler);
#endif
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*body)();
    running->state = State::kDone;
    leave(running);
}

void wake(Fiber* fiber) {
    fiber->state = State::kReady;
    block->ready.push_back(fiber);
}

void prepare(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);  // functions that a fiber did not return from
#endif
    begin(fiber.context, fiber.stack.get(), fiber_main);
    fiber.open.clear();
    fiber.groups.clear();
}

// Of threads that wait, all at one line of the block's or the grid's barrier: that line. Else it is an error.
int line_of(const Block& of, int threads, State barrier) {
    int waiting = 0, line = 0;
    for (int i = 0; i < threads; ++i)
        if (of.fibers[i]->state == barrier) {
            if (waiting++ > 0 && of.fibers[i]->line != line)
                message = "threads wait at different barriers, lines " + std::to_string(line) + " and " +
                          std::to_string(of.fibers[i]->line);
            line = of.fibers[i]->line;
        }
    if (waiting != threads && message.empty())
        message = std::to_string(waiting) + " of " + std::to_string(threads) + " threads wait at the barrier of line " +
                  std::to_string(line) + ", the others never come";
    return line;
}

bool any(const Block& of, int threads, State state) {
    for (int i = 0; i < threads; ++i)
        if (of.fibers[i]->state == state) return true;
    return false;
}

void start_block(Block& next, Index at, int threads, size_t shared_bytes) {
    block = &next;
    next.at = at;
    next.shared.reset(aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
    if (shared_bytes > 0) memset(next.shared.get(), kPoison, shared_bytes);
    next.warps.assign((threads + kWarp - 1) / kWarp, Warp());
    next.ready.clear();
    for (int i = 0; i < threads; ++i) {
        if (static_cast<int>(next.fibers.size()) == i) next.fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *next.fibers[i];
        prepare(fiber);
        fiber.number = i;
        fiber.index = {i % shape.block.x, i / shape.block.x % shape.block.y, i / shape.block.x / shape.block.y};
        wake(&fiber);
    }
}

// Runs a block until all its threads are done, or wait for the grid.
void run_block(Block& next, int threads) {
    block = &next;
    while (message.empty()) {
        if (next.ready.empty()) {
            for (const Warp& warp : next.warps)
                if (warp.arrived > 0) message = std::string(warp.operation) + ": some lanes of the warp never come";
            if (!message.empty()) return;
            if (!any(next, threads, State::kAtBarrier)) return;
            line_of(next, threads, State::kAtBarrier);
            if (!message.empty()) return;
            for (int i = 0; i < threads; ++i) wake(next.fibers[i].get());
            continue;
        }
        std::swap(next.ready[order() % next.ready.size()], next.ready.back());
        Fiber* fiber = next.ready.back();
        next.ready.pop_back();
        enter(fiber);
    }
}

// Blocks that wait for each other: all start, and from one barrier of the grid to the next they run one after another.
void run_together(std::vector<Index>& places, int threads, size_t shared_bytes) {
    while (resident.size() < places.size()) resident.push_back(std::make_unique<Block>());
    for (size_t i = 0; i < places.size(); ++i) start_block(*resident[i], places[i], threads, shared_bytes);
    std::vector<Block*> turn;
    for (size_t i = 0; i < places.size(); ++i) turn.push_back(resident[i].get());
    while (message.empty()) {
        std::shuffle(turn.begin(), turn.end(), order);
        for (Block* next : turn) {
            run_block(*next, threads);
            if (!message.empty()) return;
        }
        size_t waiting = 0;
        int line = 0;
        for (Block* next : turn) {
            if (!any(*next, threads, State::kAtGridBarrier)) continue;
            const int here = line_of(*next, threads, State::kAtGridBarrier);
            if (waiting++ > 0 && here != line) message = "blocks wait at different barriers of the grid";
            line = here;
        }
        if (waiting == 0 || !message.empty()) return;
        if (waiting != turn.size()) {
            message = std::to_string(waiting) + " of " + std::to_string(turn.size()) +
                      " blocks wait at the grid's barrier of line " + std::to_string(line) + ", the others never come";
            return;
        }
        for (Block* next : turn) {
            block = next;
            for (int i = 0; i < threads; ++i) wake(next->fibers[i].get());
        }
    }
}

void finish(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        memcpy(copy.to, copy.from, copy.bytes);
        memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
    }
}

}  // namespace

Index thread_index() { return running->index; }
Index block_index() { return block->at; }
Geometry geometry() { return shape; }
int lane() { return running->number % kWarp; }
void* dynamic_shared() { return block->shared.get(); }

void barrier(int line) {
    running->state = State::kAtBarrier;
    running->line = line;
    leave(running);
}

void grid_barrier(int line) {
    if (!together) fail("a grid's barrier needs a cooperative launch");
    running->state = State::kAtGridBarrier;
    running->line = line;
    leave(running);
}

void warp_wide(const char* operation, void* argument, const std::function<void(void* const*)>& all) {
    Fiber* self = running;
    Warp& warp = block->warps[self->number / kWarp];
    if (warp.arrived > 0 && strcmp(warp.operation, operation) != 0)
        fail(std::string("lanes of a warp are at different instructions: ") + warp.operation + " and " + operation);
    warp.operation = operation;
    warp.arguments[self->number % kWarp] = argument;
    if (++warp.arrived < kWarp) {
        self->state = State::kInWarp;
        leave(self);
        return;
    }
    warp.arrived = 0;
    all(warp.arguments);
    for (int i = 0; i < kWarp; ++i) {
        Fiber* fiber = block->fibers[self->number / kWarp * kWarp + i].get();
        if (fiber != self) wake(fiber);
    }
}

void async_copy(void* to, const void* from, int bytes) {
    if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(to) % 16 != 0 ||
        (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0))
        fail("cp.async of 16 bytes: an address is not aligned, or the source's size is wrong");
    memset(to, kPoison, 16);
    running->open.push_back({to, from, bytes});
}

void async_commit() {
    running->groups.push_back(std::move(running->open));
    running->open.clear();
}

void async_wait(int pending) {
    while (static_cast<int>(running->groups.size()) > pending) {
        finish(running->groups.front());
        running->groups.pop_front();
    }
}

void fail(const std::string& text) {
    message = text;
    leave(running);
    abort();  // a fiber of a failed block is never entered again
}

int run(const std::function<void()>& kernel, Index grid, Index block_size, size_t shared_bytes, bool cooperative) {
    message.clear();
    body = &kernel;
    shape = {grid, block_size};
    together = cooperative;
    std::vector<Index> places;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) places.push_back({x, y, z});
    std::shuffle(places.begin(), places.end(), order);
    const int threads = block_size.x * block_size.y * block_size.z;
    if (together) {
        run_together(places, threads, shared_bytes);
        return !message.empty();
    }
    if (resident.empty()) resident.push_back(std::make_unique<Block>());
    for (const Index& at : places) {
        start_block(*resident[0], at, threads, shared_bytes);
        run_block(*resident[0], threads);
        if (!message.empty()) return 1;
    }
    return 0;
}

const char* failure() { return message.c_str(); }

int& allowed_shared(const void* kernel) {
    constexpr int kUnasked = 32 * 1024;  // of 48 KiB, which count a kernel's static memory too
    static std::map<const void*, int> allowed;
    return allowed.try_emplace(kernel, kUnasked).first->second;
}

}  // namespace emulate

extern "C" void ulr_emulate_seed(uint32_t seed) { emulate::order.seed(seed); }

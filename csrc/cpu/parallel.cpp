#include "parallel.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "dispatch.h"

namespace {

// GOMP_parallel of the process's OpenMP runtime: a second runtime would start threads of its own, which compete for the
// cores. Absent: plain threads.
using OmpParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<OmpParallel> omp_parallel{nullptr};

// The range is cut into one part for each thread, so that neighbouring work stays on one core. A thread that is done
// with its part helps with the others, so that one busy core does not delay all. The first part is the caller's, as in
// other libraries, so that a product's results are found in its core's cache.
struct Part {
    alignas(64) std::atomic<int64_t> next;
    int64_t end;
};

struct Work {
    std::vector<Part> parts;
    std::atomic<size_t> arrived{1};
    std::thread::id caller;
    int64_t grain;
    void (*body)(void*, int64_t, int64_t);
    void* context;
};

void run(void* work) {
    auto& w = *static_cast<Work*>(work);
    const size_t parts = w.parts.size();
    const size_t own = std::this_thread::get_id() == w.caller ? 0 : w.arrived.fetch_add(1);
    for (size_t turn = 0; turn < parts; ++turn) {
        Part& part = w.parts[(own + turn) % parts];
        for (int64_t first; (first = part.next.fetch_add(w.grain)) < part.end;)
            w.body(w.context, first, std::min(first + w.grain, part.end));
    }
}

}  // namespace

void ulr::parallel(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    const int64_t pieces = (count + grain - 1) / grain;
    threads = static_cast<int>(std::min<int64_t>(threads, pieces));
    if (threads <= 1) {
        if (count > 0) body(context, 0, count);
        return;
    }
    Work work;
    work.parts = std::vector<Part>(static_cast<size_t>(threads));
    for (int part = 0; part < threads; ++part) {
        work.parts[part].next = count * part / threads;
        work.parts[part].end = count * (part + 1) / threads;
    }
    work.caller = std::this_thread::get_id();
    work.grain = grain;
    work.body = body;
    work.context = context;
    if (const OmpParallel omp = omp_parallel.load()) {
        omp(run, &work, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    for (int other = 1; other < threads; ++other) others.emplace_back(run, &work);
    run(&work);
    for (auto& other : others) other.join();
}

ulr::Scratch::Scratch(int64_t count)
    : data_(count ? static_cast<float*>(calloc(static_cast<size_t>(count), sizeof(float))) : nullptr) {}

ulr::Scratch::~Scratch() { free(data_); }

ULR_EXPORT void ulr_cpu_set_omp_parallel(void* function) {
    omp_parallel.store(reinterpret_cast<OmpParallel>(function));
}

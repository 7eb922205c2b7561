// Threads and memory. Compiled once, for no instruction set in particular.
#pragma once

#include <stdint.h>

namespace ulr {

// Calls body(context, first, last) on ranges that cover 0 .. count, from `threads` threads, including this one; an
// idle thread takes the next `grain` items. Results must not depend on which thread does which.
void parallel(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// The same for a callable (first, last).
template <typename Body>
void parallel(int threads, int64_t count, int64_t grain, Body body) {
    parallel(
        threads, count, grain,
        [](void* context, int64_t first, int64_t last) { (*static_cast<Body*>(context))(first, last); }, &body);
}

// Zeroed floats. Defined out of line, because code that is compiled per instruction set must not instantiate the
// standard library's templates: the linker would keep one copy of them for all sets.
class Scratch {
  public:
    explicit Scratch(int64_t count);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* data() const { return data_; }  // NULL: out of memory, or a size of 0

  private:
    float* data_;
};

}  // namespace ulr

// Kernels with a mistake planted on request: the emulator must tell them from the ones without.
#include <utility>

#include "../../csrc/cuda/element.cuh"
#include "../../csrc/cuda/launch.cuh"

namespace {

constexpr int kThreads = 64;

struct Params {
    float* out;
    const float* in;
    bool mistaken;
    float* scratch;
};

// Reverses the block's elements through shared memory. The mistake: no barrier between writing and reading.
__global__ void missing_barrier(const Params p) {
    __shared__ float values[kThreads];
    values[threadIdx.x] = p.in[threadIdx.x];
    if (!p.mistaken) __syncthreads();
    p.out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// The mistake: half of the threads do not come to the barrier.
__global__ void divergent_barrier(const Params p) {
    if (!p.mistaken || threadIdx.x < kThreads / 2) __syncthreads();
    p.out[threadIdx.x] = p.in[threadIdx.x];
}

// The mistake: writes one element past the dynamic shared memory.
__global__ void dynamic_overrun(const Params p) {
    float* values = ulr::dynamic_shared<float>();
    values[threadIdx.x + p.mistaken] = p.in[threadIdx.x];
    __syncthreads();
    p.out[threadIdx.x] = values[threadIdx.x];
}

// The mistake: writes one element past a static shared array.
__global__ void static_overrun(const Params p) {
    __shared__ float values[kThreads];
    values[threadIdx.x + p.mistaken] = p.in[threadIdx.x];
    __syncthreads();
    p.out[threadIdx.x] = values[threadIdx.x];
}

// The mistake: reads what cp.async copies without waiting for it.
__global__ void missing_wait(const Params p) {
    float* values = ulr::dynamic_shared<float>();
    if (threadIdx.x % 4 == 0) ulr::cp_async16(values + threadIdx.x, p.in + threadIdx.x, 16);
    ulr::cp_async_commit();
    if (!p.mistaken) ulr::cp_async_wait<0>();
    __syncthreads();
    p.out[threadIdx.x] = values[threadIdx.x];
}

// out [16, 4] = the first columns of A [16, 16] = in (its rows 4 elements apart) times the identity in B [16, 8].
// The mistake: two registers of A's fragment in the other order.
__global__ void wrong_fragment(const Params p) {
    const int row = threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
    const auto in = [&](int r, int k) { return k < 4 ? p.in[4 * r + k] : 0.0f; };
    const auto pair = [&](int r, int k) { return ulr::word_of(__floats2half2_rn(in(r, k), in(r, k + 1))); };
    uint32_t a[4] = {pair(row, col), pair(row + 8, col), pair(row, col + 8), pair(row + 8, col + 8)};
    if (p.mistaken) std::swap(a[0], a[1]);
    const auto identity = [&](int k) { return ulr::word_of(__floats2half2_rn(k == row, k + 1 == row)); };
    float d[4] = {};
    ulr::mma(d, a, identity(col), identity(col + 8), __half{});
    for (int i = 0; i < 4; ++i)
        if (col < 4) p.out[4 * (row + 8 * (i / 2)) + col + i % 2] = d[i];
}

// Reverses the elements through global memory, each block writing its share of them. The mistake: no barrier of the
// grid between writing and reading.
__global__ void missing_grid_barrier(const Params p) {
    const int share = (kThreads + gridDim.x - 1) / gridDim.x, first = blockIdx.x * share;
    const int element = first + static_cast<int>(threadIdx.x);
    const bool own = static_cast<int>(threadIdx.x) < share && element < kThreads;
    if (own) p.scratch[element] = p.in[element];
    if (!p.mistaken) ulr::grid_sync();
    if (own) p.out[element] = p.scratch[kThreads - 1 - element];
}

// The mistake: the first block does not come to the grid's barrier.
__global__ void divergent_grid_barrier(const Params p) {
    if (!p.mistaken || blockIdx.x > 0) ulr::grid_sync();
    if (blockIdx.x == 0) p.out[threadIdx.x] = p.in[threadIdx.x];
}

}  // namespace

void ulr::remember_error(cudaError_t) {}

// Runs one kernel by its number on 64 elements.
extern "C" int ulr_planted(int kernel, int mistaken, float* out, const float* in) {
    void (*const kernels[])(Params) = {missing_barrier,      divergent_barrier,     dynamic_overrun,
                                       static_overrun,       missing_wait,          wrong_fragment,
                                       missing_grid_barrier, divergent_grid_barrier};
    float scratch[kThreads] = {};
    const Params params{out, in, mistaken != 0, scratch};
    const bool together = kernels[kernel] == missing_grid_barrier || kernels[kernel] == divergent_grid_barrier;
    if (together) return ulr::launch_together(kernels[kernel], dim3(kThreads), 0, ulr_launch{}, params);
    return ulr::launch_kernel(kernels[kernel], 1, dim3(kThreads), kThreads * sizeof(float), ulr_launch{}, params);
}

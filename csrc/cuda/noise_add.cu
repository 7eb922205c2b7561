// noise_add: y[c] = x[c] + sigma * eps_c.
#include <algorithm>

#include "dispatch.cuh"
#include "grid.cuh"
#include "launch.cuh"
#include "noise.cuh"

namespace ulr {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kFullDevice = 8 * 160;  // blocks: enough for any device of today

template <typename T>
struct Add {
    ulr_noise_spec noise;
    Grid<T> y, x;
    PerFeature<float> sigma;
    Quads quads;
    uint32_t draws, draws_here;  // all of them, and those of a block
    int64_t blocks;              // of one range of draws
};

// A thread makes a quad of columns of one row, for some draws.
template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads) noise_add_kernel(const Add<T> p) {
    __shared__ NoiseTable table;
    table.fill(p.noise, threadIdx.x, kThreads);
    __syncthreads();
    const Noise<kind> noise(p.noise, table);
    const int64_t index = blockIdx.x % p.blocks * kThreads + threadIdx.x;
    if (index >= p.quads.rows * p.quads.quads) return;
    const uint32_t row = p.quads.row(index), quad = p.quads.quad(index);
    const int64_t col = 4 * int64_t{quad} - p.quads.shift;
    const GridQuad<T> y(p.y, row, col), x(p.x, row, col);
    float sigma[4], clean[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sigma[i] = p.sigma[min(max(col + i, int64_t{0}), p.y.cols - 1)];
    const bool shared = p.x.copies == 1;
    if (shared) x.load(clean, 0);
    const uint32_t first_draw = static_cast<uint32_t>(blockIdx.x / p.blocks) * p.draws_here;
    const uint32_t last_draw = min(first_draw + p.draws_here, p.draws);
    Quad<kind> noise_quad(noise, static_cast<uint32_t>(p.noise.row_offset) + row,
                          static_cast<uint32_t>(p.quads.first) + quad);
#pragma unroll 1
    for (uint32_t draw = first_draw; draw < last_draw; ++draw) {
        float eps[4], value[4];
        noise_quad.make(eps, static_cast<uint32_t>(p.noise.draw) + draw, draw - first_draw);
        if (!shared) x.load(clean, draw);
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = fmaf(sigma[i], eps[i], clean[i]);
        y.store(draw, value);
        if (!p.noise.antithetic) continue;
        if (!shared) x.load(clean, draw + p.draws);
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = fmaf(-sigma[i], eps[i], clean[i]);
        y.store(draw + p.draws, value);
    }
}

enum { kY, kX, kSigma };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const Grid<T> y(t[kY], noise.col_offset), x(t[kX], noise.col_offset);
    if (y.rows == 0 || y.cols == 0) return ULR_OK;
    const uint32_t draws = static_cast<uint32_t>(noise.antithetic ? y.copies / 2 : y.copies);
    Add<T> p{noise, y, x, PerFeature<float>(t[kSigma]), Quads(y, noise.col_offset), draws, draws, 0};
    p.blocks = (p.quads.count() + kThreads - 1) / kThreads;
    // A thread makes all draws, so that it reads x once, unless that leaves a device idle.
    const int64_t ranges = std::min<int64_t>(draws, std::max<int64_t>(1, kFullDevice / p.blocks));
    p.draws_here = static_cast<uint32_t>((draws + ranges - 1) / ranges);
    const auto launch_kind = [&](auto kernel) {
        return launch_kernel(kernel, p.blocks * ((draws + p.draws_here - 1) / p.draws_here), dim3(kThreads), 0, launch,
                             p);
    };
    return by_kind(noise, [&](auto kind) { return launch_kind(noise_add_kernel<T, decltype(kind)::value>); });
}

}  // namespace
}  // namespace ulr

// tensors: y [C, a, N, b, c], x likewise or with one copy that all share, sigma [1, 1, 1 or N].
extern "C" int ulr_cuda_noise_add(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kY].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

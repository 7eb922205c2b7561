// noise_dot: d[c, b] = sum over the rows and columns of sample b of sigma * eps_c * x.
//
// A warp sums a range of one sample for up to 32 draws. A lane takes neighbouring columns of a row at a time, a cell:
// it reads x once and makes the noise of the cell draw after draw. Shuffles add up the lanes, and lane number d keeps
// the sum of draw d. A second launch adds up the ranges of a sample, in order, where there are several.
#include "dispatch.cuh"
#include "grid.cuh"
#include "launch.cuh"
#include "noise.cuh"

namespace ulr {
namespace {

constexpr int kThreads = 256, kLanes = 32;

// Quads of a cell. A word of signs has eight; with more normals there would be fewer cells than lanes in short rows.
template <Kind kind>
constexpr int kQuadsOf = kind == Kind::kSigns ? 8 : 2;

struct Sums {
    float* out;  // [copies, samples]
    int64_t copy_stride, sample_stride;
    float* partials;  // [ranges, draws, samples], or absent: there is one range
    int64_t samples, ranges;
    uint32_t draws;
    bool antithetic;

    __device__ __forceinline__ void store(uint32_t draw, int64_t sample, float sum) const {
        float* to = out + draw * copy_stride + sample * sample_stride;
        *to = sum;
        if (antithetic) to[draws * copy_stride] = -sum;
    }
    __device__ __forceinline__ float* partial(int64_t range, uint32_t draw, int64_t sample) const {
        return partials + (range * draws + draw) * samples + sample;
    }
};

template <typename T>
struct Dot {
    ulr_noise_spec noise;
    Grid<T> x;
    PerFeature<float> sigma;
    Sums sums;
    uint32_t draws_here, groups;               // draws of a warp, and how many warps share the draws
    int64_t row_cells, cells, cells_of_range;  // of a row, of a sample, of a warp
};

// sigma * x of a cell; 0 in columns that x does not have.
template <typename T, int quads>
__device__ __forceinline__ void load_cell(float (&scaled)[quads][4], const Dot<T>& p, uint32_t row, int64_t col) {
#pragma unroll
    for (int q = 0; q < quads; ++q) {
        const int64_t first = col + 4 * q;
#pragma unroll
        for (int i = 0; i < 4; ++i) scaled[q][i] = 0.0f;
        if (first >= p.x.cols || first + 3 < 0) continue;
        GridQuad<T>(p.x, row, first).load(scaled[q], 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) scaled[q][i] *= p.sigma[min(max(first + i, int64_t{0}), p.x.cols - 1)];
    }
}

template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads, kind == Kind::kQuantile ? 3 : 2) noise_dot_kernel(const Dot<T> p) {
    __shared__ NoiseTable table;
    table.fill(p.noise, threadIdx.x, kThreads);
    __syncthreads();
    const Noise<kind> noise(p.noise, table);
    constexpr int kQuads = kQuadsOf<kind>, kColumns = 4 * kQuads;
    const int lane = threadIdx.x % kLanes;
    const int64_t warp = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kLanes, part = warp / p.groups;
    const int64_t range = part % p.sums.ranges, sample = part / p.sums.ranges;
    if (sample >= p.sums.samples) return;  // all lanes of a warp together
    const uint32_t first = static_cast<uint32_t>(warp % p.groups) * p.draws_here;
    const uint32_t draws = min(p.draws_here, p.sums.draws - first);
    const int64_t end = min((range + 1) * p.cells_of_range, p.cells);
    float own = 0.0f;
#pragma unroll 1
    for (int64_t start = range * p.cells_of_range; start < end; start += kLanes) {
        // Lanes past the end make the last cell's noise and add 0.
        const int64_t index = min(start + lane, end - 1);
        const int64_t position = p.x.along_rows ? index % p.noise.positions : index / p.row_cells;
        const int64_t cell = p.x.along_rows ? index / p.noise.positions : index % p.row_cells;
        const uint32_t row = static_cast<uint32_t>(sample * p.noise.positions + position);
        const uint32_t noise_row = static_cast<uint32_t>(p.noise.row_offset) + row;
        const uint32_t noise_cell = static_cast<uint32_t>(p.noise.col_offset / kColumns + cell);
        float scaled[kQuads][4] = {};
        if (start + lane < end) load_cell(scaled, p, row, cell * kColumns - p.noise.col_offset % kColumns);
        // add(sums, draw, d): adds the cell's products, a sum for each column of a quad.
        const auto each_draw = [&](auto add) {
#pragma unroll 1
            for (uint32_t d = 0; d < draws; ++d) {
                float sums[4] = {};
                add(sums, static_cast<uint32_t>(p.noise.draw) + first + d, d);
                float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
                for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
                if (lane == static_cast<int>(d)) own += sum;
            }
        };
        if constexpr (kind == Kind::kSigns) {
            SignWord<1> signs(noise, noise_row, noise_cell);
            each_draw([&](float (&sums)[4], uint32_t draw, uint32_t d) {
                const uint32_t word = signs.make(draw, d == 0);
#pragma unroll
                for (int c = 0; c < kColumns; ++c)
                    sums[c % 4] += float_of(bits_of(scaled[c / 4][c % 4]) ^ (word << (31 - c) & 0x80000000u));
            });
        } else {
            each_draw([&](float (&sums)[4], uint32_t draw, uint32_t) {
#pragma unroll
                for (int q = 0; q < kQuads; ++q) {
                    float eps[4];
                    noise.quad(eps, noise_row, kQuads * noise_cell + q, draw);
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[i] = fmaf(eps[i], scaled[q][i], sums[i]);
                }
            });
        }
    }
    if (lane >= static_cast<int>(draws)) return;
    const uint32_t draw = first + static_cast<uint32_t>(lane);
    if (p.sums.partials == nullptr)
        p.sums.store(draw, sample, own);
    else
        *p.sums.partial(range, draw, sample) = own;
}

// A thread adds up the ranges of one sample, for one draw.
__global__ void __launch_bounds__(kThreads) add_ranges_kernel(const Sums p) {
    const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    if (index >= p.draws * p.samples) return;
    const uint32_t draw = static_cast<uint32_t>(index / p.samples);
    const int64_t sample = index % p.samples;
    float sum = 0.0f;
    for (int64_t range = 0; range < p.ranges; ++range) sum += *p.partial(range, draw, sample);
    p.store(draw, sample, sum);
}

enum { kOut, kX, kSigma, kPartials };
enum { kDrawsOfWarp };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const ulr_tensor &out = t[kOut], &partials = t[kPartials];
    const uint32_t draws = static_cast<uint32_t>(noise.antithetic ? out.size[1] / 2 : out.size[1]);
    const bool split = partials.data != nullptr;
    Dot<T> p{noise,
             Grid<T>(t[kX], noise.col_offset),
             PerFeature<float>(t[kSigma]),
             {static_cast<float*>(out.data), out.stride[1], out.stride[2], static_cast<float*>(partials.data),
              out.size[2], split ? partials.size[0] : 1, draws, noise.antithetic != 0},
             static_cast<uint32_t>(launch.numbers[kDrawsOfWarp]),
             0,
             0,
             0,
             0};
    p.groups = static_cast<uint32_t>(ceil_div(draws, p.draws_here));
    const int64_t warps = p.sums.samples * p.sums.ranges * p.groups;
    const int status = by_kind(noise, [&](auto kind) {
        constexpr int kColumns = 4 * kQuadsOf<decltype(kind)::value>;
        p.row_cells = ceil_div(noise.col_offset % kColumns + p.x.cols, kColumns);
        p.cells = p.x.cols == 0 ? 0 : noise.positions * p.row_cells;
        p.cells_of_range = ceil_div(ceil_div(p.cells, kLanes), p.sums.ranges) * kLanes;
        return launch_kernel(noise_dot_kernel<T, decltype(kind)::value>, ceil_div(warps, kThreads / kLanes),
                             dim3(kThreads), 0, launch, p);
    });
    if (status != ULR_OK || !split) return status;
    return launch_kernel(add_ranges_kernel, ceil_div(draws * p.sums.samples, kThreads), dim3(kThreads), 0, launch,
                         p.sums);
}

}  // namespace
}  // namespace ulr

// tensors: out fp32 [1, C, rows / positions], x [1, a, N, b, c], sigma [1, 1, 1 or N], partials fp32 [ranges, draws,
// rows / positions] or absent. numbers: the draws of a warp, at most 32.
extern "C" int ulr_cuda_noise_dot(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kX].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

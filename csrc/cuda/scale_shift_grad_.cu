// scale_shift_grad_: sums over copies and rows of loss_weight * score / sigma, with x and without, and for ln sigma.
//
// A block sums a range of rows for 32 columns: each thread sums its own rows, then the threads are added in order. The
// last block to arrive adds up the ranges, in order, to the buffers: one launch, and results repeat bit for bit.
#include "dispatch.cuh"
#include "grid.cuh"
#include "launch.cuh"
#include "scores.cuh"

namespace ulr {
namespace {

constexpr int kThreads = 256, kColumns = 32, kQuads = kColumns / 4, kSlots = kThreads / kQuads;  // slots: rows at once
constexpr int kKinds = 3;  // of sums: weight, bias, ln sigma

template <typename T>
struct Dot {
    ulr_noise_spec noise;
    Grid<T> x;
    LossWeights loss;
    PerFeature<float> sigma;
    Buffer<T> buffers[kKinds];
    float* partials;            // [ranges, kinds, N]
    unsigned* arrival_counter;  // counts blocks that are done; 0 before and after
    int64_t col_tiles, ranges, rows_of_range;
};

// The sum of a column over the ranges of rows.
template <typename T>
__device__ __forceinline__ float column_sum(const Dot<T>& p, int kind, int64_t col) {
    const float* at = p.partials + kind * p.x.cols + col;
    float sum = 0.0f;
    for (int64_t range = 0; range < p.ranges; ++range) sum += __ldcg(at + range * kKinds * p.x.cols);
    return sum;
}

template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads, 2) scale_shift_grad_kernel(const Dot<T> p) {
    __shared__ NoiseTable table;
    __shared__ float slots[kKinds][kSlots][kColumns + 1];
    __shared__ bool last;
    table.fill(p.noise, threadIdx.x, kThreads);
    __syncthreads();
    const Noise<kind> noise(p.noise, table);
    const int64_t range = blockIdx.x / p.col_tiles;
    const int thread = threadIdx.x;
    const int quad = p.x.along_rows ? thread / kSlots : thread % kQuads;
    const int slot = p.x.along_rows ? thread % kSlots : thread / kQuads;
    const int shift = static_cast<int>(p.noise.col_offset % 4);
    const int64_t tile_col = blockIdx.x % p.col_tiles * kColumns - shift, col = tile_col + 4 * quad;
    const uint32_t noise_quad = static_cast<uint32_t>(p.noise.col_offset / 4 + (col + shift) / 4);
    const bool shared = p.x.copies == 1, by_weight = p.buffers[0].data != nullptr,
               by_log_sigma = p.buffers[2].data != nullptr;
    const int64_t end = col < p.x.cols ? min((range + 1) * p.rows_of_range, p.x.rows) : 0;
    float sums[kKinds][4] = {};
#pragma unroll 1
    for (int64_t row = range * p.rows_of_range + slot; row < end; row += kSlots) {
        const GridQuad<T> x(p.x, static_cast<uint32_t>(row), col);
        float total[4] = {};
        for_draws(noise, p.noise, p.loss, p.loss.walsh_size != 0, static_cast<uint32_t>(row), noise_quad,
                  [&](uint32_t draw, const float (&eps)[4], float first, float second) {
        // The score is odd and eps * score even: for a pair they are multiplied by the difference and by the sum of its
        // weights.
#pragma unroll
                      for (int i = 0; i < 4; ++i) {
                          const float s = score(eps[i], p.noise.dist);
                          total[i] = fmaf(first - second, s, total[i]);
                          if (by_log_sigma) sums[2][i] = fmaf(first + second, fmaf(eps[i], s, -1.0f), sums[2][i]);
                      }
                      if (shared || !by_weight) return;
                      const auto add = [&](int64_t copy, float weight) {
                          float value[4];
                          x.load(value, copy);
#pragma unroll
                          for (int i = 0; i < 4; ++i)
                              sums[0][i] = fmaf(weight * score(eps[i], p.noise.dist), value[i], sums[0][i]);
                      };
                      add(draw, first);
                      if (p.noise.antithetic) add(draw + p.loss.draws, -second);
                  });
        float value[4] = {};
        if (shared && by_weight) x.load(value, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[0][i] = fmaf(total[i], value[i], sums[0][i]);
            sums[1][i] += total[i];
        }
    }
#pragma unroll
    for (int k = 0; k < kKinds; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) slots[k][slot][4 * quad + i] = sums[k][i];
    __syncthreads();
    const int64_t own = tile_col + thread % kColumns;  // the column of a thread of the first three warps
    if (thread < kKinds * kColumns && own >= 0 && own < p.x.cols) {
        const int k = thread / kColumns;
        float sum = 0.0f;
        for (int s = 0; s < kSlots; ++s) sum += slots[k][s][thread % kColumns];
        if (k < 2) sum /= p.sigma[own];
        p.partials[(range * kKinds + k) * p.x.cols + own] = sum;
        __threadfence();
    }
    __syncthreads();
    if (thread == 0) last = atomicAdd(p.arrival_counter, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (thread == 0) *p.arrival_counter = 0;
    for (int k = 0; k < kKinds; ++k) {
        const Buffer<T>& buffer = p.buffers[k];
        if (buffer.data == nullptr) continue;
        if (buffer.col_stride != 0) {
            for (int64_t c = thread; c < p.x.cols; c += kThreads) buffer.add(0, c, column_sum(p, k, c));
            continue;
        }
        // One number for all columns: each thread its own columns, then the threads in order.
        float* all = slots[0][0];
        float sum = 0.0f;
        for (int64_t c = thread; c < p.x.cols; c += kThreads) sum += column_sum(p, k, c);
        all[thread] = sum;
        __syncthreads();
        if (thread == 0) {
            sum = 0.0f;
            for (int t = 0; t < kThreads; ++t) sum += all[t];
            buffer.add(0, 0, sum);
        }
        __syncthreads();
    }
}

enum { kGradWeight, kGradBias, kGradLogSigma, kX, kLossWeight, kSigma, kPartials, kTicket, kWalshSums };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const Grid<T> x(t[kX], noise.col_offset);
    if (x.rows == 0 || x.cols == 0) return ULR_OK;
    if (const int status = launch_walsh_sums(noise, t[kLossWeight], t[kWalshSums], launch)) return status;
    const int64_t ranges = t[kPartials].size[0];
    const int64_t rows_of_range = (x.rows + ranges - 1) / ranges;
    const Dot<T> p{noise,
                   x,
                   LossWeights(noise, t[kLossWeight], t[kWalshSums]),
                   PerFeature<float>(t[kSigma]),
                   {Buffer<T>(t[kGradWeight]), Buffer<T>(t[kGradBias]), Buffer<T>(t[kGradLogSigma])},
                   static_cast<float*>(t[kPartials].data),
                   static_cast<unsigned*>(t[kTicket].data),
                   (noise.col_offset % 4 + x.cols + kColumns - 1) / kColumns,
                   (x.rows + rows_of_range - 1) / rows_of_range,
                   rows_of_range};
    const auto launch_kind = [&](auto kernel) {
        return launch_kernel(kernel, p.col_tiles * p.ranges, dim3(kThreads), 0, launch, p);
    };
    return by_kind(noise, [&](auto kind) { return launch_kind(scale_shift_grad_kernel<T, decltype(kind)::value>); });
}

}  // namespace
}  // namespace ulr

// tensors: grad_* [1, 1, 1 or N] (each may be absent), x [1 or C, a, N, b, c], loss_weight [1, C, rows / positions],
// sigma [1, 1, 1 or N], partials fp32 [ranges of rows, 3, N], arrival_counter: 32 bits that are 0,
// walsh_sums (walsh_sums.cuh) or absent.
extern "C" int ulr_cuda_scale_shift_grad_(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                          const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kX].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

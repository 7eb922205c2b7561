// y[c] = x[c] W^T + b + sigma / sqrt(r) * (x[c] B_c) A_c^T in one launch. A block makes the plain product of a tile,
// which all copies that share x have in common; then, for each copy, the tile's x B and its product with A^T, eight
// ranks at a time.
#pragma once

#include "perturbed.cuh"
#include "tile.cuh"

namespace ulr {

constexpr int kLowRankRows = 128, kLowRankFeatures = 128, kLowRankThreads = 256, kLowRankStages = 4;
constexpr int kLowRankBytes = kLowRankStages * 64 * (kLowRankRows + kLowRankFeatures);
constexpr int kRanks = 8;  // at a time

template <typename T>
struct LowRank {
    ulr_noise_spec by_row, by_col;  // the noise of A^T and of B^T; their keys are derived on the device
    Matrix<T> x, weight;
    int64_t x_copy_stride;  // 0: the copies share x
    PerFeature<T> bias;
    int64_t bias_copy_stride;
    const float* sigma;
    Output<T> y;
    int64_t rank;
    float scale;  // 1 / sqrt(rank)
    uint32_t draws, copies;
    uint32_t copies_of_block;  // all where they share x, else one
    uint32_t row_tiles, feature_tiles;
};

// Eight ranks of one factor, columns first ... first + 127, first a multiple of 4 in the whole noise: one quad a
// thread.
template <Kind kind>
__device__ __forceinline__ void make_factor(float (*factor)[128], const Noise<kind>& noise, int64_t first_rank,
                                            int64_t rank, int64_t first, uint32_t draw) {
    const int j = threadIdx.x / 32, quad = threadIdx.x % 32;
    float eps[4] = {};
    if (first_rank + j < rank && first + 4 * quad >= 0)
        noise.quad(eps, static_cast<uint32_t>(first_rank + j), static_cast<uint32_t>((first >> 2) + quad), draw);
#pragma unroll
    for (int i = 0; i < 4; ++i) factor[j][4 * quad + i] = eps[i];
}

template <typename T, Kind kind>
__global__ void __launch_bounds__(kLowRankThreads, 1) low_rank_kernel(const LowRank<T> p) {
    char* memory = dynamic_shared<char>();
    float* sums = dynamic_shared<float>();
    __shared__ NoiseTable row_table, col_table;
    __shared__ int64_t keys[2];
    __shared__ float factor[kRanks][128], projected[kLowRankRows][kRanks];
    const uint32_t rest = blockIdx.x / p.feature_tiles, copy_block = rest / p.row_tiles;
    // Tiles start at multiples of their width in the whole noise, so that no call of Philox is cut in two.
    const int64_t first_feature =
        int64_t{blockIdx.x % p.feature_tiles} * kLowRankFeatures - p.by_row.col_offset % kLowRankFeatures;
    const int64_t first_row = int64_t{rest % p.row_tiles} * kLowRankRows;
    if (threadIdx.x < 2)
        keys[threadIdx.x] = fold_in(*p.by_row.key, threadIdx.x == 0 ? kRowFactorStream : kColFactorStream);
    __syncthreads();
    ulr_noise_spec by_row = p.by_row, by_col = p.by_col;
    by_row.hadamard = by_col.hadamard = 0;  // a constant
    by_row.key = &keys[0];
    by_col.key = &keys[1];
    row_table.fill(by_row, threadIdx.x, kLowRankThreads);
    col_table.fill(by_col, threadIdx.x, kLowRankThreads);
    {
        float acc[2][8][4] = {};
        const int warp_row = threadIdx.x / 64 * 32, warp_col = threadIdx.x / 32 % 2 * 64;
        Matrix<T> x = p.x;
        x.data += copy_block * p.x_copy_stride;
        tiled_product<kLowRankRows, kLowRankFeatures, kLowRankStages, kLowRankThreads>(
            acc, memory, x, first_row, p.weight, first_feature, warp_row, warp_col);
        store_sums<kLowRankFeatures>(sums, acc, warp_row, warp_col);
    }
    __syncthreads();
    const float scale = *p.sigma * p.scale;
    const int col = threadIdx.x % (kLowRankFeatures / 8) * 8, row = threadIdx.x / (kLowRankFeatures / 8);
    // Copies that share x: a draw at a time, with both copies of an antithetic pair.
    const bool pairs = p.by_row.antithetic && p.copies_of_block > 1;
    const uint32_t draws = p.copies_of_block > 1 ? p.draws : 1;
#pragma unroll 1
    for (uint32_t index = 0; index < draws; ++index) {
        const uint32_t copy = copy_block + index;
        const uint32_t draw = static_cast<uint32_t>(p.by_row.draw + copy % p.draws);
        const float sign = copy < p.draws ? scale : -scale;
        const T* x = p.x.data + copy * p.x_copy_stride;
        float added[8][8] = {};
#pragma unroll 1
        for (int64_t first_rank = 0; first_rank < p.rank; first_rank += kRanks) {
            // x B: two threads a row, every second quad each.
            float dot[kRanks] = {};
            const int x_row = threadIdx.x / 2;
            const int64_t from = p.by_col.col_offset % 128;
#pragma unroll 1
            for (int64_t first = -from; first < p.x.cols; first += 128) {
                const Noise<kind> noise(by_col, col_table);
                make_factor(factor, noise, first_rank, p.rank, p.by_col.col_offset + first, draw);
                __syncthreads();
                if (first_row + x_row < p.x.rows) {
#pragma unroll 1
                    for (int c = threadIdx.x % 2; c < 128; c += 2) {
                        const int64_t k = first + c;
                        if (k < 0 || k >= p.x.cols) continue;
                        const float value = to_float(x[(first_row + x_row) * p.x.row_stride + k * p.x.col_stride]);
#pragma unroll
                        for (int j = 0; j < kRanks; ++j) dot[j] = fmaf(value, factor[j][c], dot[j]);
                    }
                }
                __syncthreads();
            }
#pragma unroll
            for (int j = 0; j < kRanks; ++j) {
                dot[j] += __shfl_xor_sync(0xffffffffu, dot[j], 1);
                if (threadIdx.x % 2 == 0) projected[x_row][j] = dot[j];
            }
            const Noise<kind> noise(by_row, row_table);
            make_factor(factor, noise, first_rank, p.rank, p.by_row.col_offset + first_feature, draw);
            __syncthreads();
#pragma unroll 1
            for (int j = 0; j < kRanks; ++j) {
#pragma unroll
                for (int r = 0; r < 8; ++r)
#pragma unroll
                    for (int i = 0; i < 8; ++i)
                        added[r][i] = fmaf(projected[row + 16 * r][j], factor[j][col + i], added[r][i]);
            }
            __syncthreads();
        }
        float bias[8], minus_bias[8];
        load_bias(bias, p.bias, copy * p.bias_copy_stride, first_feature + col, p.y.cols);
        load_bias(minus_bias, p.bias, (copy + int64_t{p.draws}) * (pairs ? p.bias_copy_stride : 0), first_feature + col,
                  p.y.cols);
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            const OutputOctet<Output<T>> y(p.y, first_row + row + 16 * r, first_feature + col);
            const float* clean = sums + (row + 16 * r) * kLowRankFeatures + col;
            float value[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) value[i] = fmaf(sign, added[r][i], clean[i] + bias[i]);
            y.store(y.of(copy), value, p.y.whole);
            if (!pairs) continue;
#pragma unroll
            for (int i = 0; i < 8; ++i) value[i] = fmaf(-sign, added[r][i], clean[i] + minus_bias[i]);
            y.store(y.of(copy + int64_t{p.draws}), value, p.y.whole);
        }
    }
}

struct LowRankTensors {
    const ulr_tensor &y, &x, &weight, &bias, &sigma;
};

template <typename T>
int run_low_rank(const ulr_noise_spec& noise, const LowRankTensors& t, int64_t rank, const ulr_launch& launch) {
    const uint32_t copies = static_cast<uint32_t>(t.y.size[0]);
    const bool shared = t.x.size[0] == 1;
    ulr_noise_spec by_row = noise, by_col = noise;  // rows of the factors are ranks
    by_row.col_offset = noise.row_offset;
    const LowRank<T> p{
        by_row,
        by_col,
        Matrix<T>(t.x),
        Matrix<T>(t.weight),
        shared ? 0 : t.x.stride[0],
        PerFeature<T>(t.bias),
        t.bias.size[0] == 1 ? 0 : t.bias.stride[0],
        static_cast<const float*>(t.sigma.data),
        Output<T>(t.y, by_row.col_offset),
        rank,
        low_rank_scale(rank),
        noise.antithetic ? copies / 2 : copies,
        copies,
        shared ? copies : 1,
        static_cast<uint32_t>((t.y.size[1] + kLowRankRows - 1) / kLowRankRows),
        static_cast<uint32_t>((by_row.col_offset % kLowRankFeatures + t.y.size[2] + kLowRankFeatures - 1) /
                              kLowRankFeatures)};
    const int64_t blocks = int64_t{shared ? 1 : copies} * p.row_tiles * p.feature_tiles;
    const auto launch_kind = [&](auto kernel) {
        return launch_kernel(kernel, blocks, dim3(kLowRankThreads), kLowRankBytes, launch, p);
    };
    if (kind_of(noise) == Kind::kSigns) return launch_kind(low_rank_kernel<T, Kind::kSigns>);
    return launch_kind(low_rank_kernel<T, Kind::kQuantile>);
}

}  // namespace ulr

// The kernel of perturbed_linear and perturbed_conv2d: y[c] = x[c] W'_c^T + b, W'_c = round(fma(sigma, eps_c, W)). The
// weight's tile is perturbed in shared memory before the product. A layer defines the operands and the output.
#pragma once

#include "perturbed.cuh"
#include "tile.cuh"

namespace ulr {

constexpr int kRows = 128, kSlots = 128;  // of a block's tile; eight warps take 32 x 64 each
constexpr int kThreads = 256;

// A block of `pairs` makes half as many features, once with the noise as it is and once with it negated.
template <bool pairs>
constexpr int kFeatures = pairs ? kSlots / 2 : kSlots;
template <bool pairs>
constexpr int kStages = pairs ? 3 : 4;
// A stage holds a tile of x, one of W', and, for pairs with an x for each copy, the second copies' x.
template <bool pairs>
constexpr int kStageBytes = 64 * (kRows + kSlots + (pairs ? kRows : 0));
template <bool pairs>
constexpr int kSharedBytes = kStages<pairs> * kStageBytes<pairs>;
static_assert(kSharedBytes<false> >= int{sizeof(float)} * kRows * kSlots);  // the sums take the operands' place
static_assert(kSharedBytes<true> >= int{sizeof(float)} * kRows * kSlots);

template <typename Layer>
struct Perturbed {
    using T = typename Layer::T;
    ulr_noise_spec noise;
    typename Layer::X x;
    typename Layer::Weight weight;
    int64_t x_copy_stride;  // 0: the copies share x
    PerFeature<T> bias;
    int64_t bias_copy_stride;
    const float* sigma;
    typename Layer::Mask mask;
    typename Layer::Y y;
    int64_t rank;      // of the noise that the layer makes in the tile; 0: full
    float rank_scale;  // 1 / sqrt(rank)
    int64_t features;  // of a group
    uint32_t draws;
    uint32_t row_tiles, feature_tiles, tiles_of_group;
};

template <typename Layer, Kind kind, bool pairs>
__device__ __forceinline__ void perturbed_product(const Perturbed<Layer>& p) {
    using T = typename Layer::T;
    constexpr int kDepth = 64 / sizeof(T);
    char* memory = dynamic_shared<char>();
    float* sums = dynamic_shared<float>();
    using Source = typename Layer::template Source<kind>;
    __shared__ typename Source::Tables tables;
    Source::fill(tables, p.noise, p.rank, threadIdx.x, kThreads);
    const uint32_t rest = blockIdx.x / p.feature_tiles, draw = rest / p.row_tiles;
    const uint32_t tile = blockIdx.x % p.feature_tiles, group = Layer::kGroups ? tile / p.tiles_of_group : 0u;
    const int64_t first_feature = int64_t{tile - group * p.tiles_of_group} * kFeatures<pairs>;  // of the group's
    const int64_t before = group * p.features;
    const int64_t first_row = int64_t{rest % p.row_tiles} * kRows;
    const int warp_row = threadIdx.x / 64 * 32, warp_col = threadIdx.x / 32 % 2 * 64;
    const bool own_x = pairs && p.x_copy_stride != 0;
    const auto x = Layer::input(p.x, draw * p.x_copy_stride, group);
    const auto minus_x = Layer::input(p.x, (int64_t{draw} + p.draws) * p.x_copy_stride, group);
    const auto weight = Layer::weights(p.weight, before, p.features);
    const int steps = static_cast<int>((p.x.cols + kDepth - 1) / kDepth);
    const auto load = [&](int step) {
        if (step < steps) {
            char* stage = memory + step % kStages<pairs> * kStageBytes<pairs>;
            const int64_t col = int64_t{step} * kDepth;
            load_tile<kRows, 64, kThreads>(stage, x, first_row, col, in_order);
            load_tile<kFeatures<pairs>, 64, kThreads>(stage + 64 * kRows, weight, first_feature, col, column_of_slot);
            if (own_x) load_tile<kRows, 64, kThreads>(stage + 64 * (kRows + kSlots), minus_x, first_row, col, in_order);
        }
        cp_async_commit();  // an empty group too: the wait counts groups
    };
    float acc[2][8][4] = {};
    __syncthreads();  // the tables are filled
    const Source noise(p.noise, p.rank, p.rank_scale, tables);
    const float sigma = *p.sigma;
    // A thread perturbs the same chunk of the same rows of every tile.
    WeightNoise<T, kind> chunks[kFeatures<pairs> * 4 / kThreads];
#pragma unroll 1
    for (int step = 0; step < kStages<pairs> - 1; ++step) load(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<kStages<pairs> - 2>();
        __syncthreads();  // this step's tiles are there for all, and all are done with those that are loaded next
        load(step + kStages<pairs> - 1);
        char* stage = memory + step % kStages<pairs> * kStageBytes<pairs>;
#pragma unroll
        for (int i = 0; i < kFeatures<pairs> * 4 / kThreads; ++i) {
            const int slot = threadIdx.x / 4 + i * (kThreads / 4), chunk = threadIdx.x % 4;
            char* plus = stage + 64 * kRows + chunk_offset<64>(slot, chunk);
            char* minus = pairs ? plus + 64 * kFeatures<pairs> : nullptr;
            const int64_t row = first_feature + column_of_slot(slot);
            const int64_t col = int64_t{step} * kDepth + chunk * (16 / int{sizeof(T)});
            if (row < p.features && col < p.x.cols) {
                float eps[16 / sizeof(T)];
                noise.make(eps, chunks[i], draw, before + row, col);
                perturb_chunk(reinterpret_cast<T*>(plus), reinterpret_cast<T*>(minus), eps, sigma, before + row, col,
                              p.x.cols, p.mask);
            } else if (pairs) {
                *reinterpret_cast<uint4*>(minus) = make_uint4(0u, 0u, 0u, 0u);
            }
        }
        __syncthreads();
        multiply<T>(acc, own_x && warp_col != 0 ? stage + 64 * (kRows + kSlots) : stage, warp_row, stage + 64 * kRows,
                    warp_col);
    }
    cp_async_wait<0>();
    __syncthreads();
    store_sums<kSlots>(sums, acc, warp_row, warp_col);
    __syncthreads();
    const int slot = threadIdx.x % (kSlots / 8) * 8;  // of all octets of this thread
    const int64_t feature = first_feature + slot % kFeatures<pairs>;
    const int64_t copy = draw + (slot < kFeatures<pairs> ? 0 : int64_t{p.draws});
    float bias[8];
    load_bias(bias, p.bias, copy * p.bias_copy_stride + before * p.bias.stride, feature, p.features);
    typename Layer::Y part = p.y;
    part.data += before * part.col_stride;
    part.cols = p.features;
#pragma unroll 1
    for (int row = threadIdx.x / (kSlots / 8); row < kRows; row += kThreads / (kSlots / 8)) {
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = sums[row * kSlots + slot + i] + bias[i];
        const OutputOctet<typename Layer::Y> y(part, first_row + row, feature);
        y.store(y.of(copy), value, part.whole);
    }
}

// The kernels of each kind of noise; a layer's source names them, so that each op has kernels of its own name.
template <bool pairs, typename Layer>
int launch_perturbed(Perturbed<Layer>& p, int64_t copies, int64_t groups, const ulr_launch& launch,
                     void (*quantile)(Perturbed<Layer>), void (*signs)(Perturbed<Layer>)) {
    p.features = p.y.cols / groups;
    p.y.whole = p.y.whole && p.features % 8 == 0;
    p.draws = static_cast<uint32_t>(pairs ? copies / 2 : copies);
    p.row_tiles = static_cast<uint32_t>((p.y.rows + kRows - 1) / kRows);
    p.tiles_of_group = static_cast<uint32_t>((p.features + kFeatures<pairs> - 1) / kFeatures<pairs>);
    p.feature_tiles = static_cast<uint32_t>(groups) * p.tiles_of_group;
    const int64_t blocks = int64_t{p.draws} * p.row_tiles * p.feature_tiles;
    const auto kernel = kind_of(p.noise) == Kind::kSigns ? signs : quantile;
    return launch_kernel(kernel, blocks, dim3(kThreads), kSharedBytes<pairs>, launch, p);
}

}  // namespace ulr

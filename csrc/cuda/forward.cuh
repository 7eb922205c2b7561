// The kernel of noisy_linear and noisy_conv2d: y[c] = x[c] W^T + b + sigma * eps_c. Copies that share x share one
// product; the noise is added before the stores. A layer defines the operands and the output (linear.cuh, conv.cuh).
#pragma once

#include "launch.cuh"
#include "noise.cuh"
#include "tile.cuh"

namespace ulr {

constexpr int kRows = 128;  // of a block's tile; eight warps take 32 x kFeatures / 2 each
constexpr int kThreads = 256, kStages = 4;

template <typename Layer>
struct Forward {
    using T = typename Layer::T;
    static constexpr int kFeatures = Layer::kFeatures;  // of a block's tile
    static constexpr int kOperandBytes = kStages * 64 * (kRows + kFeatures), kSumBytes = 4 * kRows * kFeatures;
    static constexpr int kSharedBytes =
        kOperandBytes > kSumBytes ? kOperandBytes : kSumBytes;  // in one another's place

    ulr_noise_spec noise;
    typename Layer::X x;
    typename Layer::Weight weight;
    int64_t x_copy_stride;
    PerFeature<T> bias;
    PerFeature<float> sigma;
    typename Layer::Y y;
    uint32_t draws;             // the number of copies with noise of their own
    uint32_t draws_of_product;  // all of them where the copies share x, else one
    uint32_t passes;            // two products where an antithetic pair has an x for each copy
    uint32_t row_tiles, feature_tiles;
};

// A block's tile: kRows x kFeatures outputs of the copies that share one product.
struct Tile {
    uint32_t product;
    int64_t first_row, first_feature;

    template <typename Layer>
    __device__ __forceinline__ Tile(const Forward<Layer>& p, uint32_t block) {
        constexpr int kFeatures = Layer::kFeatures;
        const uint32_t feature_tile = block % p.feature_tiles, rest = block / p.feature_tiles;
        product = rest / p.row_tiles;
        first_row = int64_t{rest % p.row_tiles} * kRows;
        // Tiles start at multiples of their width in the whole noise, so that no call of Philox is cut in two.
        first_feature = int64_t{feature_tile} * kFeatures - p.noise.col_offset % kFeatures;
    }
};

template <typename Layer, Kind kind>
__device__ __forceinline__ void noisy_forward(const Forward<Layer>& p) {
    using T = typename Layer::T;
    constexpr int kFeatures = Layer::kFeatures, kWarpFeatures = kFeatures / 2, kOctets = kFeatures / 8;
    constexpr int kRowsOfWarp = 32 / kOctets;
    char* memory = dynamic_shared<char>();
    float* sums = dynamic_shared<float>();
    __shared__ NoiseTable table;
    alignas(16) __shared__ float sigma[kFeatures], bias[kFeatures];
    table.fill(p.noise, threadIdx.x, kThreads);
    const int warp_row = threadIdx.x / 64 * 32, warp_col = threadIdx.x / 32 % 2 * kWarpFeatures;
    const Tile tile(p, blockIdx.x);
    if (threadIdx.x < kFeatures) {
        const int64_t feature = tile.first_feature + threadIdx.x;
        const bool exists = feature >= 0 && feature < p.y.cols;
        sigma[threadIdx.x] = exists ? p.sigma[feature] : 0.0f;
        bias[threadIdx.x] = exists && p.bias.data != nullptr ? p.bias[feature] : 0.0f;
    }
    // The sums of the second pass start from the noise of the first, negated.
#pragma unroll 1
    for (uint32_t pass = 0; pass < p.passes; ++pass) {
        // A choice for each sum rather than a branch around all, so that the sums stay in place throughout the product.
        constexpr int kNis = kWarpFeatures / 8;
        float acc[2][kNis][4];
        load_sums<kFeatures>(acc, sums, warp_row, warp_col);
#pragma unroll
        for (int i = 0; i < 8 * kNis; ++i) {
            float& sum = acc[i / (4 * kNis)][i / 4 % kNis][i % 4];
            sum = pass == 0 ? 0.0f : sum;
        }
        __syncthreads();
        const Tile in(p, opaque(static_cast<int>(blockIdx.x)));  // recomputed: keeping it takes registers
        const int64_t shift = (in.product + int64_t{pass} * p.draws) * p.x_copy_stride;
        const auto x = Layer::input(p.x, shift, in.first_feature);
        const auto& weight = Layer::weights(p.weight, in.first_feature);
        tiled_product<kRows, kFeatures, kStages, kThreads>(acc, memory, x, in.first_row, weight, in.first_feature,
                                                           warp_row, warp_col);
        store_sums<kFeatures>(sums, acc, warp_row, warp_col);
        __syncthreads();
        const Noise<kind> noise(p.noise, table);  // made only now, so that the product has all registers
        const int thread = opaque(static_cast<int>(threadIdx.x));
        const Tile out(p, opaque(static_cast<int>(blockIdx.x)));
        const int col = thread % kOctets * 8;  // of all octets of this thread
#pragma unroll 1
        for (int row = thread / kOctets; row < kRows; row += kThreads / kOctets) {
            if (out.first_row + row / kRowsOfWarp * kRowsOfWarp >= p.y.rows) break;  // for a warp as a whole
            float* const sum = sums + row * kFeatures + col;
            float clean[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) clean[i] = sum[i] + bias[col + i];
            const OutputOctet<typename Layer::Y> y(p.y, out.first_row + row, out.first_feature + col);
            if (pass == 1) {
                y.store(y.of(int64_t{out.product} + p.draws), clean, p.y.whole);
                continue;
            }
            Octet<kind> octet(noise, static_cast<uint32_t>(p.noise.row_offset + out.first_row + row),
                              p.noise.col_offset + out.first_feature + col);
            const uint32_t draw = static_cast<uint32_t>(p.noise.draw + out.product);
            if (p.passes == 2) {
                float eps[8], value[8];
                octet.make(eps, draw, 0, StaticBool<false>{});
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    value[i] = fmaf(sigma[col + i], eps[i], clean[i]);
                    sum[i] = -sigma[col + i] * eps[i];
                }
                y.store(y.of(out.product), value, p.y.whole);
                continue;
            }
            const Noised<kind> noised(clean, sigma + col);
            const auto store_copies = [&](auto whole, auto paired) {
                T *to = y.of(out.product), *to_second = y.of(p.draws);
#pragma unroll(kind == Kind::kSigns ? 4 : 1)  // a word of signs serves four draws
                for (uint32_t copy = 0; copy < p.draws_of_product; ++copy) {
                    float value[8], mirrored[8];
                    noised.make(value, mirrored, paired, octet, draw, copy);
                    y.store(to, value, whole);
                    if (paired) y.store(to_second, mirrored, whole);
                    to += p.y.copy_stride;
                    to_second += p.y.copy_stride;
                }
            };
            // A loop for each case, so that none holds instructions of another.
            if (!p.y.whole) {
                store_copies(StaticBool<false>{}, p.noise.antithetic != 0);
            } else if (p.noise.antithetic) {
                store_copies(StaticBool<true>{}, StaticBool<true>{});
            } else {
                store_copies(StaticBool<true>{}, StaticBool<false>{});
            }
        }
        __syncthreads();
    }
}

// The kernel of each kind of noise; a layer's source names them, so that each op has kernels of its own name.
template <typename Layer>
int launch_forward(Forward<Layer>& p, bool shared, const ulr_launch& launch, void (*quantile)(Forward<Layer>),
                   void (*sobol)(Forward<Layer>), void (*signs)(Forward<Layer>)) {
    constexpr int kFeatures = Layer::kFeatures;
    if (p.y.rows == 0 || p.y.cols == 0) return ULR_OK;
    p.draws_of_product = shared ? p.draws : 1;
    p.passes = p.noise.antithetic && !shared ? 2u : 1u;
    p.row_tiles = static_cast<uint32_t>((p.y.rows + kRows - 1) / kRows);
    p.feature_tiles = static_cast<uint32_t>((p.noise.col_offset % kFeatures + p.y.cols + kFeatures - 1) / kFeatures);
    const int64_t blocks = int64_t{shared ? 1 : p.draws} * p.row_tiles * p.feature_tiles;
    const Kind kind = kind_of(p.noise);
    const auto kernel = kind == Kind::kQuantile ? quantile : kind == Kind::kSobol ? sobol : signs;
    return launch_kernel(kernel, blocks, dim3(kThreads), Forward<Layer>::kSharedBytes, launch, p);
}

}  // namespace ulr

// The kernel of noisy_linear_grad_ for Rademacher noise where each copy has an x of its own and x is of 16 bits.
//
// There S = loss_weight * sign is no sum over copies, so it is never fp32: a word holds the weight twice in 16 bits,
// and one XOR applies the signs of two features. A call of Philox makes the signs of 128 features of a row,
// so a block owns 128 features. Its panel of inputs is narrower than that of gradient.cuh: the noise is so cheap that
// each panel may make it again.
#pragma once

#include "gradient_problem.cuh"
#include "launch.cuh"

namespace ulr {

constexpr int kSignFeatures = 128, kSignPanel = 128, kSignDepth = 16, kSignStages = 4;
constexpr int kSignRowBytes = kSignFeatures * 2, kSignStageBytes = kSignDepth * kSignPanel * 2;

struct SignMemory {
    char stages[kSignStages][kSignStageBytes];
    char score[2][kGradRows * kSignRowBytes];  // two: an antithetic pair makes both from the same signs
};

// A row of S has features 16 apart side by side, because bits 16 apart of a word of signs become a pair's sign bits.
__device__ __forceinline__ int feature_of_slot(int slot) { return (slot & ~31) + slot % 32 / 2 + slot % 2 * 16; }

// A row of S for each side: the signs times the side's loss weight, which `weights` hold twice each.
template <bool paired>
__device__ __forceinline__ void store_signed(char (*score)[kGradRows * kSignRowBytes], int row, const Words& signs,
                                             const uint32_t (&weights)[2]) {
#pragma unroll
    for (int chunk = 0; chunk < kSignRowBytes / 16; ++chunk) {
        const int at = chunk_offset<kSignRowBytes>(row, chunk);
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            pairs[i] = (signs.w[chunk / 4] << (15 - chunk % 4 * 4 - i) & 0x80008000u) ^ weights[0];
        *reinterpret_cast<uint4*>(score[0] + at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        if constexpr (paired) {
            const uint32_t change = weights[0] ^ weights[1];
            *reinterpret_cast<uint4*>(score[1] + at) =
                make_uint4(pairs[0] ^ change, pairs[1] ^ change, pairs[2] ^ change, pairs[3] ^ change);
        }
    }
}

template <typename T, bool orthogonal>
__global__ void __launch_bounds__(kGradThreads, 2) signs_gradient_kernel(const Gradient<Linear<T>> p) {
    auto& memory = *dynamic_shared<SignMemory>();
    __shared__ NoiseTable table;
    __shared__ float largest[kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_feature = warp / 2 * 32, warp_input = warp % 2 * 64;
    table.fill(p.noise, threadIdx.x, kGradThreads);
    const float scale = score_scale(p, largest);
    __syncthreads();
    const Noise<Kind::kSigns> noise(p.noise, table);
    const uint32_t tiles = static_cast<uint32_t>(p.feature_tiles);
    const uint32_t block_of_signs = static_cast<uint32_t>(p.noise.col_offset / kSignFeatures) + blockIdx.x % tiles;
    const int64_t first_input = int64_t{blockIdx.x / tiles} * kSignPanel;
    const bool weighted = p.grad_weight.data != nullptr && first_input + warp_input < p.x.cols;
    const bool biased = p.grad_bias.data != nullptr && first_input == 0 && warp_input == 0;

    float acc[2][8][4] = {}, by_bias[2][4] = {};
    for (int group = 0; group < p.draws; ++group) {
        for (uint32_t tile = 0; int64_t{tile} * kGradRows < p.x.rows; ++tile) {
            const int64_t first_row = int64_t{tile} * kGradRows;
            const int rows = static_cast<int>(min(p.x.rows - first_row, int64_t{kGradRows}));
            const int steps_of_side = (rows + kSignDepth - 1) / kSignDepth,
                      steps = p.noise.antithetic ? 2 * steps_of_side : steps_of_side;
            const auto load = [&](int step) {
                if (step < steps) {
                    const int side = step >= steps_of_side;
                    Matrix<T> x = p.x;
                    x.data += (group + side * p.draws) * p.x_copy_stride;
                    load_tile<kSignDepth, kSignPanel * 2, kGradThreads>(
                        memory.stages[step % kSignStages], x, first_row + (step - side * steps_of_side) * kSignDepth,
                        first_input, in_order);
                }
                cp_async_commit();  // an empty group too: the wait counts groups
            };
#pragma unroll 1
            for (int step = 0; step < kSignStages - 1; ++step) load(step);

            const auto make_scores = [&](auto paired) {
#pragma unroll 1
                for (int row = threadIdx.x; row < steps_of_side * kSignDepth; row += kGradThreads) {
                    const uint32_t sample =
                        static_cast<uint32_t>(first_row + row) / static_cast<uint32_t>(p.noise.positions);
                    const float* loss = p.loss_weight + group * p.loss_copy_stride + sample * p.loss_sample_stride;
                    uint32_t weights[2] = {};  // rows past the last are zero, with any sign
                    if (row < rows) weights[0] = twice<T>(loss[0] * scale);
                    if (paired && row < rows) weights[1] = twice<T>(loss[p.draws * p.loss_copy_stride] * -scale);
                    const Words signs =
                        noise.sign_words(static_cast<uint32_t>(p.noise.row_offset + first_row + row), block_of_signs,
                                         static_cast<uint32_t>(p.noise.draw + group), StaticBool<orthogonal>{});
                    store_signed<paired>(memory.score, row, signs, weights);
                }
            };
            if (p.noise.antithetic) {
                make_scores(StaticBool<true>{});
            } else {
                make_scores(StaticBool<false>{});
            }

#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
                cp_async_wait<kSignStages - 2>();
                __syncthreads();  // this step's rows and S are visible to all; the next loads may overwrite the last
                load(step + kSignStages - 1);
                const int side = step >= steps_of_side, row = (step - side * steps_of_side) * kSignDepth;
                const char* score = memory.score[side];
                if (weighted)
                    multiply_transposed<kSignRowBytes, kSignPanel * 2, kSignDepth>(
                        acc, score, row, warp_feature, memory.stages[step % kSignStages], warp_input, T{});
                if (biased) add_column_sums<kSignRowBytes>(by_bias, score, row, warp_feature, T{});
            }
            cp_async_wait<0>();
            __syncthreads();
        }
    }

    const int64_t first_feature = int64_t{block_of_signs} * kSignFeatures - p.noise.col_offset;
#pragma unroll
    for (int row = 0; row < 4; ++row) {
        const int64_t feature = first_feature + feature_of_slot(warp_feature + 8 * row + lane / 4);
        if (feature < 0 || feature >= p.features) continue;
        const float factor = 1.0f / (p.sigma[feature] * scale);
        if (biased && lane % 4 == 0) p.grad_bias.add(0, feature, by_bias[row / 2][2 * (row % 2)] * factor);
        if (!weighted) continue;
#pragma unroll
        for (int pair = 0; pair < 16; ++pair) {
            const int64_t input = first_input + warp_input + pair / 2 * 8 + lane % 4 * 2 + pair % 2;
            if (input < p.x.cols)
                p.grad_weight.add(feature, input, acc[row / 2][pair / 2][2 * (row % 2) + pair % 2] * factor);
        }
    }
}

template <typename T>
bool takes_packed_signs(const Gradient<Linear<T>>& p) {
    return kind_of(p.noise) == Kind::kSigns && !p.shared && p.grad_log_sigma.data == nullptr;
}

template <typename T>
int launch_signs_gradient(Gradient<Linear<T>> p, const ulr_launch& launch) {
    if (p.x.rows == 0 || p.features == 0) return ULR_OK;
    p.feature_tiles = (p.noise.col_offset % kSignFeatures + p.features + kSignFeatures - 1) / kSignFeatures;
    p.panels = p.grad_weight.data == nullptr ? 1 : max((p.x.cols + kSignPanel - 1) / kSignPanel, int64_t{1});
    const auto kernel = p.noise.hadamard ? signs_gradient_kernel<T, true> : signs_gradient_kernel<T, false>;
    return launch_kernel(kernel, p.feature_tiles * p.panels, dim3(kGradThreads), sizeof(SignMemory), launch, p);
}

}  // namespace ulr

// The arguments of a gradient's block: the problem, the block's part of it, and the layout of shared memory.
#pragma once

#include "linear.cuh"
#include "noise.cuh"

namespace ulr {

constexpr int kGradRows = 128, kGradFeatures = 32, kPanel = 512, kGradThreads = 256, kWarps = kGradThreads / 32;

template <typename Layer>
struct Gradient {
    using T = typename Layer::T;
    ulr_noise_spec noise;
    typename Layer::X x;
    typename Layer::Weight weight;  // weight, bias, y: recompute's
    int64_t x_copy_stride;
    PerFeature<T> bias;
    typename Layer::Y y;
    PerFeature<float> sigma;
    const float* loss_weight;  // [copies, rows / positions]
    int64_t loss_copy_stride, loss_sample_stride, loss_samples;
    Buffer<T> grad_weight, grad_bias, grad_log_sigma;
    float* partials;  // one a feature block, where grad_log_sigma is one number for several of them
    int64_t features;
    int copies, draws;  // draws: the number of copies with noise of their own
    // Orthogonal draws whose copies share x: a block of so many draws counts as one draw and copy, and loss_weight
    // holds the transforms [draws, samples * walsh_size] of the weights (walsh_sums.cuh). 0: there are none.
    int walsh_size;
    bool shared;  // one x for all copies
    int64_t feature_tiles, panels;
};

// Tiles of features start at multiples of their width in the whole noise; the first one may begin before the features.
template <typename Layer>
__device__ __forceinline__ int64_t first_feature_of(const Gradient<Layer>& p, int64_t feature_tile) {
    return feature_tile * kGradFeatures - p.noise.col_offset % kGradFeatures;
}

// The tensors that all ops with gradients have: grad_weight, grad_bias and grad_log_sigma, which may be absent; x;
// loss_weight [1, C, samples]; sigma; partials, fp32; walsh_sums, of walsh_sums.cuh or absent.
struct GradientTensors {
    const ulr_tensor &grad_weight, &grad_bias, &grad_log_sigma, &x, &loss_weight, &sigma, &partials, &walsh_sums;
};

template <typename Layer>
Gradient<Layer> gradient_of(const ulr_noise_spec& noise, const GradientTensors& t, const typename Layer::X& x,
                            const typename Layer::Weight& weight, const ulr_tensor& bias, const typename Layer::Y& y,
                            int64_t features) {
    using T = typename Layer::T;
    const int copies = static_cast<int>(t.loss_weight.size[1]);
    const bool shared = t.x.size[0] == 1 || t.x.stride[0] == 0;
    const bool weighted = t.grad_weight.data != nullptr && x.cols > 0;
    Gradient<Layer> result{noise,
                           x,
                           weight,
                           shared ? 0 : t.x.stride[0],
                           PerFeature<T>(bias),
                           y,
                           PerFeature<float>(t.sigma),
                           static_cast<const float*>(t.loss_weight.data),
                           t.loss_weight.stride[1],
                           t.loss_weight.stride[2],
                           t.loss_weight.size[2],
                           Buffer<T>(t.grad_weight),
                           Buffer<T>(t.grad_bias),
                           Buffer<T>(t.grad_log_sigma),
                           static_cast<float*>(t.partials.data),
                           features,
                           copies,
                           noise.antithetic ? copies / 2 : copies,
                           0,
                           shared,
                           (noise.col_offset % kGradFeatures + features + kGradFeatures - 1) / kGradFeatures,
                           weighted ? (x.cols + kPanel - 1) / kPanel : 1};
    if (const ulr_tensor& sums = t.walsh_sums; sums.data != nullptr) {
        result.walsh_size = static_cast<int>(sums.size[2]);
        result.noise.draw -= noise.draw % result.walsh_size;
        result.loss_weight = static_cast<const float*>(sums.data);
        result.loss_samples = result.loss_copy_stride = sums.size[1] * sums.size[2];
        result.loss_sample_stride = 1;
        result.copies = result.draws = static_cast<int>(sums.size[0]);
    }
    return result;
}

template <typename T, bool recompute>
struct GradientMemory {
    static constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;  // rows of x in a stage
    static constexpr int kStages = recompute && sizeof(T) == 4 ? 2 : 3;
    static constexpr int kStageBytes = kDepth * kPanel * sizeof(T);
    static constexpr int kScoreBytes = kGradFeatures * sizeof(T);  // a row of S
    // Two of each: an antithetic pair with an x for each copy makes both from the same noise.
    struct alignas(16) Layout {
        char stages[kStages][kStageBytes];
        char score[2][kGradRows * kScoreBytes];
    };
    using Clean = float[kGradRows * kGradFeatures];  // recompute: after the layout, two of these
    static constexpr int kBytes = sizeof(Layout) + (recompute ? 2 * sizeof(Clean) : 0);
    static_assert(kStages * kStageBytes >= kStages * 64 * (kGradRows + kGradFeatures));  // the clean product's tiles
};

// fp16 is exact enough for magnitudes of 2^-14 ... 2^15, but loss weights have any: a power of two scales S into that
// range.
// All threads together.
template <typename Layer>
__device__ __forceinline__ float score_scale(const Gradient<Layer>& p, float* scratch) {
    using T = typename Layer::T;
    if constexpr (!std::is_same_v<T, __half>) {
        return 1.0f;
    } else {
        float largest = 0.0f;
        for (int64_t i = threadIdx.x; i < p.copies * p.loss_samples; i += kGradThreads)
            largest = fmaxf(largest, fabsf(p.loss_weight[i / p.loss_samples * p.loss_copy_stride +
                                                         i % p.loss_samples * p.loss_sample_stride]));
        for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = largest;
        __syncthreads();
        for (int warp = 0; warp < kWarps; ++warp) largest = fmaxf(largest, scratch[warp]);
        __syncthreads();
        constexpr float kLargestScore = 16.0f;  // of any distribution of the contract
        const float bound = largest * kLargestScore * static_cast<float>(p.shared ? p.copies : 1);
        if (!(bound > 1e-30f && bound < 1e30f)) return 1.0f;
        int exponent_of_bound;
        frexpf(bound, &exponent_of_bound);
        return ldexpf(1.0f, 15 - exponent_of_bound);
    }
}

// A block's part of a problem: some features and, for a gradient, a panel of inputs; over some blocks of rows, counted
// through the copies that have an x of their own.
struct GradientPart {
    int64_t feature_tile;
    int panel;
    int unit_rows;  // of a block of rows: a multiple of 16, at most kGradRows
    int64_t first_unit, last_unit;
    int64_t sums = 0;  // offset of this part's own sums from the problem's buffers, in floats
};

template <typename Layer>
__host__ __device__ inline int64_t gradient_units(const Gradient<Layer>& p, int unit_rows) {
    return (p.shared ? 1 : p.draws) * ((p.x.rows + unit_rows - 1) / unit_rows);
}

}  // namespace ulr

// The loss of a row of outputs by a warp, and the weights of a sample's copies.
#pragma once

#include "element.cuh"
#include "ulr/mlp.h"

namespace ulr {

enum class Baseline { kMean, kClean, kNone };  // in the order of ulr_kernels/baselines.py

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// The targets of rows: a class each, or a value for each output.
template <typename T>
struct Target {
    const void* data;
    int dtype;
    int64_t row_stride, col_stride;

    // A vector's axis is the last one.
    explicit Target(const ulr_tensor& t)
        : data(t.data),
          dtype(t.dtype),
          row_stride(t.dtype == ULR_I64 ? t.stride[2] : t.stride[1]),
          col_stride(t.stride[2]) {}

    __device__ __forceinline__ int64_t of(int64_t row) const {
        return static_cast<const int64_t*>(data)[row * row_stride];
    }
    __device__ __forceinline__ float value(int64_t row, int64_t col) const {
        const int64_t at = row * row_stride + col * col_stride;
        return dtype == ULR_F32 ? static_cast<const float*>(data)[at] : to_float(static_cast<const T*>(data)[at]);
    }
};

// All lanes of a warp together, all get the loss. A class that does not exist gives NaN. `smoothing`: the share of a
// target that is spread over all outputs.
template <typename T, typename Logit>
__device__ __forceinline__ float row_loss(Loss loss, float smoothing, const Logit* logits, int features,
                                          const Target<T>& target, int64_t row) {
    const int lane = threadIdx.x % 32;
    if (loss == Loss::kSquared) {
        float sum = 0.0f;
        for (int i = lane; i < features; i += 32) {
            const float difference = to_float(logits[i]) - target.value(row, i);
            sum = fmaf(difference, difference, sum);
        }
        return warp_sum(sum) / static_cast<float>(features);
    }
    const int64_t wanted = target.of(row);
    if (wanted < 0 || wanted >= features) return loss == Loss::kCrossEntropy && wanted == kIgnored ? 0.0f : NAN;
    float largest = -INFINITY;
    int where = features;
    for (int i = lane; i < features; i += 32) {
        const float value = to_float(logits[i]);
        if (value > largest) largest = value, where = i;
    }
    for (int step = 16; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, largest, step);
        const int there = __shfl_xor_sync(0xffffffffu, where, step);
        if (other > largest || (other == largest && there < where)) largest = other, where = there;
    }
    if (loss == Loss::kZeroOne) return where == wanted ? 0.0f : 1.0f;
    float sum = 0.0f, all = 0.0f;
    for (int i = lane; i < features; i += 32) {
        const float below = to_float(logits[i]) - largest;
        sum += expf(below);
        all += below;
    }
    const float own = to_float(logits[wanted]) - largest;
    const float expected =
        smoothing > 0.0f ? (1.0f - smoothing) * own + smoothing / static_cast<float>(features) * warp_sum(all) : own;
    return logf(warp_sum(sum)) - expected;
}

// (L - b) / count for each copy of one sample, by the warps whose turn it is; baselines.py explains the formula. Copies
// lie `stride` apart; all threads of the block together, after a barrier that follows the losses.
__device__ inline void weigh_losses(const float* losses, int64_t stride, float clean, float* weights,
                                    int64_t weight_stride, int copies, bool antithetic, Baseline baseline,
                                    float count) {
    const int groups = antithetic ? copies / 2 : copies;
    const auto group_mean = [&](int group) {
        const float first = losses[group * stride];
        return antithetic ? 0.5f * (first + losses[(groups + group) * stride]) : first;
    };
    const bool by_others = baseline == Baseline::kMean && groups > 1;
    float mean = 0.0f;
    if (by_others) {
        for (int group = threadIdx.x % 32; group < groups; group += 32) mean += group_mean(group);
        mean = warp_sum(mean) / static_cast<float>(groups);
    }
    const float stretch = static_cast<float>(groups) / static_cast<float>(groups - 1);
    for (int copy = threadIdx.x; copy < copies; copy += blockDim.x) {
        const float loss = losses[copy * stride];
        float weight = baseline == Baseline::kClean ? loss - clean : loss;
        if (by_others) {
            const float own = group_mean(copy % groups);
            weight = loss - own + (own - mean) * stretch;
        }
        weights[copy * weight_stride] = weight / count;
    }
}

}  // namespace ulr

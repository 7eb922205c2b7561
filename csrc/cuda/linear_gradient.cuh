// The launch of noisy_linear_grad_ and noisy_linear_recompute_ (gradient.cuh): a block for each part of one problem,
// and the sum of the blocks' parts of grad_log_sigma.
#pragma once

#include "dispatch.cuh"
#include "gradient.cuh"
#include "launch.cuh"
#include "walsh_sums.cuh"

namespace ulr {

// One problem, with a block for each of its parts.
template <typename T, Kind kind, bool recompute>
__global__ void __launch_bounds__(kGradThreads, 1) gradient_kernel(const Gradient<Linear<T>> p) {
    const GradientPart part{blockIdx.x % p.feature_tiles,
                            recompute ? 0 : static_cast<int>(blockIdx.x / p.feature_tiles), kGradRows, 0,
                            gradient_units(p, kGradRows)};
    gradient_block<Linear<T>, kind, recompute>(p, part);
}

// Adds up grad_log_sigma as one number: the sum over blocks of features, in their order.
template <typename T>
struct Partials {
    const float* values;
    int64_t count;
    Buffer<T> to;
};

template <typename T>
__global__ void add_partials(const Partials<T> p) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < p.count; i += 32) sum += p.values[i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x == 0) p.to.add(0, 0, sum);
}

// Whether an argument was given; an empty tensor is one too.
inline bool given(const ulr_tensor& t) { return t.data != nullptr || t.size[0] * t.size[1] * t.size[2] == 0; }

template <typename T, bool recompute>
int launch_gradient(Gradient<Linear<T>>& p, const ulr_launch& launch) {
    if (p.x.rows == 0 || p.features == 0) return ULR_OK;
    const int64_t blocks = p.feature_tiles * (recompute ? 1 : p.panels);
    const auto launch_kind = [&](auto kernel) {
        return launch_kernel(kernel, blocks, dim3(kGradThreads), GradientMemory<T, recompute>::kBytes, launch, p);
    };
    const int status =
        by_kind(p.noise, [&](auto kind) { return launch_kind(gradient_kernel<T, decltype(kind)::value, recompute>); });
    if (status != ULR_OK || p.grad_log_sigma.data == nullptr || p.grad_log_sigma.col_stride != 0 ||
        p.feature_tiles == 1)
        return status;
    return launch_kernel(add_partials<T>, 1, dim3(32), 0, launch,
                         Partials<T>{p.partials, p.feature_tiles, p.grad_log_sigma});
}

// The tensors of a linear layer: grad_* are [1, N, K], [1, 1, N] and [1, 1, 1 or N]; x is [1 or C, R, K], loss_weight
// [1, C, R / positions], sigma [1, 1, 1 or N]; partials, one for each block of features, are needed only where
// grad_log_sigma is one number.
template <typename T>
Gradient<Linear<T>> linear_gradient(const ulr_noise_spec& noise, const GradientTensors& t, const ulr_tensor& weight,
                                    const ulr_tensor& bias, const ulr_tensor& y) {
    const int64_t features = given(t.grad_weight) ? t.grad_weight.size[1] : t.grad_bias.size[2];
    return gradient_of<Linear<T>>(noise, t, Matrix<T>(t.x), Matrix<T>(weight), bias, Output<T>(y, noise.col_offset),
                                  features);
}

}  // namespace ulr

// The kernel of noisy_conv2d_grad_ and noisy_conv2d_recompute_: one cooperative launch. A convolution has many rows and
// few weights, so the rows are split among blocks: each adds its part to the sums of its split, as a linear layer's
// block does (gradient.cuh); then the splits are added to the buffers in their order.
#pragma once

#include "conv.cuh"
#include "dispatch.cuh"
#include "gradient.cuh"
#include "launch.cuh"
#include "walsh_sums.cuh"

namespace ulr {

template <typename T>
struct ConvGradient {
    Gradient<Convolution<T>> problem;  // its buffers are the first split's
    Taps<T> grad_weight;               // where a weight lies; its data is in `weights`
    Buffer<T> weights, grad_bias, grad_log_sigma;
    float* partials;  // [splits][features * (inner + 2)]: each split's weights, biases, ln sigmas
    int64_t inner;
    int splits;
    bool scalar_log_sigma;
};

template <typename T>
__device__ __forceinline__ void add_splits(const ConvGradient<T>& p) {
    const int64_t features = p.problem.features, weights = features * p.inner, size = weights + 2 * features;
    const auto sum = [&](int64_t at) {
        float total = 0.0f;
        for (int split = 0; split < p.splits; ++split) total += p.partials[split * size + at];
        return total;
    };
    for (int64_t o = blockIdx.x; o < features; o += gridDim.x) {
        const int64_t tile = (o + p.problem.noise.col_offset % kGradFeatures) / kGradFeatures;
        const Taps<T>& taps = p.grad_weight;
        const int first_channel = taps.window.first_channel(first_feature_of(p.problem, tile));
        for (int64_t k = threadIdx.x; p.weights.data != nullptr && k < p.inner; k += kGradThreads) {
            int place;
            if (taps.meets(o, first_channel, Tap(taps.window, static_cast<uint32_t>(k)), place))
                p.weights.add(0, place, sum(o * p.inner + k));
        }
        if (threadIdx.x != 0) continue;
        if (p.grad_bias.data != nullptr) p.grad_bias.add(0, o, sum(weights + o));
        if (p.grad_log_sigma.data != nullptr && !p.scalar_log_sigma)
            p.grad_log_sigma.add(0, o, sum(weights + features + o));
    }
    if (!p.scalar_log_sigma || blockIdx.x != 0 || threadIdx.x >= 32) return;
    float total = 0.0f;
    for (int64_t o = threadIdx.x; o < features; o += 32) total += sum(weights + features + o);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    if (threadIdx.x == 0) p.grad_log_sigma.add(0, 0, total);
}

template <typename T, Kind kind, bool recompute>
__global__ void __launch_bounds__(kGradThreads, 1) conv_gradient_kernel(const ConvGradient<T> p) {
    const int64_t features = p.problem.features, size = features * (p.inner + 2);
    for (int64_t i = int64_t{blockIdx.x} * kGradThreads + threadIdx.x; i < p.splits * size;
         i += int64_t{gridDim.x} * kGradThreads)
        p.partials[i] = 0.0f;
    grid_sync();
    const int64_t units = gradient_units(p.problem, kGradRows), tiles_of_features = p.problem.feature_tiles;
    const int64_t tiles = tiles_of_features * (recompute ? 1 : p.problem.panels);
    for (int64_t item = blockIdx.x; item < tiles * p.splits; item += gridDim.x) {
        const int64_t split = item / tiles, tile = item % tiles;
        const GradientPart part{tile % tiles_of_features,
                                static_cast<int>(tile / tiles_of_features),
                                kGradRows,
                                units * split / p.splits,
                                units * (split + 1) / p.splits,
                                split * size};
        gradient_block<Convolution<T>, kind, recompute>(p.problem, part);
        __syncthreads();
    }
    grid_sync();
    add_splits(p);
}

// grad_weight is as a weight, grad_bias [O], grad_log_sigma [1 or O]; x [1 or C, B, I, H, W]; partials as above.
// weight, bias and y are recompute's; else absent.
template <typename T, bool recompute>
int launch_conv_gradient(const ulr_noise_spec& noise, const GradientTensors& t, const ulr_tensor& weight,
                         const ulr_tensor& bias, const ulr_tensor& y, const int64_t* size, int64_t features,
                         const ulr_launch& launch) {
    const int64_t inputs = t.x.size[2];
    const Window window(launch.numbers, inputs, features);
    const int64_t places[] = {0, features * window.inner(), features * (window.inner() + 1)};
    const auto own = [&](const ulr_tensor& buffer, int which) {
        Buffer<T> sums(buffer);
        sums.data = buffer.data == nullptr ? nullptr : static_cast<float*>(t.partials.data) + places[which];
        sums.wide = true;
        sums.row_stride = window.inner();
        sums.col_stride = 1;
        return sums;
    };
    Buffer<T> weights(t.grad_weight);  // as one line of elements, which `grad_weight` locates
    weights.row_stride = 0, weights.col_stride = 1;
    Gradient<Convolution<T>> problem = gradient_of<Convolution<T>>(noise, t, Patches<T>(t.x, window, size[0], size[1]),
                                                                   Taps<T>(weight, window, inputs, features), bias,
                                                                   Images<T>(y, noise.col_offset), features);
    problem.grad_weight = own(t.grad_weight, 0);
    problem.grad_bias = own(t.grad_bias, 1);
    problem.grad_log_sigma = own(t.grad_log_sigma, 2);
    const ConvGradient<T> p{problem,
                            Taps<T>(t.grad_weight, window, inputs, features),
                            weights,
                            Buffer<T>(t.grad_bias),
                            Buffer<T>(t.grad_log_sigma),
                            static_cast<float*>(t.partials.data),
                            window.inner(),
                            static_cast<int>(launch.numbers[kSplits]),
                            t.grad_log_sigma.data != nullptr && t.grad_log_sigma.size[2] == 1};
    if (p.problem.x.rows == 0) return ULR_OK;
    if (!fits(p.problem.x.rows, t.x, t.grad_weight) || !fits(p.problem.x.rows, t.x, weight)) return ULR_BAD_ARGUMENT;
    const auto launch_kind = [&](auto kernel) {
        return launch_together(kernel, dim3(kGradThreads), GradientMemory<T, recompute>::kBytes, launch, p);
    };
    return by_kind(noise,
                   [&](auto kind) { return launch_kind(conv_gradient_kernel<T, decltype(kind)::value, recompute>); });
}

}  // namespace ulr

// The gradient buffers of a noisy convolution (conv_gradient.cuh).
#include "conv_gradient.cuh"

namespace {

enum { kGradWeight, kGradBias, kGradLogSigma, kX, kLossWeight, kSigma, kPartials, kWalshSums };
// The op's own numbers, after those of conv.cuh.
enum { kHeight = ulr::kSplits + 1, kWidth, kFeatures };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const ulr_tensor absent{};
    if (const int status = ulr::launch_walsh_sums(noise, t[kLossWeight], t[kWalshSums], launch)) return status;
    return ulr::launch_conv_gradient<T, false>(
        noise,
        {t[kGradWeight], t[kGradBias], t[kGradLogSigma], t[kX], t[kLossWeight], t[kSigma], t[kPartials], t[kWalshSums]},
        absent, absent, absent, launch.numbers + kHeight, launch.numbers[kFeatures], launch);
}

}  // namespace

extern "C" int ulr_cuda_noisy_conv2d_grad_(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                           const ulr_launch* launch) {
    return ulr::by_dtype(tensors[kX].dtype,
                         [&](auto type) { return run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

// The output of a noisy convolution and its gradient buffers from one evaluation of the noise (conv_gradient.cuh).
#include "conv_gradient.cuh"

namespace {

enum { kY, kGradWeight, kGradBias, kGradLogSigma, kX, kWeight, kBias, kLossWeight, kSigma, kPartials };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const ulr_tensor absent{};
    return ulr::launch_conv_gradient<T, true>(
        noise, {t[kGradWeight], t[kGradBias], t[kGradLogSigma], t[kX], t[kLossWeight], t[kSigma], t[kPartials], absent},
        t[kWeight], t[kBias], t[kY], t[kY].size + 3, t[kY].size[2], launch);
}

}  // namespace

extern "C" int ulr_cuda_noisy_conv2d_recompute_(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                                const ulr_launch* launch) {
    return ulr::by_dtype(tensors[kX].dtype,
                         [&](auto type) { return run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

// The output of a noisy linear layer and its gradient buffers from one evaluation of the noise (gradient.cuh).
#include "linear_gradient.cuh"

namespace {

enum { kY, kGradWeight, kGradBias, kGradLogSigma, kX, kWeight, kBias, kLossWeight, kSigma, kPartials };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const ulr_tensor absent{};
    auto p = ulr::linear_gradient<T>(
        noise, {t[kGradWeight], t[kGradBias], t[kGradLogSigma], t[kX], t[kLossWeight], t[kSigma], t[kPartials], absent},
        t[kWeight], t[kBias], t[kY]);
    return ulr::launch_gradient<T, true>(p, launch);
}

}  // namespace

extern "C" int ulr_cuda_noisy_linear_recompute_(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                                const ulr_launch* launch) {
    return ulr::by_dtype(tensors[kX].dtype,
                         [&](auto type) { return run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

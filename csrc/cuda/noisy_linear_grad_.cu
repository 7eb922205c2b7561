// The gradient buffers of a noisy linear layer (gradient.cuh; gradient_signs.cuh).
#include "gradient_signs.cuh"
#include "linear_gradient.cuh"

namespace {

enum { kGradWeight, kGradBias, kGradLogSigma, kX, kLossWeight, kSigma, kPartials, kWalshSums };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const ulr_tensor absent{};
    if (const int status = ulr::launch_walsh_sums(noise, t[kLossWeight], t[kWalshSums], launch)) return status;
    auto p = ulr::linear_gradient<T>(
        noise,
        {t[kGradWeight], t[kGradBias], t[kGradLogSigma], t[kX], t[kLossWeight], t[kSigma], t[kPartials], t[kWalshSums]},
        absent, absent, absent);
    if constexpr (sizeof(T) == 2)
        if (ulr::takes_packed_signs(p)) return ulr::launch_signs_gradient(p, launch);
    return ulr::launch_gradient<T, false>(p, launch);
}

}  // namespace

extern "C" int ulr_cuda_noisy_linear_grad_(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                           const ulr_launch* launch) {
    return ulr::by_dtype(tensors[kX].dtype,
                         [&](auto type) { return run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

// noisy_linear (forward.cuh).
#include "dispatch.cuh"
#include "forward.cuh"
#include "linear.cuh"

namespace ulr {
namespace {

template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads, 2) noisy_linear_kernel(const Forward<Linear<T>> p) {
    noisy_forward<Linear<T>, kind>(p);
}

enum { kY, kX, kWeight, kBias, kSigma };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const uint32_t copies = static_cast<uint32_t>(t[kY].size[0]);
    const bool shared = t[kX].size[0] == 1 || t[kX].stride[0] == 0;
    Forward<Linear<T>> p{noise,
                         Matrix<T>(t[kX]),
                         Matrix<T>(t[kWeight]),
                         shared ? 0 : t[kX].stride[0],
                         PerFeature<T>(t[kBias]),
                         PerFeature<float>(t[kSigma]),
                         Output<T>(t[kY], noise.col_offset),
                         noise.antithetic ? copies / 2 : copies,
                         0,
                         0,
                         0,
                         0};
    return launch_forward(p, shared, launch, noisy_linear_kernel<T, Kind::kQuantile>,
                          noisy_linear_kernel<T, Kind::kSobol>, noisy_linear_kernel<T, Kind::kSigns>);
}

}  // namespace
}  // namespace ulr

// tensors: y [C, R, N], x [1 or C, R, K], weight [1, N, K], bias [1, 1, N] or absent, sigma [1, 1, 1 or N].
extern "C" int ulr_cuda_noisy_linear(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kX].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

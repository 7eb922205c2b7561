// noisy_conv2d: the forward of forward.cuh with the operands of conv.cuh.
#include "conv.cuh"
#include "dispatch.cuh"
#include "forward.cuh"

namespace ulr {
namespace {

// Two blocks a processor leave too few registers for Sobol's points.
template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads, kind == Kind::kSobol ? 1 : 2)
    noisy_conv2d_kernel(const Forward<Convolution<T>> p) {
    noisy_forward<Convolution<T>, kind>(p);
}

// tensors: y [C, B, O, H', W'], x [1 or C, B, I, H, W], weight, bias [O] or absent, sigma [1 or O].
enum { kY, kX, kWeight, kBias, kSigma };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const ulr_tensor &y = t[kY], &x = t[kX];
    const uint32_t copies = static_cast<uint32_t>(y.size[0]);
    const bool shared = x.size[0] == 1 || x.stride[0] == 0;
    const Window window(launch.numbers, x.size[2], y.size[2]);
    Forward<Convolution<T>> p{noise,
                              Patches<T>(x, window, y.size[3], y.size[4]),
                              Taps<T>(t[kWeight], window, x.size[2], y.size[2]),
                              shared ? 0 : x.stride[0],
                              PerFeature<T>(t[kBias]),
                              PerFeature<float>(t[kSigma]),
                              Images<T>(y, noise.col_offset),
                              noise.antithetic ? copies / 2 : copies,
                              0,
                              0,
                              0,
                              0};
    if (!fits(p.y.rows, x, t[kWeight])) return ULR_BAD_ARGUMENT;
    return launch_forward(p, shared, launch, noisy_conv2d_kernel<T, Kind::kQuantile>,
                          noisy_conv2d_kernel<T, Kind::kSobol>, noisy_conv2d_kernel<T, Kind::kSigns>);
}

}  // namespace
}  // namespace ulr

extern "C" int ulr_cuda_noisy_conv2d(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kX].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

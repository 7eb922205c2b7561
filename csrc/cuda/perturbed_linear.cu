// perturbed_linear: the product of perturbed_product.cuh, or, for low rank, the kernel of low_rank.cuh.
#include "dispatch.cuh"
#include "low_rank.cuh"
#include "perturbed_product.cuh"

namespace ulr {
namespace {

template <typename Element>
struct PerturbedLinear {
    using T = Element;
    using X = Matrix<T>;
    using Weight = Matrix<T>;
    using Y = Output<T>;
    using Mask = ulr::Mask;
    template <Kind kind>
    using Source = FullRank<kind>;
    static constexpr bool kGroups = false;

    __device__ __forceinline__ static X input(X x, int64_t shift, uint32_t) {
        x.data += shift;
        return x;
    }
    __device__ __forceinline__ static const Weight& weights(const Weight& weight, int64_t, int64_t) { return weight; }
};

template <typename T, Kind kind, bool pairs>
__global__ void __launch_bounds__(kThreads, 1) perturbed_linear_kernel(const Perturbed<PerturbedLinear<T>> p) {
    perturbed_product<PerturbedLinear<T>, kind, pairs>(p);
}

enum { kY, kX, kWeight, kBias, kSigma, kMask };
enum { kNoiseRank };

template <typename T, bool pairs>
int run_full(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    Perturbed<PerturbedLinear<T>> p{};
    p.noise = noise;
    p.x = Matrix<T>(t[kX]);
    p.weight = Matrix<T>(t[kWeight]);
    p.x_copy_stride = t[kX].size[0] == 1 ? 0 : t[kX].stride[0];
    p.bias = PerFeature<T>(t[kBias]);
    p.bias_copy_stride = t[kBias].size[0] == 1 ? 0 : t[kBias].stride[0];
    p.sigma = static_cast<const float*>(t[kSigma].data);
    p.mask = Mask(t[kMask]);
    p.y = Output<T>(t[kY], 0);
    return launch_perturbed<pairs>(p, t[kY].size[0], 1, launch, perturbed_linear_kernel<T, Kind::kQuantile, pairs>,
                                   perturbed_linear_kernel<T, Kind::kSigns, pairs>);
}

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    if (t[kY].size[0] == 0 || t[kY].size[1] == 0 || t[kY].size[2] == 0) return ULR_OK;
    if (launch.numbers[kNoiseRank])
        return run_low_rank<T>(noise, {t[kY], t[kX], t[kWeight], t[kBias], t[kSigma]}, launch.numbers[kNoiseRank],
                               launch);
    return noise.antithetic ? run_full<T, true>(noise, t, launch) : run_full<T, false>(noise, t, launch);
}

}  // namespace
}  // namespace ulr

// tensors: y [C, R, N], x [1 or C, R, K], weight [1, N, K], bias [1 or C, 1, N] or absent, sigma [1, 1, 1], mask uint8
// [1, N, K] or absent. numbers: the noise's rank, 0: full.
extern "C" int ulr_cuda_perturbed_linear(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                         const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kX].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

// The Walsh-Hadamard transforms of weights of orthogonal draws.
#include "launch.cuh"
#include "walsh_sums.cuh"

namespace ulr {
namespace {

constexpr int kThreads = 128;

struct WalshSums {
    const float* weights;
    int64_t draw_stride, sample_stride, pair_stride;  // pair_stride: to the weights of the negated copies, or 0
    int64_t draws, samples;
    float* sums;
    int64_t size, before;  // before: draws of the first block that come before the first one
};

// A block transforms the weights of one block of draws of one sample, in butterflies of ascending stride.
__global__ void __launch_bounds__(kThreads) walsh_sums_kernel(const WalshSums p) {
    const int64_t first_draw = blockIdx.x / p.samples * p.size - p.before;
    const float* const weights = p.weights + blockIdx.x % p.samples * p.sample_stride;
    float* const sums = p.sums + blockIdx.x * p.size;
    for (int64_t i = threadIdx.x; i < p.size; i += kThreads) {
        const int64_t draw = first_draw + i;
        float weight = 0.0f;
        if (draw >= 0 && draw < p.draws) {
            weight = weights[draw * p.draw_stride];
            if (p.pair_stride != 0) weight -= weights[draw * p.draw_stride + p.pair_stride];
        }
        sums[i] = weight;
    }
    for (int64_t half = 1; half < p.size; half *= 2) {
        __syncthreads();
        for (int64_t i = threadIdx.x; i < p.size / 2; i += kThreads) {
            const int64_t low = 2 * i - (i & (half - 1));
            const float a = sums[low], b = sums[low + half];
            sums[low] = a + b;
            sums[low + half] = a - b;
        }
    }
}

}  // namespace

int launch_walsh_sums(const ulr_noise_spec& noise, const ulr_tensor& weights, const ulr_tensor& sums,
                      const ulr_launch& launch) {
    if (sums.data == nullptr) return ULR_OK;
    const int64_t copies = weights.size[1], draws = noise.antithetic ? copies / 2 : copies;
    const WalshSums p{static_cast<const float*>(weights.data),
                      weights.stride[1],
                      weights.stride[2],
                      noise.antithetic ? draws * weights.stride[1] : 0,
                      draws,
                      sums.size[1],
                      static_cast<float*>(sums.data),
                      sums.size[2],
                      noise.draw % sums.size[2]};
    return launch_kernel(walsh_sums_kernel, sums.size[0] * p.samples, dim3(kThreads), 0, launch, p);
}

}  // namespace ulr

// The scores of a quad of columns, weighted by the losses and summed over copies: noise_score, scale_shift_grad_.
#pragma once

#include "noise.cuh"

namespace ulr {

struct LossWeights {
    const float* data;
    int64_t copy_stride, sample_stride;
    uint32_t positions;

    LossWeights(const ulr_tensor& t, int64_t positions)
        : data(static_cast<const float*>(t.data)),
          copy_stride(t.stride[1]),
          sample_stride(t.stride[2]),
          positions(static_cast<uint32_t>(positions)) {}
};

// each(draw, eps, first, second): the noise of every draw, with the loss weights of its copy and of the negated one (0
// where there is none).
template <Kind kind, typename Each>
__device__ __forceinline__ void for_draws(const Noise<kind>& noise, const ulr_noise_spec& spec, const LossWeights& loss,
                                          uint32_t draws, uint32_t row, uint32_t quad, Each each) {
    const float* weight = loss.data + row / loss.positions * loss.sample_stride;
    const int64_t pair_stride = draws * loss.copy_stride;
#pragma unroll 1
    for (uint32_t draw = 0; draw < draws; ++draw) {
        float eps[4];
        noise.quad(eps, static_cast<uint32_t>(spec.row_offset) + row, quad, static_cast<uint32_t>(spec.draw) + draw);
        each(draw, eps, *weight, spec.antithetic ? weight[pair_stride] : 0.0f);
        weight += loss.copy_stride;
    }
}

}  // namespace ulr

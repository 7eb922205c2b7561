// The scores of a quad of columns, weighted by the losses and summed over copies: noise_score, scale_shift_grad_.
#pragma once

#include "noise.cuh"
#include "walsh_sums.cuh"

namespace ulr {

struct LossWeights {
    const float* data;
    int64_t copy_stride, sample_stride;
    uint32_t positions;
    uint32_t draws;
    // Orthogonal draws: a block of so many counts as one, and the data are transforms of the weights (walsh_sums.cuh).
    // 0: there are none.
    uint32_t walsh_size;

    LossWeights(const ulr_noise_spec& noise, const ulr_tensor& t, const ulr_tensor& walsh_sums)
        : data(static_cast<const float*>(t.data)),
          copy_stride(t.stride[1]),
          sample_stride(t.stride[2]),
          positions(static_cast<uint32_t>(noise.positions)),
          draws(static_cast<uint32_t>(noise.antithetic ? t.size[1] / 2 : t.size[1])),
          walsh_size(0) {
        if (walsh_sums.data == nullptr) return;
        data = static_cast<const float*>(walsh_sums.data);
        copy_stride = walsh_sums.size[1] * walsh_sums.size[2];
        sample_stride = walsh_sums.size[2];
        draws = static_cast<uint32_t>(walsh_sums.size[0]);
        walsh_size = static_cast<uint32_t>(walsh_sums.size[2]);
    }
};

// each(draw, eps, first, second): the noise of every draw, with the loss weights of its copy and of the negated one (0
// where there is none). Transformed: whether the
// data are transforms; then a block of draws comes as its weighted sum, with a weight of 1.
template <Kind kind, typename Transformed, typename Each>
__device__ __forceinline__ void for_draws(const Noise<kind>& noise, const ulr_noise_spec& spec, const LossWeights& loss,
                                          Transformed transformed, uint32_t row, uint32_t quad, Each each) {
    const float* weight = loss.data + row / loss.positions * loss.sample_stride;
    const uint32_t noise_row = static_cast<uint32_t>(spec.row_offset) + row, first = static_cast<uint32_t>(spec.draw);
    if constexpr (kind == Kind::kSigns) {
        if (transformed) {
            const uint32_t within = loss.walsh_size - 1, slot = noise.slot(noise_row, 4 * quad);
#pragma unroll 1
            for (uint32_t block = 0; block < loss.draws; ++block) {
                float eps[4];
                noise.sign_quad(eps, noise_row, quad, (first & ~within) + block * loss.walsh_size, StaticBool<true>{});
#pragma unroll
                for (int i = 0; i < 4; ++i) eps[i] *= weight[(slot + i) & within];
                each(block, eps, 1.0f, 0.0f);
                weight += loss.copy_stride;
            }
            return;
        }
    }
    const int64_t pair_stride = loss.draws * loss.copy_stride;
#pragma unroll 1
    for (uint32_t draw = 0; draw < loss.draws; ++draw) {
        float eps[4];
        noise.quad(eps, noise_row, quad, first + draw);
        each(draw, eps, *weight, spec.antithetic ? weight[pair_stride] : 0.0f);
        weight += loss.copy_stride;
    }
}

}  // namespace ulr

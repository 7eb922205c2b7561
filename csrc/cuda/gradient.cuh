// The kernel of noisy_linear_grad_ and noisy_linear_recompute_:
//     grad_weight += sum over copies and rows of loss_weight * score / sigma (outer) x, and its companions.
//
// A block owns a few features. It goes through the rows in blocks: it makes S = sum over copies of loss_weight * score
// for rows x features in registers, puts it into shared memory as one operand of a product, and adds S^T x to sums that
// it keeps in registers for a panel of inputs. Each element of the buffers belongs to one block, which adds to it in a
// fixed order: there are no atomics, and results repeat bit for bit.
//
// Gradient: the grid is features x panels, so each panel of kPanel inputs makes the noise again.
// Recompute: the grid is features alone; the noise is made once and serves the output and all panels. With several
// panels, the sums go to an fp32 buffer after each block of rows. A 16-bit buffer would round too often: then the block
// goes through the rows again for each further panel.
#pragma once

#include "gradient_problem.cuh"

namespace ulr {

// Adds a block's sums for the bias and ln sigma, which have no inputs, to the buffers: over the eight rows of a warp,
// then over warps, always in the same order. All threads together, each with its octet of columns.
template <typename Layer>
__device__ __forceinline__ void add_feature_sums(const Gradient<Layer>& p, const GradientPart& work,
                                                 int64_t first_feature, float (&by_bias)[8], float (&by_log_sigma)[8],
                                                 const float* inverse_sigma,
                                                 float (&reduced)[2][kWarps][kGradFeatures]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int octet_col = threadIdx.x % (kGradFeatures / 8) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        for (int step = 4; step < 32; step *= 2) {
            by_bias[i] += __shfl_xor_sync(0xffffffffu, by_bias[i], step);
            by_log_sigma[i] += __shfl_xor_sync(0xffffffffu, by_log_sigma[i], step);
        }
        if (lane < 4) {
            reduced[0][warp][octet_col + i] = by_bias[i];
            reduced[1][warp][octet_col + i] = by_log_sigma[i];
        }
    }
    __syncthreads();
    if (warp > 0) return;
    float bias_sum = 0.0f, log_sigma_sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
        bias_sum += reduced[0][w][lane];
        log_sigma_sum += reduced[1][w][lane];
    }
    const int64_t feature = first_feature + lane;
    const bool exists = feature >= 0 && feature < p.features;
    if (!exists) log_sigma_sum = 0.0f;
    if (p.grad_bias.data != nullptr && exists)
        p.grad_bias.shifted(work.sums).add(0, feature, bias_sum * inverse_sigma[lane]);
    if (p.grad_log_sigma.data == nullptr) return;
    if (p.grad_log_sigma.col_stride != 0) {
        if (exists) p.grad_log_sigma.shifted(work.sums).add(0, feature, log_sigma_sum);
        return;
    }
    for (int step = 16; step > 0; step /= 2) log_sigma_sum += __shfl_xor_sync(0xffffffffu, log_sigma_sum, step);
    if (lane == 0) {
        if (p.feature_tiles == 1) {
            p.grad_log_sigma.add(0, 0, log_sigma_sum);
        } else {
            p.partials[work.feature_tile] = log_sigma_sum;
        }
    }
}

template <typename Layer, Kind kind, bool recompute>
__device__ __forceinline__ void gradient_block(const Gradient<Layer>& p, const GradientPart& work) {
    using T = typename Layer::T;
    using Memory = GradientMemory<T, recompute>;
    constexpr int kDepth = Memory::kDepth, kStages = Memory::kStages;
    auto& memory = *dynamic_shared<typename Memory::Layout>();
    [[maybe_unused]] auto* clean_tiles = reinterpret_cast<typename Memory::Clean*>(&memory + 1);
    // Before the first stage is loaded and after the last one is used: recompute leaves no room for more on small
    // devices.
    auto& reduced = *reinterpret_cast<float (*)[2][kWarps][kGradFeatures]>(memory.stages[0]);
    static_assert(sizeof reduced <= sizeof memory.stages);
    __shared__ NoiseTable table;
    alignas(16) __shared__ float sigma[kGradFeatures], inverse_sigma[kGradFeatures], bias[kGradFeatures];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t feature_tile = work.feature_tile;
    const int64_t aligned = p.noise.col_offset / kGradFeatures * kGradFeatures;
    const int64_t first_feature = feature_tile * kGradFeatures - (p.noise.col_offset - aligned);
    const auto exists = [&](int64_t feature) { return feature >= 0 && feature < p.features; };
    table.fill(p.noise, threadIdx.x, kGradThreads);
    if (threadIdx.x < kGradFeatures) {
        const int64_t feature = first_feature + threadIdx.x;
        sigma[threadIdx.x] = exists(feature) ? p.sigma[feature] : 1.0f;
        inverse_sigma[threadIdx.x] = 1.0f / sigma[threadIdx.x];
        bias[threadIdx.x] = exists(feature) && p.bias.data != nullptr ? p.bias[feature] : 0.0f;
    }
    const float scale = score_scale(p, reduced[0][0]);
    __syncthreads();
    const Noise<kind> noise(p.noise, table);

    // The panels: this block's; or all at once; or one after another.
    const bool weighted = p.grad_weight.data != nullptr && p.x.cols > 0;
    const bool in_one_go = recompute && p.grad_weight.wide;
    const int passes = recompute && weighted && !in_one_go ? static_cast<int>(p.panels) : 1;
    const int panels = !weighted ? 0 : in_one_go ? static_cast<int>(p.panels) : 1;
    const int own_panel = work.panel;
    const bool first_block = own_panel == 0;  // it adds up the bias and ln sigma, which have no inputs

    const int draws = p.shared ? p.draws : 1;
    const int sides = !p.shared && p.noise.antithetic ? 2 : 1;
    const int octet_col = threadIdx.x % (kGradFeatures / 8) * 8;

    float acc[2][8][4] = {};
    float by_bias[8] = {}, by_log_sigma[8] = {};
    const auto add_sums = [&](int panel) {
#pragma unroll
        for (int row = 0; row < 4; ++row) {
            const int feature = 8 * row + lane / 4;
            if (!exists(first_feature + feature)) continue;
            const float factor = inverse_sigma[feature] / scale;
#pragma unroll
            for (int pair = 0; pair < 16; ++pair) {
                const int64_t input = int64_t{panel} * kPanel + warp * 64 + pair / 2 * 8 + lane % 4 * 2 + pair % 2;
                if (input < p.x.cols)
                    p.grad_weight.shifted(work.sums).add(first_feature + feature, input,
                                                         acc[row / 2][pair / 2][2 * (row % 2) + pair % 2] * factor);
            }
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) acc[i / 32][i / 4 % 8][i % 4] = 0.0f;
    };

    for (int pass = 0; pass < passes; ++pass) {
        const int first_panel = own_panel + pass;
        const int64_t row_blocks = (p.x.rows + work.unit_rows - 1) / work.unit_rows;
        int group = static_cast<int>(work.first_unit / row_blocks);
        int64_t row_block = work.first_unit % row_blocks;
        for (int64_t unit = work.first_unit; unit < work.last_unit; ++unit) {
            const int64_t first_row = row_block * work.unit_rows;
            const int64_t rows_end = min(first_row + work.unit_rows, p.x.rows);
            if constexpr (recompute) {
                for (int side = 0; side < sides && pass == 0; ++side) {
                    float clean[1][4][4];
#pragma unroll
                    for (int i = 0; i < 16; ++i)
                        clean[0][i / 4][i % 4] = bias[i / 8 * 16 + lane % 4 * 4 + i / 4 % 2 * 2 + i % 2];
                    const auto x = Layer::input(p.x, (group + side * p.draws) * p.x_copy_stride, first_feature);
                    tiled_product<kGradRows, kGradFeatures, kStages, kGradThreads>(
                        clean, memory.stages[0], x, first_row, Layer::weights(p.weight, first_feature), first_feature,
                        16 * warp, 0);
                    store_sums<kGradFeatures>(clean_tiles[side], clean, 16 * warp, 0);
                }
                __syncthreads();
            }

            // The rows of x, side by side and panel by panel; the first ones are loaded while the noise is made.
            const int rows_here = static_cast<int>(rows_end - first_row);
            const int steps_of_panel = (rows_here + kDepth - 1) / kDepth, steps = sides * panels * steps_of_panel;
            const auto load = [&](int step) {
                if (step < steps) {
                    const int part = step / steps_of_panel;
                    const auto x =
                        Layer::input(p.x, (group + part / panels * p.draws) * p.x_copy_stride, first_feature);
                    load_tile<kDepth, kPanel * sizeof(T), kGradThreads>(
                        memory.stages[step % kStages], x, first_row + step % steps_of_panel * kDepth,
                        int64_t{first_panel + part % panels} * kPanel, in_order);
                }
                cp_async_commit();  // an empty group too: the wait counts groups
            };
#pragma unroll 1
            for (int step = 0; step < kStages - 1; ++step) load(step);

#pragma unroll 1
            for (int index = threadIdx.x; index < kGradRows * kGradFeatures / 8; index += kGradThreads) {
                const int tile_row = index / (kGradFeatures / 8);
                const int64_t row = first_row + tile_row;
                float sums[2][8] = {};
                if (first_row + tile_row / 8 * 8 < rows_end) {  // for a warp as a whole: it covers eight rows
                    const bool counts = row < rows_end;
                    const float* loss =
                        p.loss_weight +
                        (counts ? static_cast<uint32_t>(row) / static_cast<uint32_t>(p.noise.positions) : 0) *
                            p.loss_sample_stride +
                        group * p.loss_copy_stride;
                    const int64_t pair_stride = p.draws * p.loss_copy_stride;
                    Octet<kind> octet(noise, static_cast<uint32_t>(p.noise.row_offset + row),
                                      aligned + feature_tile * kGradFeatures + octet_col);
                    const uint32_t first_draw = static_cast<uint32_t>(p.noise.draw + group);
                    // Plain: the score is eps, ln sigma has no gradient, and a pair of copies shares x.
                    const auto add_draws = [&](auto plain, auto paired, auto writes, auto whole) {
                        const OutputOctet<typename Layer::Y> y(p.y, row, first_feature + octet_col);
                        T *to = y.of(group), *to_second = y.of(group + p.draws);
#pragma unroll 1
                        for (int draw = 0; draw < draws; ++draw) {
                            float eps[8];
                            octet.make(eps, first_draw, draw, StaticBool<recompute>{});
                            // The score is odd and eps * score even: for an antithetic pair they are multiplied by the
                            // difference and by the sum of its weights.
                            const float first = *loss, second = paired ? loss[pair_stride] : 0.0f;
                            loss += p.loss_copy_stride;
                            if (plain) {
                                const float difference = first - second;
#pragma unroll
                                for (int i = 0; i < 8; ++i) sums[0][i] = fmaf(difference, eps[i], sums[0][i]);
                            } else {
#pragma unroll
                                for (int i = 0; i < 8; ++i) {
                                    const float s = score(eps[i], p.noise.dist);
                                    sums[0][i] = fmaf(sides == 2 ? first : first - second, s, sums[0][i]);
                                    if (sides == 2) sums[1][i] = -second * s;
                                    if (counts && p.grad_log_sigma.data != nullptr && pass == 0)
                                        by_log_sigma[i] = fmaf(first + second, fmaf(eps[i], s, -1.0f), by_log_sigma[i]);
                                }
                            }
                            if constexpr (recompute) {
                                if (!writes) continue;
                                const auto store = [&](T* at, const float* clean, float sign) {
                                    float value[8];
#pragma unroll
                                    for (int i = 0; i < 8; ++i)
                                        value[i] = fmaf(sign * sigma[octet_col + i], eps[i], clean[i]);
                                    y.store(at, value, whole);
                                };
                                const int at = tile_row * kGradFeatures + octet_col;
                                store(to, clean_tiles[0] + at, 1.0f);
                                if (paired) store(to_second, clean_tiles[sides - 1] + at, -1.0f);
                                to += p.y.copy_stride;
                                to_second += p.y.copy_stride;
                            }
                        }
                    };
                    const auto add_blocks = [&]() {
                        if constexpr (kind == Kind::kSigns && !recompute) {
                            const uint32_t within = p.walsh_size - 1;
                            const uint32_t slot =
                                noise.slot(static_cast<uint32_t>(p.noise.row_offset + row),
                                           static_cast<uint32_t>(p.noise.col_offset + first_feature + octet_col));
                            const float* of_sample = p.loss_weight + (loss - p.loss_weight) * p.walsh_size;
#pragma unroll 1
                            for (int block = 0; block < draws; ++block) {
                                float eps[8];
                                octet.make(eps, first_draw + block * p.walsh_size, 0, StaticBool<false>{});
#pragma unroll
                                for (int i = 0; i < 8; ++i)
                                    sums[0][i] = fmaf(of_sample[(slot + i) & within], eps[i], sums[0][i]);
                                of_sample += p.loss_copy_stride;
                            }
                        }
                    };
                    // A loop for each of the common cases, so that none holds instructions of another.
                    const bool writes = recompute && pass == 0, paired = p.noise.antithetic;
                    const bool plain = kind != Kind::kSobol && p.noise.dist != ULR_LAPLACE && sides == 1 &&
                                       p.grad_log_sigma.data == nullptr && (!recompute || (writes && p.y.whole));
                    if (kind == Kind::kSigns && !recompute && p.walsh_size != 0) {
                        add_blocks();
                    } else if (!plain) {
                        add_draws(StaticBool<false>{}, paired, writes, p.y.whole);
                    } else if (paired) {
                        add_draws(StaticBool<true>{}, StaticBool<true>{}, StaticBool<recompute>{}, StaticBool<true>{});
                    } else {
                        add_draws(StaticBool<true>{}, StaticBool<false>{}, StaticBool<recompute>{}, StaticBool<true>{});
                    }
#pragma unroll
                    for (int i = 0; i < 16; ++i) sums[i / 8][i % 8] = counts ? sums[i / 8][i % 8] : 0.0f;
                }
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    if (side >= sides) break;
                    float scaled[8];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        if (pass == 0) by_bias[i] += sums[side][i];
                        scaled[i] = sums[side][i] * scale;
                    }
                    constexpr int kElements = 16 / sizeof(T);
                    T* low = reinterpret_cast<T*>(memory.score[side] +
                                                  chunk_offset<Memory::kScoreBytes>(tile_row, octet_col / kElements));
                    store4(low, {scaled[0], scaled[1], scaled[2], scaled[3]});
                    T* high = sizeof(T) == 2
                                  ? low + 4
                                  : reinterpret_cast<T*>(memory.score[side] + chunk_offset<Memory::kScoreBytes>(
                                                                                  tile_row, octet_col / kElements + 1));
                    store4(high, {scaled[4], scaled[5], scaled[6], scaled[7]});
                }
            }

#pragma unroll 1
            for (int step = 0; step < steps; ++step) {
                cp_async_wait<kStages - 2>();
                __syncthreads();  // this step's rows (and S) are visible to all; the next loads may overwrite the last
                load(step + kStages - 1);
                const int part = step / steps_of_panel, panel = first_panel + part % panels;
                if (int64_t{panel} * kPanel + 64 * warp < p.x.cols)
                    multiply_transposed<Memory::kScoreBytes, kPanel * sizeof(T), kDepth>(
                        acc, memory.score[part / panels], step % steps_of_panel * kDepth, 0,
                        memory.stages[step % kStages], 64 * warp, T{});
                if constexpr (recompute) {
                    const bool last = unit == work.last_unit - 1 && step == steps - 1;
                    if (last || (panels > 1 && (step + 1) % steps_of_panel == 0)) add_sums(panel);
                }
            }
            cp_async_wait<0>();
            __syncthreads();
            if (++row_block == row_blocks) row_block = 0, ++group;
        }
    }

    if (!recompute && panels > 0) add_sums(own_panel);

    if (first_block) add_feature_sums(p, work, first_feature, by_bias, by_log_sigma, inverse_sigma, reduced);
}

}  // namespace ulr

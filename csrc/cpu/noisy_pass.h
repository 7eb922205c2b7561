// The passes over the noise of noisy layers (noisy.h lists their arguments): the loop over units, which are some rows
// and columns with some or all draws, and the units' sums over rows.
#pragma once

#include <algorithm>

#include "noisy.h"
#include "orthogonal.h"
#include "parallel.h"
#include "pass.h"
#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {

// The common part of a thread's unit; each kind of unit makes its own tile of noise.
struct NoisyUnit {
    int64_t row, col, rows, cols;
};

// A Derived has a Unit, made of the noise's specification, with a `tile`; and
//     open(unit, is_new)                         once a unit's rows and columns are set; is_new: its columns changed
//     prefetch(unit, draw, draws)                before the noise of some draws is made
//     gradient(unit, draw, draws)                adds their scores, whose noise is in the tile
//     forward<Y, Base>(unit, draw, draws, noise) writes their outputs; noise as in Tile
//     finish_gradient(unit, bias_sums, log_sigma_sums)
// and for orthogonal draws, with the signs that they share in the tile:
//     forward_orthogonal<Y, Base>(unit, draw, draws)
//     add_orthogonal(unit, weights, block)       adds a block's weighted draws to the scores
template <typename Derived>
class NoisyPass {
  public:
    int run(int threads) const {
        if (!rows_ || !cols_) return ULR_OK;
        const auto pieces = [](int64_t extent, int64_t size) { return (extent + size - 1) / size; };
        const int64_t across = pieces(cols_, width_), down = pieces(rows_, height_);
        const bool all = has(kLossWeight) || spec_.hadamard;  // sums over draws stay in a thread, in order
        const int64_t draws_of_unit = all ? draws_ : depth_;
        const int64_t count = across * down * pieces(draws_, draws_of_unit);
        const bool sums = has(kBiasSums) || has(kLogSigmaSums);
        // Each unit has sums over its rows, which are added up in the order of rows, whichever thread made them.
        const Scratch partial(sums ? 2 * down * cols_ : 0);
        if (sums && !partial.data()) return ULR_OUT_OF_MEMORY;
        const int64_t count_of_weights = orthogonal_sums() ? t_[kLossWeight].size[2] : 0;
        OrthogonalSums weights(spec_.draw, draws_, count_of_weights, width_);
        if (weights.failed()) return ULR_OUT_OF_MEMORY;
        weights.make(threads, [&](int64_t i, int64_t d) {
            const float minus = antithetic_ ? *at<float>(t_[kMinusLossWeight], 0, d, i) : 0.0f;
            return *at<float>(t_[kLossWeight], 0, d, i) - minus;  // the score is odd
        });
        const int64_t grain = kWorthWaking / (width_ * height_ * draws_of_unit) + 1;
        parallel(threads, count, grain, [&](int64_t first, int64_t last) {
            typename Derived::Unit unit(spec_);
            for (int64_t i = first; i < last; ++i) {
                const int64_t row_piece = i % down, col = i / down % across * width_;
                const int64_t draw = i / down / across * draws_of_unit;
                const bool is_new = i == first || col != unit.col;
                unit.row = row_piece * height_;
                unit.col = col;
                unit.rows = std::min(height_, rows_ - unit.row);
                unit.cols = std::min(width_, cols_ - col);
                derived().open(unit, is_new);
                if (has(kLossWeight) ? orthogonal_sums() : spec_.hadamard != 0)
                    make_orthogonal(unit, weights);
                else
                    make(unit, draw, std::min(draw + draws_of_unit, draws_));
                if (!has(kLossWeight)) continue;
                float* sums_of_piece = sums ? partial.data() + 2 * row_piece * cols_ + col : nullptr;
                derived().finish_gradient(unit, has(kBiasSums) ? sums_of_piece : nullptr,
                                          has(kLogSigmaSums) ? sums_of_piece + cols_ : nullptr);
            }
        });
        if (has(kBiasSums)) add_pieces(t_[kBiasSums], partial.data(), down, 2 * cols_, cols_);
        if (has(kLogSigmaSums)) add_pieces(t_[kLogSigmaSums], partial.data() + cols_, down, 2 * cols_, cols_);
        return ULR_OK;
    }

  protected:
    NoisyPass(const ulr_noise_spec& spec, const ulr_tensor* tensors)
        : spec_(spec),
          t_(tensors),
          draws_(has(kLossWeight) ? t_[kLossWeight].size[1] : t_[kY].size[0]),
          cols_(t_[kSigma].size[2]),
          antithetic_(spec.antithetic),
          summed_(has(kLossWeight) && !has(kMinusScores) && t_[kScores].size[0] == 1) {}

    // Writes n lanes from place i on of a draw: y = base + value, and of its second copy, if any, the value negated.
    template <typename Y, typename Base>
    static auto adds_to(Y* y, const Base* base, Y* minus_y, const Base* minus_base) {
        return [=](int64_t i, int64_t n, F value) __attribute__((always_inline)) {
            const F clean = load_part(base + i, n), minus = minus_y ? load_part(minus_base + i, n) : clean;
            store_part(y + i, clean + value, n);
            if (minus_y) store_part(minus_y + i, minus + as_float(bits(value) ^ set(0x80000000u)), n);
        };
    }

    int64_t rows_of_weight() const { return rows_ / t_[kLossWeight].size[2]; }
    bool has(NoisyArgument a) const { return t_[a].data != nullptr; }

    const ulr_noise_spec& spec_;
    const ulr_tensor* t_;
    int64_t draws_, cols_, rows_ = 0;
    int64_t width_ = 0, height_ = 0, depth_ = 0;  // of a tile: columns, rows and draws
    bool antithetic_, summed_;                    // summed: scores, over copies

  private:
    const Derived& derived() const { return static_cast<const Derived&>(*this); }

    template <typename Unit>
    void make(Unit& unit, int64_t first, int64_t last) const {
        for (int64_t d = first; d < last; d += depth_) {
            const int64_t draws = std::min(depth_, last - d);
            if (has(kY)) derived().prefetch(unit, d, draws);
            const Extent at{spec_.draw + d, spec_.row_offset + unit.row, spec_.col_offset + unit.col, draws, unit.rows,
                            unit.cols};
            if (!has(kLossWeight)) {
                unit.tile.use(at, [&](auto noise) { forward(unit, d, draws, noise); });
                continue;
            }
            unit.tile.make(at);
            derived().gradient(unit, d, draws);
            if (has(kY)) forward(unit, d, draws, unit.tile.noise());
        }
    }

    // Whether scores are sums over orthogonal draws.
    bool orthogonal_sums() const { return spec_.hadamard && summed_; }

    // All draws of a unit.
    template <typename Unit>
    void make_orthogonal(Unit& unit, const OrthogonalSums& weights) const {
        const auto shared_signs = [&](int64_t draw) {
            unit.tile.make({draw, spec_.row_offset + unit.row, spec_.col_offset + unit.col, 1, unit.rows, unit.cols});
        };
        for (int64_t block = 0; orthogonal_sums() && block < weights.blocks(); ++block) {
            shared_signs(weights.first(block));
            derived().add_orthogonal(unit, weights, block);
        }
        if (!has(kY)) return;
        for_each_block(spec_.draw, draws_, [&](int64_t draw, int64_t draws) {
            shared_signs(block_of(draw));
            by_dtype([&](auto y, auto base) {
                derived().template forward_orthogonal<decltype(y), decltype(base)>(unit, draw, draws);
            });
        });
    }

    template <typename Unit, typename Noise>
    void forward(const Unit& unit, int64_t draw, int64_t draws, const Noise& noise) const {
        by_dtype([&](auto y, auto base) {
            derived().template forward<decltype(y), decltype(base)>(unit, draw, draws, noise);
        });
    }

    // as(y, base): values of the elements' types.
    template <typename Body>
    void by_dtype(Body as) const {
        const bool wide = t_[kBase].dtype == ULR_F32;
        switch (t_[kY].dtype) {
            case ULR_F32:
                return as(float{}, float{});
            case ULR_BF16:
                return wide ? as(Bf16{}, float{}) : as(Bf16{}, Bf16{});
            default:
                return wide ? as(Half{}, float{}) : as(Half{}, Half{});
        }
    }
};

}  // namespace ULR_ISA
}  // namespace ulr

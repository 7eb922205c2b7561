// The noise of a weight, some rows at a time: full, or of low rank, A B^T / sqrt(r).
#pragma once

#include <math.h>

#include <algorithm>

#include "parallel.h"
#include "pass.h"
#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {

// The two factors of a draw's noise: A^T [r, N] and B^T [r, K], of keys of their own.
class Factors {
  public:
    // cols: K, col_offset the first of them.
    Factors(const ulr_noise_spec& spec, int64_t rank, int64_t cols)
        : rank_(rank),
          cols_(cols),
          pitch_((cols + kLanes - 1) / kLanes * kLanes),
          keys_{fold_in(*spec.key, 1), fold_in(*spec.key, 2)},
          a_spec_(with_key(spec, &keys_[0])),
          b_spec_(with_key(spec, &keys_[1])),
          a_(a_spec_),
          b_(b_spec_),
          values_(rank * (pitch_ + 1)) {}

    bool failed() const { return !values_.data(); }

    // B^T of a draw.
    void use_draw(int64_t draw) {
        if (draw == draw_) return;
        draw_ = draw;
        for (int64_t col = 0; col < cols_; col += kTileColumns) {
            const int64_t cols = std::min(kTileColumns, cols_ - col), most = Tile::capacity(b_spec_, cols);
            for (int64_t j = 0; j < rank_; j += most) {
                const int64_t ranks = std::min(most, rank_ - j);
                b_.make({draw, j, b_spec_.col_offset + col, 1, ranks, cols});
                for (int64_t i = 0; i < ranks; ++i)
                    memcpy(values_.data() + (j + i) * pitch_ + col, b_.row(0, i), static_cast<size_t>(cols) * 4);
            }
        }
    }

    const float* b(int64_t j) const { return values_.data() + j * pitch_; }

    // The column of A^T that belongs to a row of the weight, [r].
    const float* a(int64_t row) {
        float* column = values_.data() + rank_ * pitch_;
        const int64_t most = Tile::capacity(a_spec_, 1);
        for (int64_t j = 0; j < rank_; j += most) {
            const int64_t ranks = std::min(most, rank_ - j);
            a_.make({draw_, j, row, 1, ranks, 1});
            for (int64_t i = 0; i < ranks; ++i) column[j + i] = *a_.row(0, i);
        }
        return column;
    }

    // A row of the noise, from column `col` of the block on; `eps` has room for whole vectors.
    void row(const float* a, int64_t col, int64_t cols, float* eps) const {
        const F scale = set(static_cast<float>(1.0 / sqrt(static_cast<double>(rank_))));
        for (int64_t c = 0; c < cols; c += kLanes) {
            F total = set(0.0f);
            for (int64_t j = 0; j < rank_; ++j) total = fma(set(a[j]), load(b(j) + col + c), total);
            store(eps + c, total * scale);
        }
    }

  private:
    static ulr_noise_spec with_key(ulr_noise_spec spec, const int64_t* key) {
        spec.key = key;
        return spec;
    }

    const int64_t rank_, cols_, pitch_;
    const int64_t keys_[2];
    const ulr_noise_spec a_spec_, b_spec_;
    Tile a_, b_;
    Scratch values_;
    int64_t draw_ = -1;
};

}  // namespace ULR_ISA
}  // namespace ulr

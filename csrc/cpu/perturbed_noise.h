// Tools of the passes over a weight's noise: a factor of low-rank noise, a row of that noise, a row of W'.
#pragma once

#include <math.h>

#include <algorithm>

#include "parallel.h"
#include "pass.h"
#include "tile.h"
#include "ulr/step.h"

namespace ulr {
inline namespace ULR_ISA {

// With antithetic noise each draw has a second copy, in tensors of its own; sigma is one number.
inline float sigma_of(const ulr_tensor& sigma) { return *static_cast<const float*>(sigma.data); }

// A factor of E = A B^T / sqrt(r), A^T [r, N] or B^T [r, K], for some of its columns; it keeps those of the last
// draw.
class Factor {
  public:
    Factor(const ulr_noise_spec& spec, int64_t stream, int64_t rank, int64_t cols)
        : rank_(rank),
          cols_(cols),
          first_(stream == kRowFactorStream ? spec.row_offset : spec.col_offset),
          pitch_((cols + kLanes - 1) / kLanes * kLanes),
          key_(fold_in(*spec.key, stream)),
          spec_(spec),
          values_(rank * pitch_) {
        spec_.key = &key_;
    }
    Factor(const Factor&) = delete;

    bool failed() const { return rank_ && cols_ && !values_.data(); }
    const float* row(int64_t j) const { return values_.data() + j * pitch_; }

    void use(int64_t draw) {
        if (draw == draw_) return;
        draw_ = draw;
        Tile tile(spec_);
        for (int64_t col = 0; col < cols_; col += kTileColumns) {
            const int64_t cols = std::min(kTileColumns, cols_ - col), most = Tile::capacity(spec_, cols);
            for (int64_t j = 0; j < rank_; j += most) {
                const int64_t ranks = std::min(most, rank_ - j);
                tile.make({draw, j, first_ + col, 1, ranks, cols});
                for (int64_t i = 0; i < ranks; ++i)
                    memcpy(values_.data() + (j + i) * pitch_ + col, tile.row(0, i), static_cast<size_t>(cols) * 4);
            }
        }
    }

  private:
    const int64_t rank_, cols_, first_, pitch_;
    const int64_t key_;
    ulr_noise_spec spec_;
    Scratch values_;
    int64_t draw_ = -1;
};

// eps = sum over j of a[j] B^T[j] / sqrt(r), from column `col` of B's on; `eps` has room for whole vectors.
inline void low_rank_row(const Factor& b, const float* a, int64_t rank, int64_t col, int64_t cols, float* eps) {
    const F scale = set(low_rank_scale(rank));
    for (int64_t c = 0; c < cols; c += kLanes) {
        F total = set(0.0f);
        for (int64_t j = 0; j < rank; ++j) total = fma(set(a[j]), load(b.row(j) + col + c), total);
        store(eps + c, total * scale);
    }
}

// to = round(fma(sigma, eps, W)) of a row of the weight from column `col` on; W where a mask is not set. `widened` is
// scratch for a row.
template <typename T>
void perturb_row(const ulr_tensor& weight, const ulr_tensor& mask, int64_t row, int64_t col, int64_t cols,
                 const float* eps, float sigma, T* to, float* widened) {
    const F scale = set(sigma);
    const T* from = at<T>(weight, 0, row, col);
    const int64_t stride = weight.stride[2];
    if (stride == 1) {
        by_lanes(cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            store_part(to + c, fma(scale, load(eps + c), load_part(from + c, n)), n);
        });
    } else {
        widen_row(from, stride, cols, widened);
        by_lanes(cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            store_part(to + c, fma(scale, load(eps + c), load(widened + c)), n);
        });
    }
    if (mask.data) {
        const uint8_t* noised = at<uint8_t>(mask, 0, row, col);
        for (int64_t c = 0; c < cols; ++c)
            if (!noised[c * mask.stride[2]]) to[c] = from[c * stride];
    }
}

}  // namespace ULR_ISA
}  // namespace ulr

// noise_dot: d[c, b] = sum over the rows and columns of sample b of sigma * eps_c * x.
#include <algorithm>

#include "dispatch.h"
#include "grid.h"
#include "orthogonal.h"
#include "parallel.h"
#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

enum Argument {
    kOut,    // fp32 [1, C, rows / positions]
    kX,      // [1, a, N, b, c]
    kSigma,  // [1, 1, N], fp32
};

constexpr int64_t kColumns = 128, kChannelColumns = 32;  // of a tile, as memory runs along columns or along rows
constexpr int64_t kWorthWaking = 1 << 14;                // values that a thread should make at a time

class Pass {
  public:
    Pass(const ulr_noise_spec& spec, const ulr_tensor* tensors)
        : spec_(spec), t_(tensors), x_(t_[kX]), cols_(x_.cols()), copies_(t_[kOut].size[1]) {
        draws_ = spec.antithetic ? copies_ / 2 : copies_;
        width_ = std::clamp<int64_t>(cols_, 1, x_.along_rows() ? kChannelColumns : kColumns);
        // The split into tiles is that of the widest lanes, so that all instruction sets sum in one order.
        pitch_ = (width_ + 15) / 16 * 16;
        const int64_t fits = std::min(Tile::capacity(spec, width_), kTileFloats / pitch_);
        height_ = std::min(spec.positions, fits);
        depth_ = std::clamp<int64_t>(fits / height_, 1, draws_);
    }

    int run(int threads) const;

  private:
    struct Unit {
        Unit(const ulr_noise_spec& spec, int64_t sums) : tile(spec), sums(sums) {}
        Tile tile;
        Scratch sums;  // of each draw; of orthogonal ones by slot
        alignas(64) float sigma[kColumns];
        alignas(64) float x[kTileFloats];
    };

    // body(row, rows, col, cols): the tiles of a sample; sigma * x is in the unit.
    template <typename Body>
    void for_each_tile(Unit& unit, int64_t sample, Body body) const {
        for (int64_t col = 0; col < cols_; col += width_) {
            const int64_t cols = std::min(width_, cols_ - col);
            load_sigma(t_[kSigma], col, cols, pitch_, unit.sigma);
            const int64_t end = (sample + 1) * spec_.positions;
            for (int64_t row = sample * spec_.positions; row < end; row += height_) {
                const int64_t rows = std::min(height_, end - row);
                std::fill_n(unit.x, rows * pitch_, 0.0f);
                x_.load(0, row, rows, col, cols, unit.x, pitch_);
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t c = 0; c < cols; c += kLanes) {
                        float* x = unit.x + r * pitch_ + c;
                        store(x, load_part(x, cols - c) * load(unit.sigma + c));
                    }
                body(row, rows, col, cols);
            }
        }
    }

    void add_draws(Unit& unit, int64_t sample) const;
    void add_orthogonal(Unit& unit, int64_t sample, const OrthogonalSums& layout) const;

    const ulr_noise_spec& spec_;
    const ulr_tensor* t_;
    const Grid x_;
    const int64_t cols_, copies_;
    int64_t draws_, width_, pitch_, height_, depth_;
};

void Pass::add_draws(Unit& unit, int64_t sample) const {
    std::fill_n(unit.sums.data(), draws_, 0.0f);
    for_each_tile(unit, sample, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
        for (int64_t draw = 0; draw < draws_; draw += depth_) {
            const int64_t draws = std::min(depth_, draws_ - draw);
            unit.tile.make({spec_.draw + draw, spec_.row_offset + row, spec_.col_offset + col, draws, rows, cols});
            for (int64_t d = 0; d < draws; ++d) {
                // Sixteen sums, whatever the lanes, so that all instruction sets sum in one order.
                alignas(64) float parts[16] = {};
                for (int64_t r = 0; r < rows; ++r) {
                    const float *eps = unit.tile.row(d, r), *x = unit.x + r * pitch_;
                    for (int64_t c = 0; c < cols; c += kLanes)
                        store(parts + c % 16, fma(load_part(eps + c, cols - c), load(x + c), load(parts + c % 16)));
                }
                float sum = 0.0f;
                for (float part : parts) sum += part;
                unit.sums.data()[draw + d] += sum;
            }
        }
    });
    for (int64_t d = 0; d < draws_; ++d) *at<float>(t_[kOut], 0, d, sample) = unit.sums.data()[d];
}

// The products with the signs that the draws share, added up by slot: one transform makes all draws of a block.
void Pass::add_orthogonal(Unit& unit, int64_t sample, const OrthogonalSums& layout) const {
    const int64_t size = layout.size(), room = size + width_ + 16;
    float* sums = unit.sums.data();
    for (int64_t block = 0; block < layout.blocks(); ++block) {
        std::fill_n(sums, room, 0.0f);
        const int64_t first = layout.first(block);
        for_each_tile(unit, sample, [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
            unit.tile.make({first, spec_.row_offset + row, spec_.col_offset + col, 1, rows, cols});
            for (int64_t r = 0; r < rows; ++r) {
                const uint32_t slot = hadamard_slot(spec_, spec_.row_offset + row + r, spec_.col_offset + col);
                float* to = sums + (slot & static_cast<uint32_t>(size - 1));
                const float *eps = unit.tile.row(0, r), *x = unit.x + r * pitch_;
                by_lanes(cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                    store_part(to + c, fma(load_part(eps + c, n), load(x + c), load_part(to + c, n)), n);
                });
            }
        });
        for (int64_t i = size; i < room; ++i) sums[i % size] += sums[i];
        walsh_hadamard(sums, size);
        for (int64_t i = 0; i < size; ++i) {
            const int64_t d = first + i - spec_.draw;
            if (d >= 0 && d < draws_) *at<float>(t_[kOut], 0, d, sample) = sums[i];
        }
    }
}

int Pass::run(int threads) const {
    const int64_t samples = t_[kOut].size[2];
    const OrthogonalSums layout(spec_.draw, draws_, 0, 0);
    const int64_t grain = kWorthWaking / (spec_.positions * cols_ * (spec_.hadamard ? 1 : draws_) + 1) + 1;
    bool failed = false;
    parallel(threads, samples, grain, [&](int64_t begin, int64_t end) {
        Unit unit(spec_, spec_.hadamard ? layout.size() + width_ + 16 : draws_);
        if (!unit.sums.data()) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t sample = begin; sample < end; ++sample) {
            if (spec_.hadamard)
                add_orthogonal(unit, sample, layout);
            else
                add_draws(unit, sample);
            for (int64_t d = draws_; d < copies_; ++d)
                *at<float>(t_[kOut], 0, d, sample) = -*at<float>(t_[kOut], 0, d - draws_, sample);
        }
    });
    return failed ? ULR_OUT_OF_MEMORY : ULR_OK;
}

}  // namespace

int noise_dot(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    return Pass(*spec, tensors).run(where->threads);
}

}  // namespace ULR_ISA
}  // namespace ulr

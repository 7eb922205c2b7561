// W' = round(fma(sigma, eps, W)) for some draws: a panel of a weight's rows in order, or the gathered rows of an
// embedding.
#include "dispatch.h"
#include "perturbed_noise.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

enum Argument {
    kY,             // [D, R, K], columns of unit stride
    kMinusY,        // the second copies'; absent: not antithetic
    kWeight,        // [1, N, K]
    kSigma,         // fp32 scalar
    kMask,          // uint8 [1, N, K]: noise only where it is set; absent: everywhere
    kIndices,       // int64 [1, 1 or D, R]: rows of the weight; absent: its first R in order
    kMinusIndices,  // the second copies'; absent: as the first ones'
};
enum { kNoiseRank };  // 0: full

constexpr int64_t kWorthWaking = 1 << 14;  // values that a thread should make at a time

class Weights {
  public:
    Weights(const ulr_noise_spec& spec, const ulr_tensor* tensors, int64_t rank)
        : spec_(spec),
          t_(tensors),
          rank_(rank),
          rows_(t_[kY].size[1]),
          cols_(t_[kY].size[2]),
          width_(std::clamp<int64_t>(cols_, 1, kTileColumns)),
          height_(std::min(std::max<int64_t>(rows_, 1), Tile::capacity(spec, width_))),
          by_row_key_(fold_in(*spec.key, kRowFactorStream)),
          by_row_(spec) {
        by_row_.key = &by_row_key_;
    }

    int run(int threads);

  private:
    struct Unit {
        Unit(const ulr_noise_spec& spec, int64_t rank, int64_t cols)
            : tile(spec), by_col(spec, kColFactorStream, rank, rank ? cols : 0), a(rank) {}
        Tile tile;
        Factor by_col;
        Scratch a;  // the column of A^T that belongs to a row of the weight, [r]
        alignas(64) float eps[kTileColumns + kLanes];
        alignas(64) float widened[kTileColumns + kLanes];
    };

    bool has(Argument a) const { return t_[a].data != nullptr; }
    int64_t source_row(Argument indices, int64_t draw, int64_t row) const {
        return has(indices) ? *at<int64_t>(t_[indices], 0, t_[indices].size[1] == 1 ? 0 : draw, row) : row;
    }
    void make_a(Unit& unit, int64_t draw, int64_t row) const;
    template <typename T>
    void rows(Unit& unit, int64_t draw, int64_t first, int64_t last, Argument indices, bool plus, bool minus) const;
    template <typename T>
    void block(Unit& unit, int64_t draw, int64_t first, int64_t last) const;

    const ulr_noise_spec& spec_;
    const ulr_tensor* t_;
    const int64_t rank_, rows_, cols_, width_, height_;
    const int64_t by_row_key_;
    ulr_noise_spec by_row_;
};

void Weights::make_a(Unit& unit, int64_t draw, int64_t row) const {
    Tile tile(by_row_);
    const int64_t most = Tile::capacity(by_row_, 1);
    for (int64_t j = 0; j < rank_; j += most) {
        const int64_t ranks = std::min(most, rank_ - j);
        tile.make({draw, j, row, 1, ranks, 1});
        for (int64_t i = 0; i < ranks; ++i) unit.a.data()[j + i] = *tile.row(0, i);
    }
}

// Rows first ... last for the copies that gather the rows `indices` of the weight: y, minus_y, or both.
template <typename T>
void Weights::rows(Unit& unit, int64_t draw, int64_t first, int64_t last, Argument indices, bool plus,
                   bool minus) const {
    const float sigma = sigma_of(t_[kSigma]);
    const auto write = [&](const float* eps, int64_t r, int64_t from, int64_t col, int64_t cols) {
        if (plus)
            perturb_row(t_[kWeight], t_[kMask], from, col, cols, eps, sigma, at<T>(t_[kY], draw, r, col), unit.widened);
        if (minus)
            perturb_row(t_[kWeight], t_[kMask], from, col, cols, eps, -sigma, at<T>(t_[kMinusY], draw, r, col),
                        unit.widened);
    };
    if (rank_) unit.by_col.use(spec_.draw + draw);
    const int64_t step = rank_ || has(indices) ? 1 : last - first;  // rows of a tile
    for (int64_t r = first; r < last; r += step) {
        const int64_t from = source_row(indices, draw, r), row = spec_.row_offset + from;
        if (rank_) make_a(unit, spec_.draw + draw, row);
        for (int64_t col = 0; col < cols_; col += width_) {
            const int64_t cols = std::min(width_, cols_ - col);
            if (rank_) {
                low_rank_row(unit.by_col, unit.a.data(), rank_, col, cols, unit.eps);
                write(unit.eps, r, from, col, cols);
            } else {
                unit.tile.make({spec_.draw + draw, row, spec_.col_offset + col, 1, step, cols});
                for (int64_t i = 0; i < step; ++i) write(unit.tile.row(0, i), r + i, from + i, col, cols);
            }
        }
    }
}

template <typename T>
void Weights::block(Unit& unit, int64_t draw, int64_t first, int64_t last) const {
    if (has(kMinusIndices)) {  // other rows of the weight, so other noise
        rows<T>(unit, draw, first, last, kIndices, true, false);
        rows<T>(unit, draw, first, last, kMinusIndices, false, true);
    } else {
        rows<T>(unit, draw, first, last, kIndices, true, has(kMinusY));
    }
}

int Weights::run(int threads) {
    if (!rows_ || !cols_) return ULR_OK;
    const int64_t down = (rows_ + height_ - 1) / height_;
    int64_t grain = kWorthWaking / (width_ * height_) + 1;
    if (rank_) grain *= 4;  // each turn of a thread makes B anew
    bool failed = false;
    parallel(threads, down * t_[kY].size[0], grain, [&](int64_t first, int64_t last) {
        Unit unit(spec_, rank_, cols_);
        if (rank_ && (unit.by_col.failed() || !unit.a.data())) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = i % down * height_, end = std::min(row + height_, rows_);
            switch (t_[kY].dtype) {
                case ULR_F32:
                    block<float>(unit, i / down, row, end);
                    break;
                case ULR_BF16:
                    block<Bf16>(unit, i / down, row, end);
                    break;
                default:
                    block<Half>(unit, i / down, row, end);
            }
        }
    });
    return failed ? ULR_OUT_OF_MEMORY : ULR_OK;
}

}  // namespace

int perturbed_weight(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    return Weights(*spec, tensors, where->numbers[kNoiseRank]).run(where->threads);
}

}  // namespace ULR_ISA
}  // namespace ulr

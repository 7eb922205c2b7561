// noise_score and scale_shift_grad_, in one pass over the noise: scores, weighted by the losses and summed over copies;
// their sums over rows, with and without x. Absent tensors are not computed.
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
    kScores,        // fp32 [1, a, N, b, c]: sum over copies of loss_weight * score / sigma
    kX,             // [1 or C, a, N, b, c]
    kLossWeight,    // fp32 [1, C, weights]; each is that of rows / weights rows, which follow one another
    kSigma,         // [1, 1, N], fp32
    kWeightSums,    // fp32 [1, 1, N] += loss_weight * score / sigma * x, summed over copies and rows
    kBiasSums,      // likewise, without x
    kLogSigmaSums,  // likewise, of loss_weight * (eps * score - 1)
};
constexpr int kKinds = 3;  // of sums

constexpr int64_t kColumns = 128, kChannelColumns = 32;  // of a tile, as memory runs along columns or along rows
constexpr int64_t kMostPieces = 256;                     // of the rows, each with sums of its own
constexpr int64_t kWorthWaking = 1 << 14;

class Pass {
  public:
    Pass(const ulr_noise_spec& spec, const ulr_tensor* tensors)
        : spec_(spec), t_(tensors), scores_(t_[kScores]), x_(t_[kX]) {
        const Grid& grid = scores_.given() ? scores_ : x_;
        rows_ = grid.rows();
        cols_ = grid.cols();
        copies_ = t_[kLossWeight].size[1];
        draws_ = spec.antithetic ? copies_ / 2 : copies_;
        shared_ = x_.copies() == 1;
        width_ = std::clamp<int64_t>(cols_, 1, grid.along_rows() ? kChannelColumns : kColumns);
        // The split into tiles is that of the widest lanes, so that all instruction sets sum in one order.
        pitch_ = (width_ + 15) / 16 * 16;
        const int64_t fits = std::min(Tile::capacity(spec, width_), kTileFloats / pitch_);
        height_ = std::min(rows_, fits);
        depth_ = std::clamp<int64_t>(fits / std::max<int64_t>(1, height_), 1, draws_);
    }

    int run(int threads);

  private:
    // A thread's scratch for a tile, and its sums over tiles.
    struct Unit {
        explicit Unit(const ulr_noise_spec& spec) : tile(spec) {}
        Tile tile;
        int64_t row, col, rows, cols;
        alignas(64) float sigma[kColumns];
        alignas(64) float scores[kTileFloats];
        alignas(64) float x[kTileFloats];
        alignas(64) float scratch[kTileFloats];
        alignas(64) float sums[kKinds][kColumns];
    };

    bool has(Argument a) const { return t_[a].data != nullptr; }
    int64_t rows_of_weight() const { return rows_ / t_[kLossWeight].size[2]; }
    float weight(int64_t copy, int64_t row) const {
        return *at<float>(t_[kLossWeight], 0, copy, row / rows_of_weight());
    }
    void load_x(Unit& unit, int64_t copy) const {
        x_.load(copy, unit.row, unit.rows, unit.col, unit.cols, unit.x, pitch_);
    }
    void add_draws(Unit& unit, int64_t draw, int64_t draws) const;
    void add_orthogonal(Unit& unit, const OrthogonalSums& weights) const;
    void add_own_x(Unit& unit, int64_t draw, int64_t draws, int64_t copy, float sign) const;
    void finish_tile(Unit& unit) const;

    const ulr_noise_spec& spec_;
    const ulr_tensor* t_;
    const Grid scores_, x_;
    int64_t rows_, cols_, copies_, draws_, width_, pitch_, height_, depth_;
    bool shared_;
};

void Pass::add_draws(Unit& unit, int64_t draw, int64_t draws) const {
    const bool laplace = spec_.dist == ULR_LAPLACE;
    for (int64_t d = 0; d < draws; ++d) {
        for (int64_t r = 0; r < unit.rows; ++r) {
            const float* eps = unit.tile.row(d, r);
            const float plus = weight(draw + d, unit.row + r);
            const float minus = spec_.antithetic ? weight(draw + d + draws_, unit.row + r) : 0.0f;
            const F pair = set(plus - minus);  // the score is odd
            float* to = unit.scores + r * pitch_;
            for (int64_t c = 0; c < unit.cols; c += kLanes)
                store(to + c, fma(pair, score(load(eps + c), laplace), load(to + c)));
            if (!has(kLogSigmaSums)) continue;
            const F both = set(plus + minus), one = set(1.0f);  // eps * score is even
            for (int64_t c = 0; c < unit.cols; c += kLanes) {
                const F value = load(eps + c), term = value * score(value, laplace) - one;
                store(unit.sums[2] + c, fma(both, term, load(unit.sums[2] + c)));
            }
        }
    }
}

// All draws, where they are orthogonal: one transform of a sample's weights stands for them.
void Pass::add_orthogonal(Unit& unit, const OrthogonalSums& weights) const {
    for (int64_t block = 0; block < weights.blocks(); ++block) {
        unit.tile.make(
            {weights.first(block), spec_.row_offset + unit.row, spec_.col_offset + unit.col, 1, unit.rows, unit.cols});
        for (int64_t r = 0; r < unit.rows; ++r) {
            const uint32_t slot = hadamard_slot(spec_, spec_.row_offset + unit.row + r, spec_.col_offset + unit.col);
            const float* h = weights.from(block, (unit.row + r) / rows_of_weight(), slot);
            const float* eps = unit.tile.row(0, r);
            float* to = unit.scores + r * pitch_;
            for (int64_t c = 0; c < unit.cols; c += kLanes)
                store(to + c, fma(load(h + c), load(eps + c), load(to + c)));
        }
    }
}

// The weight's sums where each copy has its own x: of one copy of each draw, from `copy` on.
void Pass::add_own_x(Unit& unit, int64_t draw, int64_t draws, int64_t copy, float sign) const {
    const bool laplace = spec_.dist == ULR_LAPLACE;
    for (int64_t d = 0; d < draws; ++d) {
        load_x(unit, copy + draw + d);
        for (int64_t r = 0; r < unit.rows; ++r) {
            const F w = set(sign * weight(copy + draw + d, unit.row + r));
            for (int64_t c = 0; c < unit.cols; c += kLanes) {
                const F weighted = w * score(load(unit.tile.row(d, r) + c), laplace);
                store(unit.sums[0] + c, fma(weighted, load(unit.x + r * pitch_ + c), load(unit.sums[0] + c)));
            }
        }
    }
}

void Pass::finish_tile(Unit& unit) const {
    if (scores_.given()) {
        scores_.store(0, unit.row, unit.rows, unit.col, unit.cols, unit.scratch, pitch_,
                      [&](int64_t r, int64_t c) __attribute__((always_inline)) {
                          return load(unit.scores + r * pitch_ + c) / load(unit.sigma + c);
                      });
        return;
    }
    const bool by_weight = has(kWeightSums) && shared_;
    if (by_weight) load_x(unit, 0);
    for (int64_t r = 0; r < unit.rows; ++r) {
        for (int64_t c = 0; c < unit.cols; c += kLanes) {
            const F value = load(unit.scores + r * pitch_ + c);
            if (by_weight) store(unit.sums[0] + c, fma(value, load(unit.x + r * pitch_ + c), load(unit.sums[0] + c)));
            store(unit.sums[1] + c, load(unit.sums[1] + c) + value);
        }
    }
}

int Pass::run(int threads) {
    if (!rows_ || !cols_) return ULR_OK;
    const auto pieces = [](int64_t extent, int64_t size) { return (extent + size - 1) / size; };
    const int64_t across = pieces(cols_, width_), tiles = pieces(rows_, height_);
    const int64_t tiles_of_piece = pieces(tiles, kMostPieces), down = pieces(tiles, tiles_of_piece);
    // Each piece has sums over its rows, which are added up in the order of rows, whichever thread made them.
    const Scratch partial(scores_.given() ? 0 : kKinds * down * cols_);
    if (!scores_.given() && !partial.data()) return ULR_OUT_OF_MEMORY;
    const bool orthogonal = spec_.hadamard && (!has(kWeightSums) || shared_);
    OrthogonalSums weights(spec_.draw, draws_, orthogonal ? t_[kLossWeight].size[2] : 0, width_);
    if (weights.failed()) return ULR_OUT_OF_MEMORY;
    weights.make(threads, [&](int64_t i, int64_t d) {
        const float minus = spec_.antithetic ? *at<float>(t_[kLossWeight], 0, d + draws_, i) : 0.0f;
        return *at<float>(t_[kLossWeight], 0, d, i) - minus;  // the score is odd
    });
    const int64_t grain = kWorthWaking / (width_ * height_ * tiles_of_piece * draws_) + 1;
    parallel(threads, across * down, grain, [&](int64_t first, int64_t last) {
        Unit unit(spec_);
        for (int64_t i = first; i < last; ++i) {
            const int64_t piece = i % down;
            unit.col = i / down * width_;
            unit.cols = std::min(width_, cols_ - unit.col);
            load_sigma(t_[kSigma], unit.col, unit.cols, pitch_, unit.sigma);
            memset(unit.sums, 0, sizeof unit.sums);
            const int64_t last_tile = std::min(tiles, (piece + 1) * tiles_of_piece);
            for (int64_t tile = piece * tiles_of_piece; tile < last_tile; ++tile) {
                unit.row = tile * height_;
                unit.rows = std::min(height_, rows_ - unit.row);
                memset(unit.scores, 0, static_cast<size_t>(unit.rows * pitch_) * sizeof(float));
                if (orthogonal) add_orthogonal(unit, weights);
                for (int64_t draw = 0; !orthogonal && draw < draws_; draw += depth_) {
                    const int64_t draws = std::min(depth_, draws_ - draw);
                    unit.tile.make({spec_.draw + draw, spec_.row_offset + unit.row, spec_.col_offset + unit.col, draws,
                                    unit.rows, unit.cols});
                    add_draws(unit, draw, draws);
                    if (!has(kWeightSums) || shared_) continue;
                    add_own_x(unit, draw, draws, 0, 1.0f);
                    if (spec_.antithetic) add_own_x(unit, draw, draws, draws_, -1.0f);
                }
                finish_tile(unit);
            }
            for (int kind = 0; kind < kKinds && partial.data(); ++kind)
                for (int64_t c = 0; c < unit.cols; ++c)
                    partial.data()[(piece * kKinds + kind) * cols_ + unit.col + c] =
                        kind == kKinds - 1 ? unit.sums[kind][c] : unit.sums[kind][c] / unit.sigma[c];
        }
    });
    for (int kind = 0; kind < kKinds; ++kind) {
        const Argument sums = static_cast<Argument>(kWeightSums + kind);
        if (has(sums)) add_pieces(t_[sums], partial.data() + kind * cols_, down, kKinds * cols_, cols_);
    }
    return ULR_OK;
}

}  // namespace

int noise_score(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    return Pass(*spec, tensors).run(where->threads);
}

}  // namespace ULR_ISA
}  // namespace ulr

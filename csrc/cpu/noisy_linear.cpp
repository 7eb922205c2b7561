// noisy_linear, noisy_linear_grad_ and noisy_linear_recompute_ without their matrix product, in one pass over the
// noise. Forward: y = base + sigma * eps. Gradient: scores, weighted by the losses, and their sums over rows.
// noisy.h lists its arguments; rows of y, base and scores have unit stride.
#include <algorithm>

#include "dispatch.h"
#include "noisy_pass.h"
#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

constexpr int64_t kScoreColumns = 128;  // narrower tiles have more rows, so fewer partial sums over rows are kept

class Pass : public NoisyPass<Pass> {
  public:
    Pass(const ulr_noise_spec& spec, const ulr_tensor* tensors) : NoisyPass(spec, tensors) {
        const bool scores = has(kLossWeight);
        rows_ = t_[scores ? kScores : kY].size[1];
        width_ = std::clamp<int64_t>(cols_, 1, scores ? kScoreColumns : spec.hadamard ? kPlaces : kTileColumns);
        const int64_t fits = Tile::capacity(spec, width_);
        height_ = std::min({rows_, fits, kTileFloats / pitch()});
        depth_ = std::max<int64_t>(1, fits / std::max<int64_t>(1, height_));
    }

    struct Unit : NoisyUnit {
        explicit Unit(const ulr_noise_spec& spec) : tile(spec) {}
        Tile tile;
        alignas(64) float sigma[kTileColumns];
        alignas(64) float score_sums[kTileFloats];  // [rows, pitch]: loss_weight * score over the draws
        alignas(64) float log_sigma_sums[kScoreColumns];
        OrthogonalDraws orthogonal;
    };

    void open(Unit& unit, bool is_new) const;
    void prefetch(const Unit& unit, int64_t draw, int64_t draws) const;
    template <typename Y, typename Base, typename Noise>
    void forward(const Unit& unit, int64_t draw, int64_t draws, Noise noise) const;
    void gradient(Unit& unit, int64_t draw, int64_t draws) const;
    template <typename Y, typename Base>
    void forward_orthogonal(Unit& unit, int64_t draw, int64_t draws) const;
    void add_orthogonal(Unit& unit, const OrthogonalSums& weights, int64_t block) const;
    void finish_gradient(Unit& unit, float* bias_sums, float* log_sigma_sums) const;

  private:
    // The split into units is that of the widest lanes, so that all instruction sets sum in one order.
    int64_t pitch() const { return (width_ + 15) / 16 * 16; }
    int64_t rows_together(const Unit& unit) const;
    uint32_t slot(const Unit& unit, int64_t row) const {
        return hadamard_slot(spec_, spec_.row_offset + unit.row + row, spec_.col_offset + unit.col);
    }
    float weight(NoisyArgument a, int64_t draw, int64_t row) const {
        return *at<float>(t_[a], 0, draw, row / rows_of_weight());
    }
};

void Pass::open(Unit& unit, bool is_new) const {
    if (is_new) load_sigma(t_[kSigma], unit.col, unit.cols, pitch(), unit.sigma);
    if (!has(kLossWeight)) return;
    memset(unit.score_sums, 0, static_cast<size_t>(unit.rows * pitch()) * sizeof(float));
    memset(unit.log_sigma_sums, 0, sizeof unit.log_sigma_sums);
}

// Prefetches the base of a tile, which the product left in a far cache, while the noise is made.
void Pass::prefetch(const Unit& unit, int64_t draw, int64_t draws) const {
    constexpr int64_t kLine = 64;
    const ulr_tensor& base = t_[kBase];
    const bool shared = base.size[0] == 1;
    if (shared && draw > 0) return;  // an earlier draw has read it
    const int64_t size = base.dtype == ULR_F32 ? 4 : 2;
    for (int64_t d = 0; d < (shared ? 1 : draws); ++d) {
        for (int64_t r = 0; r < unit.rows; ++r) {
            const int64_t first = (shared ? 0 : draw + d) * base.stride[0] + (unit.row + r) * base.stride[1] + unit.col;
            const char* row = static_cast<const char*>(base.data) + first * size;
            for (int64_t byte = 0; byte < unit.cols * size; byte += kLine) __builtin_prefetch(row + byte, 1);
        }
    }
}

// The noise is a local copy, so that its state stays in registers.
template <typename Y, typename Base, typename Noise>
void Pass::forward(const Unit& unit, int64_t draw, int64_t draws, Noise noise) const {
    const U sign = set(0x80000000u);
    for (int64_t d = 0; d < draws; ++d) {
        const int64_t shared = t_[kBase].size[0] == 1 ? 0 : draw + d;
        for (int64_t r = 0; r < unit.rows; ++r) {
            const auto eps = noise(d, r);
            const Base* base = at<Base>(t_[kBase], shared, unit.row + r, unit.col);
            Y* y = at<Y>(t_[kY], draw + d, unit.row + r, unit.col);
            if (!antithetic_) {
                by_lanes(unit.cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                    store_part(y + c, fma(load(unit.sigma + c), eps(c), load_part(base + c, n)), n);
                });
                continue;
            }
            const Base* minus_base = has(kMinusBase) ? at<Base>(t_[kMinusBase], shared, unit.row + r, unit.col) : base;
            Y* minus_y = at<Y>(t_[kMinusY], draw + d, unit.row + r, unit.col);
            by_lanes(unit.cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                const F sigma = load(unit.sigma + c), value = eps(c);
                const F plus = load_part(base + c, n), minus = load_part(minus_base + c, n);
                store_part(y + c, fma(sigma, value, plus), n);
                store_part(minus_y + c, fma(sigma, as_float(bits(value) ^ sign), minus), n);
            });
        }
    }
}

void Pass::gradient(Unit& unit, int64_t draw, int64_t draws) const {
    const bool laplace = spec_.dist == ULR_LAPLACE, sums = summed_ || has(kBiasSums);
    const auto score = [&](F eps) __attribute__((always_inline)) { return ulr::score(eps, laplace); };
    for (int64_t d = 0; d < draws; ++d) {
        for (int64_t r = 0; r < unit.rows; ++r) {
            const float* eps = unit.tile.row(d, r);
            const float plus = weight(kLossWeight, draw + d, unit.row + r);
            const float minus = antithetic_ ? weight(kMinusLossWeight, draw + d, unit.row + r) : 0.0f;
            if (sums) {
                const F pair = set(plus - minus);  // the score is odd
                float* to = unit.score_sums + r * pitch();
                for (int64_t c = 0; c < unit.cols; c += kLanes)
                    store(to + c, fma(pair, score(load(eps + c)), load(to + c)));
            }
            if (has(kLogSigmaSums)) {
                const F pair = set(plus + minus), one = set(1.0f);  // eps * score is even
                for (int64_t c = 0; c < unit.cols; c += kLanes) {
                    const F value = load(eps + c);
                    const F term = value * score(value) - one;
                    store(unit.log_sigma_sums + c, fma(pair, term, load(unit.log_sigma_sums + c)));
                }
            }
            if (summed_) continue;
            const auto write = [&](NoisyArgument scores, float loss_weight) {
                float* to = at<float>(t_[scores], draw + d, unit.row + r, unit.col);
                const F w = set(loss_weight);
                by_lanes(unit.cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                    store_part(to + c, w * score(load(eps + c)) / load(unit.sigma + c), n);
                });
            };
            write(kScores, plus);
            if (antithetic_) write(kMinusScores, -minus);
        }
    }
}

// Rows that follow one another in all tensors are one run of places.
int64_t Pass::rows_together(const Unit& unit) const {
    for (const NoisyArgument a : {kY, kMinusY, kBase, kMinusBase})
        if (has(a) && t_[a].stride[1] != unit.cols) return 1;
    return std::max<int64_t>(1, kPlaces / unit.cols);
}

template <typename Y, typename Base>
void Pass::forward_orthogonal(Unit& unit, int64_t draw, int64_t draws) const {
    OrthogonalDraws& noise = unit.orthogonal;
    const bool own_base = t_[kBase].size[0] > 1;
    const int64_t skipped = draw - spec_.draw, together = rows_together(unit);
    for (int64_t first = 0; first < unit.rows; first += together) {
        const int64_t rows = std::min(together, unit.rows - first);
        for (int64_t r = 0; r < rows; ++r) {
            uint32_t* slots = noise.slots() + r * unit.cols;
            float* values = noise.values() + r * unit.cols;
            const auto from = slot(unit, first + r);
            for (int64_t c = 0; c < unit.cols; ++c) slots[c] = from + static_cast<uint32_t>(c);
            for (int64_t c = 0; c < unit.cols; c += kLanes)  // past its end a row is overwritten by the next one
                store(values + c, load(unit.sigma + c) * load(unit.tile.row(0, first + r) + c));
        }
        const auto place = [&](NoisyArgument a, int64_t d, auto element) {
            return at<decltype(element)>(t_[a], d, unit.row + first, unit.col);
        };
        noise.use(draw, draws, rows * unit.cols, [&](int64_t d) __attribute__((always_inline)) {
            const int64_t copy = skipped + d, of = own_base ? copy : 0;
            Y *const y = place(kY, copy, Y{}), *const minus_y = antithetic_ ? place(kMinusY, copy, Y{}) : nullptr;
            const Base* const base = place(kBase, of, Base{});
            const Base* const minus_base = has(kMinusBase) ? place(kMinusBase, of, Base{}) : base;
            return adds_to(y, base, minus_y, minus_base);
        });
    }
}

void Pass::add_orthogonal(Unit& unit, const OrthogonalSums& weights, int64_t block) const {
    for (int64_t r = 0; r < unit.rows; ++r) {
        const float* h = weights.from(block, (unit.row + r) / rows_of_weight(), slot(unit, r));
        const float* eps = unit.tile.row(0, r);
        float* to = unit.score_sums + r * pitch();
        for (int64_t c = 0; c < unit.cols; c += kLanes) store(to + c, fma(load(h + c), load(eps + c), load(to + c)));
    }
}

// Scores that are summed over draws, and this unit's sums over its rows.
void Pass::finish_gradient(Unit& unit, float* bias_sums, float* log_sigma_sums) const {
    for (int64_t r = 0; r < unit.rows; ++r) {
        const float* from = unit.score_sums + r * pitch();
        float* to = summed_ ? at<float>(t_[kScores], 0, unit.row + r, unit.col) : nullptr;
        by_lanes(unit.cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            const F value = load(from + c) / load(unit.sigma + c);
            if (to) store_part(to + c, value, n);
            if (bias_sums) store_part(bias_sums + c, load_part(bias_sums + c, n) + value, n);
        });
    }
    if (log_sigma_sums) memcpy(log_sigma_sums, unit.log_sigma_sums, static_cast<size_t>(unit.cols) * sizeof(float));
}

}  // namespace

int noisy_linear(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    return Pass(*spec, tensors).run(where->threads);
}

}  // namespace ULR_ISA
}  // namespace ulr

// The pass over the noise of the noisy convolutions for contiguous pixels of a channel (NCHW), like noisy_linear.cpp
// for contiguous columns of a row. Rows are (image, pixel), columns are channels.
#include <algorithm>

#include "channel_tile.h"
#include "dispatch.h"
#include "noisy_pass.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

// Tensors of [D, R, N] come as [D, images, N, 1, pixels], pixels of unit stride.
class ChannelPass : public NoisyPass<ChannelPass> {
  public:
    ChannelPass(const ulr_noise_spec& spec, const ulr_tensor* tensors) : NoisyPass(spec, tensors) {
        const ulr_tensor& images = t_[has(kLossWeight) ? kScores : kY];
        pixels_ = images.size[4];
        rows_ = images.size[1] * pixels_;
        if (!rows_ || !cols_) return;
        width_ = ChannelTile::width(spec, cols_);
        const int64_t fits = ChannelTile::height(spec, width_);
        height_ = std::min(rows_, fits);
        // More draws where there are few rows; Sobol's words are one draw's each.
        depth_ = spec.sobol ? 1 : std::max<int64_t>(1, fits / ((height_ + 15) / 16 * 16));
    }

    struct Unit : NoisyUnit {
        explicit Unit(const ulr_noise_spec& spec) : tile(spec) {}
        ChannelTile tile;
        int64_t pitch;  // of a channel in the sums below
        alignas(64) float sigma[kSignColumns];
        alignas(64) float scores[kTileFloats];     // [cols, pitch]: loss_weight * score over the draws
        alignas(64) float log_sigma[kTileFloats];  // [cols, pitch]: loss_weight * (eps * score - 1), likewise
        alignas(64) float plus[kMostRows], minus[kMostRows];  // of each row: the loss weights of a draw
        OrthogonalDraws orthogonal;
    };

    void open(Unit& unit, bool is_new) const;
    void prefetch(const Unit&, int64_t, int64_t) const {}  // a channel's pixels are read in their order
    template <typename Y, typename Base, typename Noise>
    void forward(const Unit& unit, int64_t draw, int64_t draws, Noise noise) const;
    void gradient(Unit& unit, int64_t draw, int64_t draws) const;
    template <typename Y, typename Base>
    void forward_orthogonal(Unit& unit, int64_t draw, int64_t draws) const;
    void add_orthogonal(Unit& unit, const OrthogonalSums& weights, int64_t block) const;
    void finish_gradient(Unit& unit, float* bias_sums, float* log_sigma_sums) const;

  private:
    // Where the pixels of a draw's channel start: those of the first image.
    template <typename T>
    T* channel(NoisyArgument a, int64_t draw, int64_t channel) const {
        return at<T>(t_[a], t_[a].size[0] == 1 ? 0 : draw, 0, channel);
    }
    // body(image, pixel, r, n): the unit's rows r ... r + n - 1 are an image's pixels from `pixel` on.
    template <typename Body>
    inline __attribute__((always_inline)) void runs(const Unit& unit, Body body) const {
        int64_t image = unit.row / pixels_, pixel = unit.row % pixels_;
        for (int64_t r = 0; r < unit.rows; ++image, pixel = 0) {
            const int64_t n = std::min(pixels_ - pixel, unit.rows - r);
            body(image, pixel, r, n);
            r += n;
        }
    }

    void load_slots(const Unit& unit, int64_t col, int64_t row, int64_t count, uint32_t* to) const;
    void load_weights(NoisyArgument a, int64_t draw, const Unit& unit, float* to) const;

    int64_t pixels_ = 0;
};

void ChannelPass::open(Unit& unit, bool is_new) const {
    unit.pitch = (unit.rows + 15) / 16 * 16;  // of the widest lanes, so that all instruction sets make the same sums
    if (is_new) load_sigma(t_[kSigma], unit.col, unit.cols, unit.cols, unit.sigma);
    if (!has(kLossWeight)) return;
    std::fill_n(unit.scores, unit.cols * unit.pitch, 0.0f);
    std::fill_n(unit.log_sigma, unit.cols * unit.pitch, 0.0f);
}

template <typename Y, typename Base, typename Noise>
void ChannelPass::forward(const Unit& unit, int64_t draw, int64_t draws, Noise noise) const {
    const auto add = [&](NoisyArgument to, NoisyArgument base, int64_t d, int64_t c, float sigma) {
        const auto eps = noise(d, c);
        const F scale = set(sigma);
        Y* const y = channel<Y>(to, draw + d, unit.col + c);
        const Base* const clean = channel<Base>(base, draw + d, unit.col + c);
        runs(unit, [&](int64_t image, int64_t pixel, int64_t r, int64_t n) __attribute__((always_inline)) {
            Y* const out = y + image * t_[to].stride[1] + pixel;
            const Base* const in = clean + image * t_[base].stride[1] + pixel;
            by_lanes(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
                store_part(out + i, fma(scale, eps(r + i), load_part(in + i, lanes)), lanes);
            });
        });
    };
    for (int64_t d = 0; d < draws; ++d) {
        for (int64_t c = 0; c < unit.cols; ++c) {
            add(kY, kBase, d, c, unit.sigma[c]);
            if (antithetic_) add(kMinusY, has(kMinusBase) ? kMinusBase : kBase, d, c, -unit.sigma[c]);
        }
    }
}

// The loss weight of each of the unit's rows, zeros up to the pitch.
void ChannelPass::load_weights(NoisyArgument a, int64_t draw, const Unit& unit, float* to) const {
    for (int64_t r = 0; r < unit.rows;) {
        const int64_t weight = (unit.row + r) / rows_of_weight();
        const int64_t end = std::min(unit.rows, (weight + 1) * rows_of_weight() - unit.row);
        std::fill(to + r, to + end, *at<float>(t_[a], 0, draw, weight));
        r = end;
    }
    std::fill(to + unit.rows, to + unit.pitch, 0.0f);
}

void ChannelPass::gradient(Unit& unit, int64_t draw, int64_t draws) const {
    const bool laplace = spec_.dist == ULR_LAPLACE, sums = summed_ || has(kBiasSums);
    for (int64_t d = 0; d < draws; ++d) {
        load_weights(kLossWeight, draw + d, unit, unit.plus);
        if (antithetic_)
            load_weights(kMinusLossWeight, draw + d, unit, unit.minus);
        else
            std::fill_n(unit.minus, unit.pitch, 0.0f);
        for (int64_t c = 0; c < unit.cols; ++c) {
            const float* eps = unit.tile.channel(d, c);
            float *scores = unit.scores + c * unit.pitch, *log_sigma = unit.log_sigma + c * unit.pitch;
            for (int64_t r = 0; sums && r < unit.pitch; r += kLanes) {
                const F pair = load(unit.plus + r) - load(unit.minus + r);  // the score is odd
                store(scores + r, fma(pair, score(load(eps + r), laplace), load(scores + r)));
            }
            for (int64_t r = 0; has(kLogSigmaSums) && r < unit.pitch; r += kLanes) {
                const F pair = load(unit.plus + r) + load(unit.minus + r);  // eps * score is even
                const F value = load(eps + r), term = value * score(value, laplace) - set(1.0f);
                store(log_sigma + r, fma(pair, term, load(log_sigma + r)));
            }
            if (summed_) continue;
            const auto write = [&](NoisyArgument to, const float* weights, float sigma) {
                const F scale = set(sigma);
                float* const s = channel<float>(to, draw + d, unit.col + c);
                runs(unit, [&](int64_t image, int64_t pixel, int64_t r, int64_t n) __attribute__((always_inline)) {
                    float* const out = s + image * t_[to].stride[1] + pixel;
                    by_lanes(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
                        const F weighted = load_part(weights + r + i, lanes) * score(load(eps + r + i), laplace);
                        store_part(out + i, weighted / scale, lanes);
                    });
                });
            };
            write(kScores, unit.plus, unit.sigma[c]);
            if (antithetic_) write(kMinusScores, unit.minus, -unit.sigma[c]);
        }
    }
}

// The sum of a channel's rows, in an order that is the same for all instruction sets.
inline float sum_of(const float* values, int64_t count) {
    float parts[16] = {};
    for (int64_t i = 0; i < count; i += 16)
        for (int64_t j = 0; j < 16; ++j) parts[j] += values[i + j];
    float sum = 0.0f;
    for (float part : parts) sum += part;
    return sum;
}

// The slots of `count` rows of a column, from a row of the unit on.
void ChannelPass::load_slots(const Unit& unit, int64_t col, int64_t row, int64_t count, uint32_t* to) const {
    const auto step = static_cast<uint32_t>(spec_.width | 1);
    for (int64_t r = 0; r < count;) {
        const int64_t at_row = spec_.row_offset + unit.row + row + r;
        const int64_t end = std::min(count, r + spec_.positions - at_row % spec_.positions);
        uint32_t slot = hadamard_slot(spec_, at_row, spec_.col_offset + unit.col + col);
        for (; r < end; ++r, slot += step) to[r] = slot;
    }
}

template <typename Y, typename Base>
void ChannelPass::forward_orthogonal(Unit& unit, int64_t draw, int64_t draws) const {
    OrthogonalDraws& noise = unit.orthogonal;
    const int64_t skipped = draw - spec_.draw;
    for (int64_t c = 0; c < unit.cols; ++c) {
        const F sigma = set(unit.sigma[c]);
        const float* eps = unit.tile.channel(0, c);
        runs(unit, [&](int64_t image, int64_t first, int64_t row, int64_t count) {
            for (int64_t done = 0; done < count; done += kPlaces) {
                const int64_t places = std::min(kPlaces, count - done), r = row + done, pixel = first + done;
                load_slots(unit, c, r, places, noise.slots());
                for (int64_t i = 0; i < places; i += kLanes) store(noise.values() + i, sigma * load(eps + r + i));
                const auto place = [&](NoisyArgument a, int64_t d, auto element) {
                    return channel<decltype(element)>(a, d, unit.col + c) + image * t_[a].stride[1] + pixel;
                };
                noise.use(draw, draws, places, [&](int64_t d) __attribute__((always_inline)) {
                    const int64_t copy = skipped + d;
                    Y *const y = place(kY, copy, Y{}), *const minus_y =
                                                           antithetic_ ? place(kMinusY, copy, Y{}) : nullptr;
                    const Base* const base = place(kBase, copy, Base{});
                    const Base* const minus_base = has(kMinusBase) ? place(kMinusBase, copy, Base{}) : base;
                    return adds_to(y, base, minus_y, minus_base);
                });
            }
        });
    }
}

void ChannelPass::add_orthogonal(Unit& unit, const OrthogonalSums& weights, int64_t block) const {
    uint32_t slots[kMostRows];
    const auto mask = static_cast<uint32_t>(weights.size() - 1);
    for (int64_t c = 0; c < unit.cols; ++c) {
        const float* eps = unit.tile.channel(0, c);
        float* scores = unit.scores + c * unit.pitch;
        load_slots(unit, c, 0, unit.rows, slots);
        for (int64_t r = 0; r < unit.rows;) {
            const int64_t weight = (unit.row + r) / rows_of_weight();
            const int64_t end = std::min(unit.rows, (weight + 1) * rows_of_weight() - unit.row);
            const float* h = weights.at(block, weight);
            for (; r < end; ++r) scores[r] = fmaf(h[slots[r] & mask], eps[r], scores[r]);
        }
    }
}

// Scores that are summed over draws, and this unit's sums over its rows.
void ChannelPass::finish_gradient(Unit& unit, float* bias_sums, float* log_sigma_sums) const {
    for (int64_t c = 0; c < unit.cols; ++c) {
        const float* scores = unit.scores + c * unit.pitch;
        if (summed_) {
            const F sigma = set(unit.sigma[c]);
            float* const to = channel<float>(kScores, 0, unit.col + c);
            runs(unit, [&](int64_t image, int64_t pixel, int64_t r, int64_t n) __attribute__((always_inline)) {
                float* const out = to + image * t_[kScores].stride[1] + pixel;
                by_lanes(n, [&](int64_t i, int64_t lanes) __attribute__((always_inline)) {
                    store_part(out + i, load_part(scores + r + i, lanes) / sigma, lanes);
                });
            });
        }
        if (bias_sums) bias_sums[c] = sum_of(scores, unit.pitch) / unit.sigma[c];
        if (log_sigma_sums) log_sigma_sums[c] = sum_of(unit.log_sigma + c * unit.pitch, unit.pitch);
    }
}

}  // namespace

int noisy_channels(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    return ChannelPass(*spec, tensors).run(where->threads);
}

}  // namespace ULR_ISA
}  // namespace ulr

// combine_: a step along the sum of many draws' noise, over a list of tensors; each is read and written once.
#include "dispatch.h"
#include "orthogonal.h"
#include "parameters.h"
#include "pass.h"

namespace ulr {
inline namespace ULR_ISA {

enum CombineTensor { kCombineKeys, kCoefficients, kLearningRate, kStep, kCombineFirst };
enum { kParameter, kFirstState, kSecondState, kTensorsOfOne };

// sum_p c_p eps(draw + p) of the tiles of one parameter.
class NoiseSum {
  public:
    NoiseSum(const ulr_noise_spec& spec, const Parameter& p, const ulr_tensor& coefficients,
             const OrthogonalSums& orthogonal)
        : spec_(spec),
          orthogonal_(orthogonal),
          width_(p.whole_width),
          noise_(spec, p),
          coefficients_(static_cast<const float*>(coefficients.data)),
          stride_(coefficients.stride[2]),
          count_(coefficients.size[2]) {}

    void make(Extent at) {
        pitch_ = (at.cols + kLanes - 1) / kLanes * kLanes;
        if (spec_.hadamard) return make_orthogonal(at);
        if (!count_) memset(sums_, 0, static_cast<size_t>(at.rows * pitch_) * sizeof(float));
        for (int64_t p = 0; p < count_; ++p, ++at.draw) {
            const F coefficient = set(coefficients_[p * stride_]);
            noise_.use(at, [&](auto row) __attribute__((always_inline)) {
                for (int64_t r = 0; r < at.rows; ++r) {
                    const auto eps = row(r);
                    float* sum = sums_ + r * pitch_;
                    for (int64_t c = 0; c < at.cols; c += kLanes)
                        store(sum + c, fma(coefficient, eps(c), p ? load(sum + c) : set(0.0f)));
                }
            });
        }
    }

    const float* row(int64_t row) const { return sums_ + row * pitch_; }

  private:
    void make_orthogonal(Extent at) {
        ulr_noise_spec spec = spec_;
        spec.width = width_;
        memset(sums_, 0, static_cast<size_t>(at.rows * pitch_) * sizeof(float));
        for (int64_t block = 0; block < orthogonal_.blocks(); ++block) {
            at.draw = orthogonal_.first(block);
            noise_.use(at, [&](auto row) __attribute__((always_inline)) {
                for (int64_t r = 0; r < at.rows; ++r) {
                    const auto eps = row(r);
                    const float* h = orthogonal_.from(block, 0, hadamard_slot(spec, at.row + r, at.col));
                    float* sum = sums_ + r * pitch_;
                    for (int64_t c = 0; c < at.cols; c += kLanes)
                        store(sum + c, fma(eps(c), load(h + c), load(sum + c)));
                }
            });
        }
    }

    const ulr_noise_spec& spec_;
    const OrthogonalSums& orthogonal_;
    const int64_t width_;
    ParameterNoise noise_;
    const float* const coefficients_;
    const int64_t stride_, count_;
    int64_t pitch_ = 0;
    alignas(64) float sums_[kTileFloats + 8 * kLanes];
};

// One vector of a tensor, given the sum of its noise; the states are read and written.
template <Rule rule>
F stepped(F old, F sum, float* first, float* second, int64_t n, const StepNumbers& with) {
    const F kept = fma(set(with.decay), old, old);
    if (rule == Rule::kSum) return kept + sum;
    if (rule == Rule::kMomentum) {
        const F velocity = fma(set(with.momentum), load_part(first, n), sum);
        store_part(first, velocity, n);
        return fma(set(with.rate), velocity, kept);
    }
    const F mean = fma(set(with.beta1), load_part(first, n), set(with.new1) * sum);
    const F square = fma(set(with.beta2), load_part(second, n), set(with.new2) * sum * sum);
    store_part(first, mean, n);
    store_part(second, square, n);
    return fma(set(with.rate), mean / (square_root(square) / set(with.root) + set(with.epsilon)), kept);
}

template <typename T, Rule rule>
void combine_tiles(const ulr_noise_spec& spec, const Parameter& p, int64_t first, int64_t last,
                   const ulr_tensor& coefficients, const OrthogonalSums& orthogonal, const StepNumbers& with,
                   bool stochastic) {
    NoiseSum sum(spec, p, coefficients, orthogonal);
    Rounding<T> rounding(spec, p, stochastic);
    // A missing state is replaced by the tensor itself, which is then only read.
    const ulr_tensor& one = p.tensors[rule == Rule::kSum ? kParameter : kFirstState];
    const ulr_tensor& two = p.tensors[rule == Rule::kAdam ? kSecondState : kParameter];
    for (int64_t i = first; i < last; ++i) {
        const Extent tile = p.tile(i), at = p.whole(tile, spec.draw);
        sum.make(at);
        rounding.make(at);
        for (int64_t r = 0; r < tile.rows; ++r) {
            const auto cols = rule == Rule::kSum ? 0 : tile.cols, cols2 = rule == Rule::kAdam ? tile.cols : 0;
            Columns<T> columns(p.tensors[kParameter], tile.row + r, tile.col, tile.cols);
            Columns<float> states(one, tile.row + r, tile.col, cols), more(two, tile.row + r, tile.col, cols2);
            T* to = columns.data();
            by_lanes(tile.cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                const F old = load_part(to + c, n), change = load(sum.row(r) + c);
                const F now = stepped<rule>(old, change, states.data() + c, more.data() + c, n, with);
                rounding.store(to + c, now, r, c, n);
            });
        }
    }
}

int combine_(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    const bool stochastic = where->numbers[kStochastic] != 0;
    const StepNumbers with = step_numbers(where->numbers, static_cast<const float*>(tensors[kLearningRate].data),
                                          static_cast<const int64_t*>(tensors[kStep].data));
    const Rule rule = static_cast<Rule>(where->numbers[kRule]);
    const Parameters list(*spec, tensors + kCombineFirst, kTensorsOfOne,
                          (where->tensors - kCombineFirst) / kTensorsOfOne, where->numbers + kFirst);
    const ulr_tensor& coefficients = tensors[kCoefficients];
    OrthogonalSums orthogonal(spec->draw, spec->hadamard ? coefficients.size[2] : 0, 1, kListColumns);
    if (orthogonal.failed()) return ULR_OUT_OF_MEMORY;
    orthogonal.make(1, [&](int64_t, int64_t d) { return *at<float>(coefficients, 0, 0, d); });
    list.for_each(where->threads, [&](const Parameter& p, int64_t first, int64_t last) {
        with_elements(p.tensors->dtype, [&](auto element) {
            using T = decltype(element);
            const auto tiles = rule == Rule::kSum        ? combine_tiles<T, Rule::kSum>
                               : rule == Rule::kMomentum ? combine_tiles<T, Rule::kMomentum>
                                                         : combine_tiles<T, Rule::kAdam>;
            tiles(*spec, p, first, last, coefficients, orthogonal, with, stochastic);
        });
    });
    return ULR_OK;
}

}  // namespace ULR_ISA
}  // namespace ulr

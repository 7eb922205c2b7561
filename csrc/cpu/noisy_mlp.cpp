// A pass of noisy_mlp_step: from the first layer's clean product to the losses of all copies. Layers follow one another
// on a block of rows, copies times samples, whose activations stay near the core; one product makes a layer's rows.
#include <algorithm>

#include "dispatch.h"
#include "exponential.h"
#include "parallel.h"
#include "pass.h"
#include "tile.h"
#include "ulr/mlp.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

enum Argument {
    kLosses,  // fp32 [1, C, R]
    kBase,    // fp32 [1, R, N]: product and bias of the first layer, columns of unit stride
    kTarget,  // int64 [1, 1, R]; of the squared loss fp32 [1, R, N], columns of unit stride
    kSigma,   // fp32 [1, 1, L], of each layer
    kLayers,  // the first of the tensors of the first layer
};
enum LayerArgument {
    kWeight,  // [1, N, K]; the first layer's is not read
    kBias,    // [1, 1, N], likewise; absent: 0
    kOutput,  // [C, R, N], input of the next layer, columns of unit stride; absent: not stored
    kTensorsOfLayer,
};
enum Number {
    kNoised,  // the number of layers with noise, from the first on
    kActivation,
    kLoss,
    kSmoothing,
    kDtype,
};

constexpr int kRows = kLanes >= 16 ? 12 : kLanes >= 8 ? 6 : 4, kVectors = 2;  // of a product: its sums fill registers
constexpr int64_t kPanel = kVectors * kLanes;                                 // features whose weights lie together
constexpr int64_t kBlockRows = 96, kBlockFloats = 1 << 17;  // of a block, at most: whole products, in the caches
constexpr int64_t kBlockSamples = 12;                       // of a block, where samples are many

int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct Layer {
    int64_t inputs, outputs;
    const float *panels, *bias;  // [outputs / kPanel, inputs, kPanel] and [outputs], padded with zeros
};

// y[r] = bias + a[r] W for kRows rows and the first vectors of a panel of W.
template <int vectors>
void multiply(const float* a, int64_t a_pitch, const float* panel, const float* bias, int64_t inputs, float* y,
              int64_t y_pitch) {
    F sums[kRows][vectors];  // in registers: every loop over them is unrolled
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sums[r][v] = load(bias + v * kLanes);
    for (int64_t k = 0; k < inputs; ++k, panel += kPanel) {
        F w[vectors];
        for (int v = 0; v < vectors; ++v) w[v] = load(panel + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const F value = set(a[r * a_pitch + k]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) sums[r][v] = fma(value, w[v], sums[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) store(y + r * y_pitch + v * kLanes, sums[r][v]);
}

// The nearest values of T.
template <typename T>
F rounded(F a) {
    if constexpr (sizeof(T) == sizeof(float)) return a;
    T values[kLanes];
    store_part(values, a, kLanes);
    return load_part(values, kLanes);
}

F activated(F y, Activation activation) {
    switch (activation) {
        case Activation::kRelu:
            return larger(set(0.0f), y);
        case Activation::kTanh:
            return hyperbolic_tangent(y);
        case Activation::kSigmoid:
            return logistic(y);
        default:
            return where_positive(y, set(1.0f));
    }
}

float largest_lane(F a) {
    alignas(64) float lanes[kLanes];
    store(lanes, a);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[half + i]);
    return lanes[0];
}

// ln sum exp(outputs) - outputs[label]; with a share `smoothing` of the label on all outputs alike. Writes to `outputs`
// past its end, up to whole vectors.
float cross_entropy(float* outputs, int64_t cols, int64_t label, float smoothing) {
    for (int64_t c = cols; c < up(cols, kLanes); ++c) outputs[c] = -INFINITY;
    F top = load(outputs);
    for (int64_t c = kLanes; c < cols; c += kLanes) top = larger(load(outputs + c), top);
    const float most = largest_lane(top);
    F sum = set(0.0f);
    for (int64_t c = 0; c < cols; c += kLanes) sum = sum + exponential(load(outputs + c) - set(most));
    float expected = outputs[label] - most;
    if (smoothing > 0.0f) {
        for (int64_t c = cols; c < up(cols, kLanes); ++c) outputs[c] = most;
        F all = set(0.0f);
        for (int64_t c = 0; c < cols; c += kLanes) all = all + (load(outputs + c) - set(most));
        expected = (1.0f - smoothing) * expected + smoothing / static_cast<float>(cols) * sum_of_lanes(all);
    }
    return logf(sum_of_lanes(sum)) - expected;
}

float mean_square(const float* outputs, const float* target, int64_t cols) {
    F sum = set(0.0f);
    by_lanes(cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        const F difference = load_part(outputs + c, n) - load_part(target + c, n);
        sum = fma(difference, difference, sum);
    });
    return sum_of_lanes(sum) / static_cast<float>(cols);
}

// The index of the largest output: the first of equal ones; NaN counts as the largest.
int64_t largest(const float* outputs, int64_t cols) {
    int64_t best = 0;
    for (int64_t c = 1; c < cols; ++c)
        if (outputs[best] == outputs[best] && !(outputs[c] <= outputs[best])) best = c;
    return best;
}

template <typename T>
class Pass {
  public:
    Pass(const ulr_noise_spec& spec, const ulr_tensor* tensors, const ulr_launch& where)
        : spec_(spec),
          t_(tensors),
          threads_(where.threads),
          layers_((where.tensors - kLayers) / kTensorsOfLayer),
          noised_(where.numbers[kNoised]),
          activation_(static_cast<Activation>(where.numbers[kActivation])),
          loss_(static_cast<Loss>(where.numbers[kLoss])),
          smoothing_(number_of(where.numbers[kSmoothing])),
          halves_(spec.antithetic ? 2 : 1),
          draws_(t_[kLosses].size[1] / halves_),
          samples_(t_[kLosses].size[2]) {}

    int run();

  private:
    // Rows of the blocks: one for each half, draw and sample, in this order.
    struct Block {
        int64_t draw, sample, draws, samples;
    };
    // Activations of a block, between layers: each reads one buffer and writes the other.
    struct Unit {
        explicit Unit(int64_t size) : memory(2 * size), from(memory.data()), to(from + size) {}
        Scratch memory;
        float *from, *to;
    };

    const ulr_tensor& tensor(int64_t layer, LayerArgument which) const {
        return t_[kLayers + layer * kTensorsOfLayer + which];
    }
    bool last(int64_t layer) const { return layer == layers_ - 1; }
    void pack(int64_t layer, float* memory);
    void product(const Layer& layer, Unit& unit, int64_t rows) const;
    void finish(int64_t layer, const Block& block, const float* from, bool shared, float* to) const;
    void finish_row(int64_t layer, int64_t copy, int64_t sample, const float* from, F sigma, const float* eps,
                    int64_t cols, int64_t col, float* to) const;
    void losses(const Block& block, float* outputs) const;

    const ulr_noise_spec& spec_;
    const ulr_tensor* t_;
    const int threads_;
    const int64_t layers_, noised_;
    const Activation activation_;
    const Loss loss_;
    const float smoothing_;
    const int64_t halves_, draws_, samples_;
    int64_t pitch_ = 0;  // of a block's rows
    Layer layer_[kMostLayers] = {};
};

// The weights in the order in which products read them, as fp32.
template <typename T>
void Pass<T>::pack(int64_t layer, float* memory) {
    constexpr int64_t kPiece = 256;  // of a weight's row
    const ulr_tensor &weight = tensor(layer, kWeight), &bias = tensor(layer, kBias);
    const int64_t inputs = weight.size[2], outputs = weight.size[1], padded = up(outputs, kPanel);
    layer_[layer] = {inputs, outputs, memory, memory + padded * inputs};
    if (bias.data) widen_row(at<T>(bias, 0, 0, 0), bias.stride[2], outputs, memory + padded * inputs);
    parallel(threads_, padded / kPanel, 1, [&](int64_t first, int64_t last) {
        alignas(64) float values[kPiece];
        for (int64_t n = first * kPanel; n < std::min(last * kPanel, outputs); ++n) {
            float* to = memory + n / kPanel * kPanel * inputs + n % kPanel;
            for (int64_t k = 0; k < inputs; k += kPiece) {
                const int64_t count = std::min(kPiece, inputs - k);
                widen_row(at<T>(weight, 0, n, k), weight.stride[2], count, values);
                for (int64_t i = 0; i < count; ++i) to[(k + i) * kPanel] = values[i];
            }
        }
    });
}

template <typename T>
void Pass<T>::product(const Layer& layer, Unit& unit, int64_t rows) const {
    for (int64_t n = 0; n < layer.outputs; n += kPanel) {
        const float *panel = layer.panels + n * layer.inputs, *bias = layer.bias + n;
        const bool whole = layer.outputs - n > kLanes;
        for (int64_t r = 0; r < rows; r += kRows) {
            const float* a = unit.from + r * pitch_;
            float* y = unit.to + r * pitch_ + n;
            if (whole)
                multiply<kVectors>(a, pitch_, panel, bias, layer.inputs, y, pitch_);
            else
                multiply<1>(a, pitch_, panel, bias, layer.inputs, y, pitch_);
        }
    }
}

// A row of a layer's output from its product: noise, rounding, activation; stored to kOutput too, if there is one.
template <typename T>
void Pass<T>::finish_row(int64_t layer, int64_t copy, int64_t sample, const float* from, F sigma, const float* eps,
                         int64_t cols, int64_t col, float* to) const {
    by_lanes(cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        F y = load_part(from + c, n);
        if (eps) y = fma(sigma, load(eps + c), y);
        store(to + c, rounded<T>(y));
    });
    if (last(layer)) return;
    for (int64_t c = 0; c < cols; c += kLanes) store(to + c, rounded<T>(activated(load(to + c), activation_)));
    const ulr_tensor& output = tensor(layer, kOutput);
    if (!output.data) return;
    T* kept = at<T>(output, copy, sample, col);
    by_lanes(cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) { store_part(kept + c, load(to + c), n); });
}

// All rows of a block. `shared`: all copies have the first rows of `from`, one for each sample.
template <typename T>
void Pass<T>::finish(int64_t layer, const Block& block, const float* from, bool shared, float* to) const {
    const int64_t cols = tensor(layer, kWeight).size[1], width = std::min(cols, kTileColumns);
    const int64_t from_pitch = shared ? t_[kBase].stride[1] : pitch_;
    const bool noised = layer < noised_;
    ulr_noise_spec spec = spec_;
    spec.key += noised ? layer : 0;
    Tile tile(spec);
    const float sigma = noised ? *at<float>(t_[kSigma], 0, 0, layer) : 0.0f;
    const int64_t height = std::min(block.samples, Tile::capacity(spec, width));
    const int64_t depth = std::clamp<int64_t>(Tile::capacity(spec, width) / height, 1, block.draws);
    for (int64_t col = 0; col < cols; col += width) {
        const int64_t n = std::min(width, cols - col);
        for (int64_t sample = 0; sample < block.samples; sample += height) {
            const int64_t m = std::min(height, block.samples - sample), row = block.sample + sample;
            for (int64_t draw = 0; draw < block.draws; draw += depth) {
                const int64_t d_end = std::min(depth, block.draws - draw);
                if (noised) tile.make({spec.draw + block.draw + draw, spec.row_offset + row, col, d_end, m, n});
                for (int64_t half = 0; half < halves_; ++half) {
                    for (int64_t d = draw; d < draw + d_end; ++d) {
                        for (int64_t r = 0; r < m; ++r) {
                            const int64_t at_row = (half * block.draws + d) * block.samples + sample + r;
                            const int64_t from_row = shared ? row + r : at_row;
                            finish_row(layer, half * draws_ + block.draw + d, row + r,
                                       from + from_row * from_pitch + col, set(half ? -sigma : sigma),
                                       noised ? tile.row(d - draw, r) : nullptr, n, col, to + at_row * pitch_ + col);
                        }
                    }
                }
            }
        }
    }
}

template <typename T>
void Pass<T>::losses(const Block& block, float* outputs) const {
    const int64_t cols = tensor(layers_ - 1, kWeight).size[1];
    for (int64_t half = 0; half < halves_; ++half) {
        for (int64_t d = 0; d < block.draws; ++d) {
            for (int64_t r = 0; r < block.samples; ++r, outputs += pitch_) {
                const int64_t sample = block.sample + r;
                float& loss = *at<float>(t_[kLosses], 0, half * draws_ + block.draw + d, sample);
                if (loss_ == Loss::kSquared) {
                    loss = mean_square(outputs, at<float>(t_[kTarget], 0, sample, 0), cols);
                    continue;
                }
                const int64_t label = *at<int64_t>(t_[kTarget], 0, 0, sample);
                if (label < 0 || label >= cols)
                    loss = loss_ == Loss::kCrossEntropy && label == kIgnored ? 0.0f : NAN;
                else if (loss_ == Loss::kZeroOne)
                    loss = largest(outputs, cols) == label ? 0.0f : 1.0f;
                else
                    loss = cross_entropy(outputs, cols, label, smoothing_);
            }
        }
    }
}

template <typename T>
int Pass<T>::run() {
    int64_t size = 0;  // of the packed weights
    for (int64_t layer = 0; layer < layers_; ++layer) {
        const ulr_tensor& weight = tensor(layer, kWeight);
        pitch_ = std::max(pitch_, up(weight.size[1], kPanel) + kLanes);  // rows fall into different sets of a cache
        if (layer) size += up(weight.size[1], kPanel) * (weight.size[2] + 1);
    }
    const Scratch packed(size);
    if (size && !packed.data()) return ULR_OUT_OF_MEMORY;
    float* memory = packed.data();
    for (int64_t layer = 1; layer < layers_; ++layer) {
        pack(layer, memory);
        memory += up(layer_[layer].outputs, kPanel) * (layer_[layer].inputs + 1);
    }
    const int64_t rows = std::clamp<int64_t>(kBlockFloats / pitch_, halves_, kBlockRows);
    const int64_t samples = std::min({samples_, kBlockSamples, rows / halves_});
    const int64_t draws = std::clamp<int64_t>(rows / (halves_ * samples), 1, draws_);
    const int64_t across = up(samples_, samples) / samples, deep = up(draws_, draws) / draws;
    bool failed = false;
    parallel(threads_, across * deep, 1, [&](int64_t first, int64_t last_block) {
        Unit unit(up(halves_ * draws * samples, kRows) * pitch_);
        if (!unit.memory.data()) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t i = first; i < last_block; ++i) {
            const int64_t draw = i % deep * draws, sample = i / deep * samples;
            const Block block{draw, sample, std::min(draws, draws_ - draw), std::min(samples, samples_ - sample)};
            finish(0, block, at<float>(t_[kBase], 0, 0, 0), true, unit.to);
            for (int64_t layer = 1; layer < layers_; ++layer) {
                std::swap(unit.from, unit.to);
                product(layer_[layer], unit, halves_ * block.draws * block.samples);
                finish(layer, block, unit.to, false, unit.to);
            }
            losses(block, unit.to);
        }
    });
    return failed ? ULR_OUT_OF_MEMORY : ULR_OK;
}

}  // namespace

int noisy_mlp(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    return where->numbers[kDtype] == ULR_F32 ? Pass<float>(*spec, tensors, *where).run()
                                             : Pass<Bf16>(*spec, tensors, *where).run();
}

}  // namespace ULR_ISA
}  // namespace ulr

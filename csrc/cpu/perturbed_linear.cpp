// perturbed_linear for few rows of x: each tile of W' is made in the first-level cache and used for all rows there.
#include "dispatch.h"
#include "perturbed_noise.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

// With antithetic noise each draw has a second copy, in tensors of its own (kMinus...).
enum Argument {
    kY,          // [D, R, N]
    kMinusY,     // absent: not antithetic
    kX,          // [1 or D, R, K]
    kMinusX,     // absent: the second copies share kX
    kBias,       // [1 or D, 1, N]; absent: 0
    kMinusBias,  // absent: as kBias
    kWeight,     // [1, N, K]
    kSigma,      // fp32 scalar
    kMask,       // uint8 [1, N, K]: noise only where it is set; absent: everywhere
};

constexpr int kRowsAtOnce = kLanes >= 16 ? 8 : 4, kFeaturesAtOnce = 2;  // sums that stay in registers
constexpr int64_t kFeatures = 32;                                       // of a unit of work
constexpr int64_t kWorthWaking = 1 << 15;                               // multiplications of a thread at a time

// sums[f * sums_pitch + r] += w[f] . x[r] for `features` rows of W' and `rows` rows of x, of whole vectors.
template <int features, int rows>
inline void multiply(const float* w, int64_t w_pitch, const float* x, int64_t x_pitch, int64_t cols, float* sums,
                     int64_t sums_pitch) {
    F acc[features][rows];
    for (int f = 0; f < features; ++f)
        for (int r = 0; r < rows; ++r) acc[f][r] = set(0.0f);
    for (int64_t c = 0; c < cols; c += kLanes) {
        F value[features];
        for (int f = 0; f < features; ++f) value[f] = load(w + f * w_pitch + c);
        for (int r = 0; r < rows; ++r) {
            const F other = load(x + r * x_pitch + c);
            for (int f = 0; f < features; ++f) acc[f][r] = fma(value[f], other, acc[f][r]);
        }
    }
    for (int f = 0; f < features; ++f)
        for (int r = 0; r < rows; ++r) sums[f * sums_pitch + r] += sum_of_lanes(acc[f][r]);
}

template <int features>
void multiply_rows(const float* w, int64_t w_pitch, const float* x, int64_t x_pitch, int64_t rows, int64_t cols,
                   float* sums, int64_t sums_pitch) {
    int64_t r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce)
        multiply<features, kRowsAtOnce>(w, w_pitch, x + r * x_pitch, x_pitch, cols, sums + r, sums_pitch);
    if (r + 4 <= rows) {
        multiply<features, 4>(w, w_pitch, x + r * x_pitch, x_pitch, cols, sums + r, sums_pitch);
        r += 4;
    }
    for (; r < rows; ++r) multiply<features, 1>(w, w_pitch, x + r * x_pitch, x_pitch, cols, sums + r, sums_pitch);
}

template <typename T>
class FewRows {
  public:
    FewRows(const ulr_noise_spec& spec, const ulr_tensor* tensors)
        : spec_(spec),
          t_(tensors),
          rows_(t_[kY].size[1]),
          features_(t_[kY].size[2]),
          inputs_(t_[kX].size[2]),
          width_(std::clamp<int64_t>(inputs_, 1, kTileColumns)),
          height_(std::min({kFeatures, Tile::capacity(spec, width_), kTileFloats / tile_pitch()})),
          x_pitch_((inputs_ + kLanes - 1) / kLanes * kLanes) {}

    int run(int threads);

  private:
    struct Unit {
        Unit(const ulr_noise_spec& spec, int64_t x_size, int64_t sums) : tile(spec), x(x_size), sums(sums) {}
        Tile tile;
        Scratch x;     // fp32 [1 or 2, R, pitch] of the draw's copies
        Scratch sums;  // [1 or 2, kFeatures, R]
        int64_t x_draw = -1;
        alignas(64) float weights[kTileFloats];  // W' of a tile as fp32, rows of whole vectors
        alignas(64) float widened[kTileColumns + kLanes];
        alignas(64) T rounded[kTileColumns + kLanes];
    };

    bool has(Argument a) const { return t_[a].data != nullptr; }
    int64_t tile_pitch() const { return (width_ + kLanes - 1) / kLanes * kLanes; }
    void load_x(Unit& unit, int64_t draw) const;
    void multiply_tile(Unit& unit, int64_t feature, int64_t features, int64_t col, int64_t cols, bool minus,
                       float* sums) const;
    void write(const float* sums, int64_t draw, int64_t first, int64_t last, Argument y, Argument bias) const;

    const ulr_noise_spec& spec_;
    const ulr_tensor* t_;
    const int64_t rows_, features_, inputs_, width_, height_, x_pitch_;
};

template <typename T>
void FewRows<T>::load_x(Unit& unit, int64_t draw) const {
    if (unit.x_draw == draw || (unit.x_draw >= 0 && t_[kX].size[0] == 1)) return;
    unit.x_draw = draw;
    float* to = unit.x.data();
    for (const Argument which : {kX, kMinusX}) {
        for (int64_t r = 0; has(which) && r < rows_; ++r, to += x_pitch_)
            widen_row(at<T>(t_[which], t_[which].size[0] == 1 ? 0 : draw, r, 0), t_[which].stride[2], inputs_, to);
    }
}

// sums += W' x^T for the current tile of noise.
template <typename T>
void FewRows<T>::multiply_tile(Unit& unit, int64_t feature, int64_t features, int64_t col, int64_t cols, bool minus,
                               float* sums) const {
    const float sigma = minus ? -sigma_of(t_[kSigma]) : sigma_of(t_[kSigma]);
    const int64_t padded = (cols + kLanes - 1) / kLanes * kLanes, pitch = tile_pitch();
    for (int64_t f = 0; f < features; ++f) {
        float* to = unit.weights + f * pitch;
        if constexpr (sizeof(T) == sizeof(float)) {
            perturb_row(t_[kWeight], t_[kMask], feature + f, col, cols, unit.tile.row(0, f), sigma, to, unit.widened);
        } else {
            perturb_row(t_[kWeight], t_[kMask], feature + f, col, cols, unit.tile.row(0, f), sigma, unit.rounded,
                        unit.widened);
            widen_row(unit.rounded, 1, cols, to);
        }
        for (int64_t c = cols; c < padded; ++c) to[c] = 0.0f;
    }
    const float* x = unit.x.data() + (minus && has(kMinusX) ? rows_ * x_pitch_ : 0) + col;
    int64_t f = 0;
    for (; f + kFeaturesAtOnce <= features; f += kFeaturesAtOnce)
        multiply_rows<kFeaturesAtOnce>(unit.weights + f * pitch, pitch, x, x_pitch_, rows_, padded, sums + f * rows_,
                                       rows_);
    if (f < features)
        multiply_rows<1>(unit.weights + f * pitch, pitch, x, x_pitch_, rows_, padded, sums + f * rows_, rows_);
}

template <typename T>
void FewRows<T>::write(const float* sums, int64_t draw, int64_t first, int64_t last, Argument y, Argument bias) const {
    for (int64_t f = first; f < last; ++f) {
        float shift = 0.0f;
        if (has(bias)) widen_row(at<T>(t_[bias], t_[bias].size[0] == 1 ? 0 : draw, 0, f), 0, 1, &shift);
        for (int64_t r = 0; r < rows_; ++r) {
            const float value = sums[(f - first) * rows_ + r] + shift;
            store_part(at<T>(t_[y], draw, r, f), set(value), 1);
        }
    }
}

template <typename T>
int FewRows<T>::run(int threads) {
    if (!rows_ || !features_) return ULR_OK;
    const int64_t across = (features_ + kFeatures - 1) / kFeatures, x_size = rows_ * x_pitch_ * (has(kMinusX) ? 2 : 1);
    const int64_t grain = kWorthWaking / (kFeatures * inputs_ * rows_ + 1) + 1;
    bool failed = false;
    parallel(threads, across * t_[kY].size[0], grain, [&](int64_t begin, int64_t end) {
        Unit unit(spec_, x_size, 2 * kFeatures * rows_);
        if ((x_size && !unit.x.data()) || !unit.sums.data()) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        float *plus = unit.sums.data(), *minus = plus + kFeatures * rows_;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t draw = i / across, first = i % across * kFeatures,
                          last = std::min(first + kFeatures, features_);
            load_x(unit, draw);
            memset(plus, 0, static_cast<size_t>(2 * kFeatures * rows_) * sizeof(float));
            for (int64_t f = first; f < last; f += height_) {
                const int64_t features = std::min(height_, last - f);
                for (int64_t col = 0; col < inputs_; col += width_) {
                    const int64_t cols = std::min(width_, inputs_ - col);
                    unit.tile.make(
                        {spec_.draw + draw, spec_.row_offset + f, spec_.col_offset + col, 1, features, cols});
                    multiply_tile(unit, f, features, col, cols, false, plus + (f - first) * rows_);
                    if (has(kMinusY)) multiply_tile(unit, f, features, col, cols, true, minus + (f - first) * rows_);
                }
            }
            write(plus, draw, first, last, kY, kBias);
            if (has(kMinusY)) write(minus, draw, first, last, kMinusY, has(kMinusBias) ? kMinusBias : kBias);
        }
    });
    return failed ? ULR_OUT_OF_MEMORY : ULR_OK;
}

}  // namespace

int perturbed_linear(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    switch (tensors[kY].dtype) {
        case ULR_F32:
            return FewRows<float>(*spec, tensors).run(where->threads);
        case ULR_BF16:
            return FewRows<Bf16>(*spec, tensors).run(where->threads);
        default:
            return FewRows<Half>(*spec, tensors).run(where->threads);
    }
}

}  // namespace ULR_ISA
}  // namespace ulr

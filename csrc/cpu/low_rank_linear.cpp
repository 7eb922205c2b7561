// Adds low-rank noise to a product: y = base + bias + sigma / sqrt(r) * (x B) A^T, row by row.
#include "dispatch.h"
#include "perturbed_noise.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

// With antithetic noise each draw has a second copy, in tensors of its own (kMinus...). Columns of y and base have
// unit stride.
enum Argument {
    kY,          // [D, R, N]
    kMinusY,     // absent: not antithetic
    kBase,       // [1 or D, R, N], of y's dtype: the plain product; may be y itself
    kMinusBase,  // absent: the second copies share kBase
    kX,          // [1 or D, R, K]
    kMinusX,     // absent: the second copies share kX
    kBias,       // [D, 1, N], of y's dtype, unit stride; absent: 0
    kMinusBias,
    kSigma,  // fp32 scalar
};
enum { kNoiseRank };

constexpr int64_t kRows = 256;             // of a unit of work
constexpr int64_t kWorthWaking = 1 << 15;  // values of x and y that a thread should go through at a time

template <typename T>
class LowRank {
  public:
    LowRank(const ulr_noise_spec& spec, const ulr_tensor* tensors, int64_t rank)
        : spec_(spec),
          t_(tensors),
          rank_(rank),
          rows_(t_[kY].size[1]),
          features_(t_[kY].size[2]),
          inputs_(t_[kX].size[2]) {}

    int run(int threads);

  private:
    struct Unit {
        Unit(const ulr_noise_spec& spec, int64_t rank, int64_t features, int64_t inputs)
            : a(spec, kRowFactorStream, rank, features),
              b(spec, kColFactorStream, rank, inputs),
              x(inputs + kLanes),
              xb(rank) {}
        Factor a, b;
        Scratch x;   // a row of x as fp32
        Scratch xb;  // sigma / sqrt(r) * x B
        bool failed() const { return a.failed() || b.failed() || !x.data() || !xb.data(); }
    };

    static const T* row(const ulr_tensor& t, int64_t draw, int64_t row) {
        return at<T>(t, t.size[0] == 1 ? 0 : draw, row, 0);
    }
    void project(Unit& unit, const ulr_tensor& x, int64_t draw, int64_t row) const;
    void add(const Unit& unit, bool minus, int64_t draw, int64_t row) const;

    const ulr_noise_spec& spec_;
    const ulr_tensor* t_;
    const int64_t rank_, rows_, features_, inputs_;
};

template <typename T>
void LowRank<T>::project(Unit& unit, const ulr_tensor& x, int64_t draw, int64_t r) const {
    widen_row(row(x, draw, r), x.stride[2], inputs_, unit.x.data());
    const float scale = sigma_of(t_[kSigma]) * low_rank_scale(rank_);
    for (int64_t j = 0; j < rank_; ++j) {  // beyond the last input x is 0
        F sum[2] = {set(0.0f), set(0.0f)};
        int64_t c = 0;
        for (; c + kLanes < inputs_; c += 2 * kLanes)
            for (int i = 0; i < 2; ++i)
                sum[i] = fma(load(unit.x.data() + c + i * kLanes), load(unit.b.row(j) + c + i * kLanes), sum[i]);
        if (c < inputs_) sum[0] = fma(load(unit.x.data() + c), load(unit.b.row(j) + c), sum[0]);
        unit.xb.data()[j] = scale * sum_of_lanes(sum[0] + sum[1]);
    }
}

template <typename T>
void LowRank<T>::add(const Unit& unit, bool minus, int64_t draw, int64_t r) const {
    const ulr_tensor& base = t_[minus && t_[kMinusBase].data ? kMinusBase : kBase];
    const ulr_tensor& bias = t_[minus ? kMinusBias : kBias];
    const T* from = row(base, draw, r);
    const T* shift = bias.data ? row(bias, draw, 0) : nullptr;
    T* to = at<T>(t_[minus ? kMinusY : kY], draw, r, 0);
    const float sign = minus ? -1.0f : 1.0f;
    by_lanes(features_, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        F total = set(0.0f);
        for (int64_t j = 0; j < rank_; ++j) total = fma(set(unit.xb.data()[j]), load(unit.a.row(j) + c), total);
        F clean = load_part(from + c, n);
        if (shift) clean = clean + load_part(shift + c, n);
        store_part(to + c, fma(set(sign), total, clean), n);
    });
}

template <typename T>
int LowRank<T>::run(int threads) {
    if (!rows_ || !features_) return ULR_OK;
    const int64_t height = std::min(rows_, kRows), down = (rows_ + height - 1) / height;
    const int64_t grain = kWorthWaking / (height * (features_ + inputs_)) + 1;
    bool failed = false;
    parallel(threads, down * t_[kY].size[0], grain, [&](int64_t first, int64_t last) {
        Unit unit(spec_, rank_, features_, inputs_);
        if (unit.failed()) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t i = first; i < last; ++i) {
            const int64_t draw = i / down, begin = i % down * height, end = std::min(begin + height, rows_);
            unit.a.use(spec_.draw + draw);
            unit.b.use(spec_.draw + draw);
            for (int64_t r = begin; r < end; ++r) {
                project(unit, t_[kX], draw, r);
                add(unit, false, draw, r);
                if (!t_[kMinusY].data) continue;
                if (t_[kMinusX].data) project(unit, t_[kMinusX], draw, r);
                add(unit, true, draw, r);
            }
        }
    });
    return failed ? ULR_OUT_OF_MEMORY : ULR_OK;
}

}  // namespace

int low_rank_linear(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    const int64_t rank = where->numbers[kNoiseRank];
    switch (tensors[kY].dtype) {
        case ULR_F32:
            return LowRank<float>(*spec, tensors, rank).run(where->threads);
        case ULR_BF16:
            return LowRank<Bf16>(*spec, tensors, rank).run(where->threads);
        default:
            return LowRank<Half>(*spec, tensors, rank).run(where->threads);
    }
}

}  // namespace ULR_ISA
}  // namespace ulr

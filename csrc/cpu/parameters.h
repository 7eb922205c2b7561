// Lists of parameters: the tiles of all of them as one sequence of work, their noise, and their elements.
#pragma once

#include <algorithm>
#include <memory>

#include "parallel.h"
#include "tile.h"
#include "ulr/step.h"

namespace ulr {
inline namespace ULR_ISA {

constexpr int64_t kTilesAtOnce = 8;       // of a thread: 2^14 values, enough to be worth waking it
constexpr int64_t kListColumns = 1920;    // the widest tile, of one row
constexpr int64_t kLowRankColumns = 128;  // of a tile: narrow, so that many rows use its factors
constexpr int64_t kColumnAxes = 4;        // after the first one, of a parameter's view [rows, ...]

// A tensor of the list, its place in the whole noise, and how it is cut into tiles.
struct Parameter {
    const ulr_tensor* tensors;  // itself, then its states
    int64_t key, row_offset, col_offset, rank, whole_width;
    int64_t rows, cols, width, height, across;
    int64_t first, last;  // tiles, counted over the list

    // Tile `index` of this tensor, without offsets; of draw 0.
    Extent tile(int64_t index) const {
        const int64_t row = index / across * height, col = index % across * width;
        return {0, row, col, 1, std::min(height, rows - row), std::min(width, cols - col)};
    }
    Extent whole(Extent at, int64_t draw) const {
        at.draw = draw;
        at.row += row_offset;
        at.col += col_offset;
        return at;
    }
};

// The list. `tensors` has `stride` entries a parameter, `numbers` kTensorNumbers.
class Parameters {
  public:
    Parameters(const ulr_noise_spec& spec, const ulr_tensor* tensors, int64_t stride, int64_t count,
               const int64_t* numbers)
        : count_(count), list_(new Parameter[static_cast<size_t>(count)]) {
        int64_t tiles = 0;
        for (int64_t i = 0; i < count; ++i, tensors += stride, numbers += kTensorNumbers) {
            Parameter& p = list_[static_cast<size_t>(i)];
            p.tensors = tensors;
            p.key = spec.key[i];
            p.row_offset = numbers[kRowOffset];
            p.col_offset = numbers[kColOffset];
            p.rank = numbers[kRank];
            p.whole_width = numbers[kWidth];
            p.rows = tensors->size[0];
            p.cols = tensors->size[1] * tensors->size[2] * tensors->size[3] * tensors->size[4];
            const int64_t most = p.rank ? kLowRankColumns : kListColumns, parts = (p.cols + most - 1) / most;
            p.width = parts > 1 ? (p.cols / parts + kSignColumns) / kSignColumns * kSignColumns : p.cols;
            p.width = std::max<int64_t>(1, std::min(p.width, most));
            // Sums of noise have rows of whole vectors, which narrow tensors fill in part only.
            const int64_t padded = (p.width + kLanes - 1) / kLanes * kLanes;
            p.height = std::min({p.rows, Tile::capacity(spec, p.width), kTileFloats / padded});
            p.height = std::max<int64_t>(1, p.height);
            p.across = (p.cols + p.width - 1) / p.width;
            p.first = tiles;
            p.last = tiles += p.across * ((p.rows + p.height - 1) / p.height);
        }
    }

    // Calls body(parameter, first, last) for ranges of the tiles of each parameter, from many threads.
    template <typename Body>
    void for_each(int threads, Body body) const {
        if (!count_) return;
        parallel(threads, list_[static_cast<size_t>(count_ - 1)].last, kTilesAtOnce, [&](int64_t first, int64_t last) {
            for (const Parameter* p = holder_of(first); first < last; first = p->last, ++p)
                if (first < p->last) body(*p, first - p->first, std::min(last, p->last) - p->first);
        });
    }

  private:
    const Parameter* holder_of(int64_t tile) const {
        const Parameter* low = list_.get();
        for (int64_t count = count_; count > 1;) {
            const int64_t half = count / 2;
            if (low[half].first <= tile) low += half;
            count -= half;
        }
        return low;
    }

    const int64_t count_;
    const std::unique_ptr<Parameter[]> list_;
};

// Noise of the tiles of one parameter, of full or low rank.
class ParameterNoise {
  public:
    ParameterNoise(const ulr_noise_spec& spec, const Parameter& p)
        : rank_(p.rank),
          row_key_(fold_in(p.key, kRowFactorStream)),
          col_key_(p.rank ? fold_in(p.key, kColFactorStream) : p.key),
          scale_(low_rank_scale(std::max<int64_t>(p.rank, 1))),
          row_spec_(of(spec, p, &row_key_)),
          col_spec_(of(spec, p, &col_key_)),
          by_row_(row_spec_),
          by_col_(col_spec_) {}

    // As Tile::use: body(noise), in which noise(row)(c) is the vector of values from column c on.
    template <typename Body>
    __attribute__((always_inline)) void use(const Extent& at, Body body) {
        if (!rank_)
            return by_col_.use(at, [&](auto noise) __attribute__((always_inline)) {
                body([&](int64_t row) { return noise(0, row); });
            });
        multiply(at);
        body([this](int64_t row) { return vectors(product_ + row * pitch_); });
    }

  private:
    static ulr_noise_spec of(ulr_noise_spec spec, const Parameter& p, const int64_t* key) {
        spec.key = key;
        spec.width = p.whole_width;
        return spec;
    }

    // E = A B^T / sqrt(rank): the columns of A and B are rows of noise.
    void multiply(const Extent& at) {
        pitch_ = (at.cols + kLanes - 1) / kLanes * kLanes;
        const int64_t many = std::min(Tile::capacity(row_spec_, at.rows), Tile::capacity(col_spec_, at.cols));
        for (int64_t first = 0; first < rank_; first += many) {
            const int64_t count = std::min(many, rank_ - first);
            by_row_.make({at.draw, first, at.row, 1, count, at.rows});
            by_col_.make({at.draw, first, at.col, 1, count, at.cols});
            const F scale = set(first + count == rank_ ? scale_ : 1.0f);
            for (int64_t r = 0; r < at.rows; ++r) {
                float* to = product_ + r * pitch_;
                for (int64_t c = 0; c < at.cols; c += kLanes) {
                    F sum = first ? load(to + c) : set(0.0f);
                    for (int64_t k = 0; k < count; ++k)
                        sum = fma(set(by_row_.row(0, k)[r]), load(by_col_.row(0, k) + c), sum);
                    store(to + c, sum * scale);
                }
            }
        }
    }

    const int64_t rank_, row_key_, col_key_;
    const float scale_;
    const ulr_noise_spec row_spec_, col_spec_;
    Tile by_row_, by_col_;
    int64_t pitch_ = 0;
    alignas(64) float product_[kTileFloats + 8 * kLanes];
};

// Stores results: to nearest, or bf16 by the words of the parameter's rounding stream.
template <typename T>
class Rounding {
  public:
    Rounding(const ulr_noise_spec& spec, const Parameter& p, bool stochastic)
        : stochastic_(stochastic), key_(fold_in(p.key, kRoundingStream)), tile_(of_key(spec)) {}

    void make(const Extent& at) {
        if (at_random()) tile_.make_words(at);
    }

    // The first n lanes of a row of the last tile, from column c on.
    void store(T* to, F value, int64_t row, int64_t c, int64_t n) const {
        if (at_random()) {
            const U word = bits(value);
            const U moved = (word + shift_right<16>(load(tile_.words(0, row) + c))) & set(0xffff0000u);
            const M infinite = not_less(word & set(0x7fffffffu), set(0x7f800000u));
            value = as_float(subtract_where(infinite, moved, moved - word));
        }
        store_part(to, value, n);
    }

  private:
    bool at_random() const { return sizeof(T) == 2 && stochastic_; }  // known to the compiler where T is fp32

    ulr_noise_spec of_key(ulr_noise_spec spec) {
        spec_ = spec;
        spec_.key = &key_;
        spec_.dist = ULR_NORMAL;  // which has one word a column
        return spec_;
    }

    const bool stochastic_;
    const int64_t key_;
    ulr_noise_spec spec_;
    Tile tile_;
};

// Whether the columns of a row are contiguous.
inline bool side_by_side(const ulr_tensor& t) {
    return t.size[1] * t.size[2] * t.size[3] == 1 && (t.stride[kColumnAxes] == 1 || t.size[kColumnAxes] <= 1);
}

// Some contiguous columns of a row: in place, or a copy that is written back in the end.
template <typename T>
class Columns {
  public:
    Columns(const ulr_tensor& t, int64_t row, int64_t col, int64_t cols)
        : tensor_(t), base_(static_cast<T*>(t.data) + row * t.stride[0]), col_(col), cols_(cols) {
        apart_ = !side_by_side(t);
        if (apart_) each([](T& here, T& there) { here = there; });
    }
    ~Columns() {
        if (apart_) each([](T& here, T& there) { there = here; });
    }
    Columns(const Columns&) = delete;
    Columns& operator=(const Columns&) = delete;

    T* data() { return apart_ ? copy_ : base_ + col_; }

  private:
    template <typename Move>
    void each(Move move) {
        for (int64_t c = 0; c < cols_; ++c) {
            int64_t rest = col_ + c, at = 0;
            for (int64_t axis = kColumnAxes; axis > 0; --axis) {
                at += rest % tensor_.size[axis] * tensor_.stride[axis];
                rest /= tensor_.size[axis];
            }
            move(copy_[c], base_[at]);
        }
    }

    const ulr_tensor& tensor_;
    T* const base_;
    const int64_t col_, cols_;
    bool apart_;
    T copy_[kListColumns];
};

// Calls body(T{}) for the elements of a tensor.
template <typename Body>
void with_elements(int32_t dtype, Body body) {
    if (dtype == ULR_F32)
        body(float{});
    else if (dtype == ULR_BF16)
        body(Bf16{});
    else
        body(Half{});
}

}  // namespace ULR_ISA
}  // namespace ulr

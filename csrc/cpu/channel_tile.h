// A tile of noise whose columns are contiguous: for tensors with channels one after another, each with its pixels in a
// row (NCHW). Lanes take rows, so that words are stored in the order in which they are made.
#pragma once

#include <algorithm>

#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {

constexpr int64_t kMostRows = kTileFloats / 4;  // of a tile: a call of Philox makes four values

// Makes tiles of one noise. Element (d, r, c) of the last tile is at channel(d, c)[r]; up to 16 more values, all
// finite, may be read there.
class ChannelTile {
  public:
    explicit ChannelTile(const ulr_noise_spec& spec) : spec_(spec), keys_(*spec.key), octaves_(octaves_of(spec.dist)) {}

    // The largest number of columns of a tile, and the number of rows, a multiple of 16, that then fit. Tiles start at
    // multiples of their width from the noise's first column on.
    static int64_t width(const ulr_noise_spec& spec, int64_t cols) {
        return std::min(cols, spec.dist == ULR_RADEMACHER ? kSignColumns : kChannels);
    }
    static int64_t height(const ulr_noise_spec& spec, int64_t width) {
        const int64_t columns = spec.dist == ULR_RADEMACHER ? kSignColumns : kValueColumns;
        const int64_t blocks = (spec.col_offset % columns + width + columns - 1) / columns;
        return std::min(kMostRows / blocks, spec.dist == ULR_RADEMACHER ? kTileFloats / width : kMostRows) / 16 * 16;
    }

    const float* channel(int64_t draw, int64_t col) const {
        if (spec_.dist == ULR_RADEMACHER) return values_ + (draw * cols_ + col) * pitch_;
        const int64_t place = lead_ + col;
        return values_ + place % kValueColumns * plane_ + (draw * blocks_ + place / kValueColumns) * rows_;
    }

    // noise(draw, column)(r) is the vector of the last tile's values from row r on.
    auto noise() const {
        return [this](int64_t draw, int64_t col) { return vectors(channel(draw, col)); };
    }

    // As Tile::use.
    template <typename Body>
    void use(const Extent& at, Body body) {
        make(at);
        body(noise());
    }

    void make(const Extent& at) {
        rows_ = at.rows;
        cols_ = at.cols;
        if (spec_.dist == ULR_RADEMACHER)
            make_signs(at);
        else
            make_values(at);
    }

  private:
    static constexpr int64_t kChannels = 16;

    // The words of every call with one of the columns: word w of call (draw, block, row) in plane w.
    void make_words(const Extent& at, int64_t draw, int64_t draws, int64_t columns_of_call) {
        const int64_t block = at.col / columns_of_call;
        lead_ = at.col % columns_of_call;
        blocks_ = (lead_ + at.cols - 1) / columns_of_call + 1;
        calls_ = draws * blocks_ * at.rows;
        plane_ = calls_ + kLanes;
        if (fills_vectors(at.rows)) {
            for (int64_t i = 0; i < draws * blocks_;
                 ++i)  // values beyond a block's end are overwritten by the next block
                philox_words<ByWord>(keys_,
                                     ColumnCounters(keys_.schedule, block + i % blocks_, at.row, draw + i / blocks_),
                                     at.rows, words_ + i * at.rows, plane_);
        } else {
            philox_words<ByWord>(keys_, Counters<ByWord>(block, at.row, draw, layout_.calls(blocks_, at.rows)), calls_,
                                 words_, plane_);
        }
    }

    void make_values(const Extent& at) {
        if (spec_.sobol) {
            make_words(at, 0, 1, kValueColumns);
            shift_by_sobol(at, static_cast<uint32_t>(at.draw));
        } else {
            make_words(at, at.draw, at.draws, kValueColumns);
        }
        for (int word = 0; word < 4; ++word)
            quantiles(octaves_, words_ + word * plane_, calls_, values_ + word * plane_);
    }

    void shift_by_sobol(const Extent& at, uint32_t draw) {
        for (int64_t c = 0; c < at.cols; ++c) {
            const int64_t place = lead_ + c;
            uint32_t* words = words_ + place % kValueColumns * plane_ + place / kValueColumns * at.rows;
            for (int64_t r = 0; r < at.rows; ++r) {
                const int64_t dimension = (at.row + r) % spec_.positions * spec_.width + at.col + c;
                words[r] ^= sobol(spec_.sobol + dimension * 30, draw);
            }
        }
    }

    void make_signs(const Extent& at) {
        pitch_ = (at.rows + kLanes - 1) / kLanes * kLanes;
        if (spec_.hadamard) return make_orthogonal(at);
        make_words(at, at.draw, at.draws, kSignColumns);
        words_to_signs(at, at.draws, 0);
    }

    // `first`: of the tile's draws, to write.
    void words_to_signs(const Extent& at, int64_t draws, int64_t first) {
        const U one = set(0x3f800000u), sign = set(0x80000000u);
        for (int64_t d = 0; d < draws; ++d) {
            for (int64_t c = 0; c < at.cols; ++c) {
                const int64_t place = lead_ + c, word = place % kSignColumns / 32;
                const uint32_t* from = words_ + word * plane_ + (d * blocks_ + place / kSignColumns) * at.rows;
                const U bit = set(1u << place % 32);
                float* to = values_ + ((first + d) * at.cols + c) * pitch_;
                for (int64_t r = 0; r < at.rows; r += kLanes)
                    store(to + r, as_float(subtract_where(not_less(load(from + r) & bit, bit), one, sign)));
            }
        }
    }

    // The signs that a block of 2^16 draws shares, once; from one draw to the next those change whose slot has an odd
    // number of the bits that change in the draw: half of the time the lowest bit alone.
    void make_orthogonal(const Extent& at) {
        const U sign = set(0x80000000u);
        alignas(64) uint32_t slots[kMostRows + kLanes] = {};
        for (int64_t first = 0; first < at.draws;) {  // the draws of one block
            const int64_t block = (at.draw + first) >> kHadamardBits;
            const int64_t end = std::min(at.draws, ((block + 1) << kHadamardBits) - at.draw);
            make_words(at, block, 1, kSignColumns);
            words_to_signs(at, 1, first);
            for (int64_t c = 0; c < at.cols; ++c) {
                for (int64_t r = 0; r < at.rows; ++r) slots[r] = hadamard_slot(spec_, at.row + r, at.col + c);
                for (int64_t d = first; d < end; ++d) {
                    const auto draw = static_cast<uint32_t>(at.draw + d);
                    const uint32_t changed = (d > first ? draw ^ (draw - 1) : draw) & ((1u << kHadamardBits) - 1);
                    float* to = values_ + (d * at.cols + c) * pitch_;
                    const float* from = d > first ? to - at.cols * pitch_ : to;
                    for (int64_t r = 0; r < at.rows; r += kLanes) {
                        U flips = set(0u);
                        for (uint32_t rest = changed, bit = 0; rest; rest >>= 1, ++bit)
                            if (rest & 1u) flips = flips ^ shift_left(load(slots + r), 31 - bit);
                        store(to + r, as_float(bits(load(from + r)) ^ (flips & sign)));
                    }
                }
            }
            first = end;
        }
    }

    const ulr_noise_spec& spec_;
    RoundKeys keys_;
    const Octaves& octaves_;
    Layout<ByWord> layout_;
    int64_t rows_ = 0, cols_ = 0, lead_ = 0, blocks_ = 0, calls_ = 0, plane_ = 0, pitch_ = 0;
    alignas(64) uint32_t words_[kTileFloats + 16 * kLanes];
    alignas(64) float values_[kTileFloats + 16 * kLanes] = {};  // zeros, so that values beyond a tile's end are finite
};

}  // namespace ULR_ISA
}  // namespace ulr

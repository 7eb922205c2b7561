// A tile of noise in the first-level cache: some draws x rows x columns of the contract's coordinates.
// The calls of Philox that a tile needs are taken in one sequence over draws, rows and column blocks, kLanes at a time,
// so that lanes are full whatever the shape: a row of ten columns, one row of many copies.
#pragma once

#include "simd.h"
#include "ulr/api.h"

namespace ulr {
inline namespace ULR_ISA {

constexpr int kStreams = 3;             // vectors of calls in flight: hides the products' latency, fits in 32 registers
constexpr int64_t kTileFloats = 2112;   // room for a tile, padding between its rows included: 16 x (128 + 4) values
constexpr int64_t kTileColumns = 1024;  // a tile is at most so wide
constexpr int64_t kSignColumns = 128;   // columns of a call of Philox, by distribution
constexpr int64_t kValueColumns = 4;

// Where a tile sits in the whole noise, and how large it is.
struct Extent {
    int64_t draw, row, col;
    int64_t draws, rows, cols;
};

// Each lane's place in the sequence of calls: (draw, row, block) relative to the tile's first.
class Calls {
  public:
    Calls(int64_t rows, int64_t blocks)
        : blocks_(set(static_cast<uint32_t>(blocks))),
          rows_(set(static_cast<uint32_t>(rows))),
          step_block_(set(static_cast<uint32_t>(kLanes % blocks))),
          step_row_(set(static_cast<uint32_t>(kLanes / blocks % rows))),
          step_draw_(set(static_cast<uint32_t>(kLanes / blocks / rows))) {
        alignas(64) uint32_t place[3][kLanes];
        uint32_t call[kLanes];
        store(call, call_of_lane());
        for (int lane = 0; lane < kLanes; ++lane) {
            place[0][lane] = static_cast<uint32_t>(call[lane] % blocks);
            place[1][lane] = static_cast<uint32_t>(call[lane] / blocks % rows);
            place[2][lane] = static_cast<uint32_t>(call[lane] / blocks / rows);
        }
        block = load(place[0]);
        row = load(place[1]);
        draw = load(place[2]);
    }

    void advance() {
        const U one = set(1u), none = set(0u);
        block = block + step_block_;
        const M row_ends = not_less(block, blocks_);
        block = subtract_where(row_ends, block, blocks_);
        row = subtract_where(row_ends, row + step_row_, none - one);
        const M draw_ends = not_less(row, rows_);
        row = subtract_where(draw_ends, row, rows_);
        draw = subtract_where(draw_ends, draw + step_draw_, none - one);
    }

    U block, row, draw;

  private:
    U blocks_, rows_, step_block_, step_row_, step_draw_;
};

// The two tables, made once.
inline const Octaves& octaves_of(int32_t dist) {
    static const Octaves normal(kNormalTable), laplace(kLaplaceTable);
    return dist == ULR_LAPLACE ? laplace : normal;
}

// The words of the next `streams` x kLanes calls in sequence.
template <int streams>
inline void philox_step(const KeySchedule& key, U block0, U row0, U draw0, Calls& calls, uint32_t* words) {
    const U m0 = set(kPhiloxM0), m1 = set(kPhiloxM1);
    W c[streams][4];
    for (int s = 0; s < streams; ++s) {
        c[s][0] = widen(block0 + calls.block);
        c[s][1] = widen(row0 + calls.row);
        c[s][2] = widen(draw0 + calls.draw);
        c[s][3] = widen(set(0u));
        calls.advance();
    }
    for (int round = 0; round < 10; ++round) {
        const U k0 = set(key.k0[round]), k1 = set(key.k1[round]);
        for (int s = 0; s < streams; ++s) {
            const W p0 = multiply(c[s][0], m0), p1 = multiply(c[s][2], m1);
            c[s][0] = high_xor(p1, c[s][1], k0);
            c[s][1] = p1;
            c[s][2] = high_xor(p0, c[s][3], k1);
            c[s][3] = p0;
        }
    }
    for (int s = 0; s < streams; ++s) {
        U w[4];
        for (int word = 0; word < 4; ++word) w[word] = narrow(c[s][word]);
        transpose(w);
        for (int vector = 0; vector < 4; ++vector) store(words + (4 * s + vector) * kLanes, w[vector]);
    }
}

// The words of `count` calls in sequence, to `words`, which has room for 2 kLanes calls more.
inline void philox_words(const KeySchedule& key, U block0, U row0, U draw0, Calls calls, int64_t count,
                         uint32_t* words) {
    int64_t done = 0;
    for (; done + kStreams * kLanes <= count; done += kStreams * kLanes)
        philox_step<kStreams>(key, block0, row0, draw0, calls, words + 4 * done);
    for (; done + kLanes < count; done += 2 * kLanes) philox_step<2>(key, block0, row0, draw0, calls, words + 4 * done);
    for (; done < count; done += kLanes) philox_step<1>(key, block0, row0, draw0, calls, words + 4 * done);
}

// Words to noise by the octaves of a distribution (distributions.h: quantile); `count` is rounded up to whole vectors.
inline void quantiles(const Octaves& table, const uint32_t* words, int64_t count, float* values) {
    const Octaves octaves = table;  // in registers: no store to `values` can change it
    const U low31 = set(0x7fffffffu), one = set(1u), mantissa = set(0x007fffffu), unit = set(0x3f800000u);
    const U sign = set(0x80000000u);
    for (int64_t i = 0; i < count; i += kLanes) {
        const U word = load(words + i);
        const U magnitude = bits(to_float(and_or(word, low31, one)));
        const U exponent = shift_right<23>(magnitude);
        const F t = as_float(and_or(magnitude, mantissa, unit));
        F result = octaves.coefficient(exponent, ULR_TABLE_DEGREE);
        for (int power = ULR_TABLE_DEGREE - 1; power >= 0; --power)
            result = fma(result, t, octaves.coefficient(exponent, power));
        store(values + i, as_float(and_xor(bits(result), word, sign)));
    }
}

// Makes tiles of one noise. Element (d, r, c) of the last tile is at row(d, r)[c].
class Tile {
  public:
    explicit Tile(const ulr_noise_spec& spec) : spec_(spec), key_(*spec.key), octaves_(octaves_of(spec.dist)) {}

    const float* row(int64_t draw, int64_t row) const { return values_ + (draw * rows_ + row) * pitch_ + lead_; }

    // How many rows of so many columns fit in a tile.
    static int64_t capacity(const ulr_noise_spec& spec, int64_t cols) {
        const int64_t columns = spec.dist == ULR_RADEMACHER ? kSignColumns : kValueColumns;
        const int64_t spread = (cols + 2 * columns - 2) / columns * columns;  // wherever the columns start
        return kTileFloats / spread;
    }

    void make(const Extent& at) {
        rows_ = at.rows;
        if (spec_.dist == ULR_RADEMACHER)
            make_signs(at);
        else
            make_values(at);
    }

  private:
    // The words of every call that the columns touch. A row of the tile starts at its first call's first column.
    int64_t make_words(const Extent& at, int64_t draw, int64_t draws, int64_t columns_of_call) {
        const int64_t block = at.col / columns_of_call;
        const int64_t blocks = (at.col + at.cols - 1) / columns_of_call - block + 1;
        if (at.rows != calls_rows_ || blocks != calls_blocks_) {  // neighbouring tiles share their layout
            calls_ = Calls(calls_rows_ = at.rows, calls_blocks_ = blocks);
        }
        philox_words(key_, set(static_cast<uint32_t>(block)), set(static_cast<uint32_t>(at.row)),
                     set(static_cast<uint32_t>(draw)), calls_, draws * at.rows * blocks, words_);
        return blocks;
    }

    void make_values(const Extent& at) {
        lead_ = at.col % kValueColumns;
        if (spec_.sobol) {
            for (int64_t draw = 0; draw < at.draws; ++draw) {
                pitch_ = kValueColumns * make_words(at, 0, 1, kValueColumns);
                shift_by_sobol(at, static_cast<uint32_t>(at.draw + draw));
                quantiles(octaves_, words_, at.rows * pitch_, values_ + draw * at.rows * pitch_);
            }
        } else {
            pitch_ = kValueColumns * make_words(at, at.draw, at.draws, kValueColumns);
            quantiles(octaves_, words_, at.draws * at.rows * pitch_, values_);
        }
    }

    void shift_by_sobol(const Extent& at, uint32_t draw) {
        uint32_t points[kTileColumns];
        for (int64_t row = 0; row < at.rows; ++row) {
            if (row == 0 || spec_.positions > 1) {
                const int64_t dimension = (at.row + row) % spec_.positions * spec_.width + at.col;
                for (int64_t c = 0; c < at.cols; ++c) points[c] = sobol(spec_.sobol + (dimension + c) * 30, draw);
            }
            uint32_t* words = words_ + row * pitch_ + lead_;
            for (int64_t c = 0; c < at.cols; ++c) words[c] ^= points[c];
        }
    }

    void make_signs(const Extent& at) {
        const int64_t words_of_row = make_words(at, at.draw, at.draws, kSignColumns) * 4;
        const int64_t lead = at.col % kSignColumns;
        lead_ = 0;
        pitch_ = (at.cols + kLanes - 1) / kLanes * kLanes;
        for (int64_t row = 0; row < at.draws * at.rows; ++row) {
            for (int64_t c = 0; c < at.cols; c += kLanes) {
                const uint32_t* word = words_ + row * words_of_row + (lead + c) / 32;
                const uint64_t window = word[0] | static_cast<uint64_t>(word[1]) << 32;
                store(values_ + row * pitch_ + c, signs(static_cast<uint32_t>(window >> ((lead + c) % 32))));
            }
        }
    }

    const ulr_noise_spec& spec_;
    KeySchedule key_;
    const Octaves& octaves_;
    Calls calls_{1, 1};
    int64_t calls_rows_ = 1, calls_blocks_ = 1, rows_ = 0, pitch_ = 0, lead_ = 0;
    alignas(64) uint32_t words_[kTileFloats + 8 * kLanes];
    alignas(64) float values_[kTileFloats + 8 * kLanes];
};

}  // namespace ULR_ISA
}  // namespace ulr

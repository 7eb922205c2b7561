// A tile of noise in the first-level cache: some draws x rows x columns of the contract's coordinates.
// A tile's calls of Philox form one sequence over draws, rows and column blocks, made kLanes at a time, so that lanes
// are full for any shape: a row of ten columns, one row of many copies.
#pragma once

#include "simd.h"
#include "ulr/api.h"

namespace ulr {
inline namespace ULR_ISA {

constexpr int64_t kTileFloats = 2112;   // room for a tile, padding between its rows included: 16 x (128 + 4) values
constexpr int64_t kTileColumns = 1024;  // the widest tile
constexpr int64_t kSignColumns = 128;   // columns of a call of Philox, by distribution
constexpr int64_t kValueColumns = 4;

// Where a tile sits in the whole noise, and how large it is.
struct Extent {
    int64_t draw, row, col;
    int64_t draws, rows, cols;
};

// Each lane's place in the sequence of calls: (draw, middle, fastest) relative to the tile's first, the fastest
// counting to its end before the middle goes on.
class Calls {
  public:
    // order[i]: which call of a vector is in lane i.
    Calls(int64_t middles, int64_t fastests, const uint32_t (&order)[kLanes])
        : fastests_(set(static_cast<uint32_t>(fastests))),
          middles_(set(static_cast<uint32_t>(middles))),
          step_fastest_(set(static_cast<uint32_t>(kLanes % fastests))),
          step_middle_(set(static_cast<uint32_t>(kLanes / fastests % middles))),
          step_draw_(set(static_cast<uint32_t>(kLanes / fastests / middles))) {
        alignas(64) uint32_t place[3][kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            place[0][lane] = static_cast<uint32_t>(order[lane] % fastests);
            place[1][lane] = static_cast<uint32_t>(order[lane] / fastests % middles);
            place[2][lane] = static_cast<uint32_t>(order[lane] / fastests / middles);
        }
        fastest = load(place[0]);
        middle = load(place[1]);
        draw = load(place[2]);
    }

    void advance() {
        const U one = set(1u), none = set(0u);
        fastest = fastest + step_fastest_;
        const M fastest_ends = not_less(fastest, fastests_);
        fastest = subtract_where(fastest_ends, fastest, fastests_);
        middle = subtract_where(fastest_ends, middle + step_middle_, none - one);
        const M middle_ends = not_less(middle, middles_);
        middle = subtract_where(middle_ends, middle, middles_);
        draw = subtract_where(middle_ends, draw + step_draw_, none - one);
    }

    U fastest, middle, draw;

  private:
    U fastests_, middles_, step_fastest_, step_middle_, step_draw_;
};

// The layout of a vector of calls: the words of each call side by side, as neighbouring columns of a row. Blocks of
// columns are the fastest in the sequence.
struct ByCall {
    static void order(uint32_t (&lanes)[kLanes]) { store(lanes, call_of_lane()); }
    static U block(const Calls& calls) { return calls.fastest; }
    static U row(const Calls& calls) { return calls.middle; }
    static void store_words(uint32_t* words, int64_t call, int64_t, const W (&w)[4]) {
        interleave(w, words + 4 * call);
    }
};

// The layout with a plane for each word of the calls: a column's rows side by side. Rows are the fastest.
struct ByWord {
    static void order(uint32_t (&lanes)[kLanes]) {
        for (uint32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    }
    static U block(const Calls& calls) { return calls.middle; }
    static U row(const Calls& calls) { return calls.fastest; }
    static void store_words(uint32_t* words, int64_t call, int64_t plane, const W (&w)[4]) {
        for (int word = 0; word < 4; ++word) store(words + word * plane + call, narrow(w[word]));
    }
};

// The two tables, made once.
inline const Octaves& octaves_of(int32_t dist) {
    static const Octaves normal(kNormalTable), laplace(kLaplaceTable);
    return dist == ULR_LAPLACE ? laplace : normal;
}

// The counters of successive vectors of calls before round kRound. This one takes any calls in sequence, and starts at
// the first round.
template <typename Order>
class Counters {
  public:
    static constexpr int kRound = 0;

    Counters(int64_t block, int64_t row, int64_t draw, const Calls& calls)
        : block_(set(static_cast<uint32_t>(block))),
          row_(set(static_cast<uint32_t>(row))),
          draw_(set(static_cast<uint32_t>(draw))),
          calls_(calls) {}

    void next(W (&c)[4]) {
        c[0] = widen(block_ + Order::block(calls_));
        c[1] = widen(row_ + Order::row(calls_));
        c[2] = widen(draw_ + calls_.draw);
        c[3] = widen(set(0u));
        calls_.advance();
    }

  private:
    U block_, row_, draw_;
    Calls calls_;
};

struct Product {
    Product(uint32_t a, uint32_t b) : high(static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32)), low(a * b) {}
    uint32_t high, low;
};

// The same for neighbouring blocks of one row. Half of the first two rounds is the same for all of them, and the first
// product of the other half grows by a constant from one vector to the next.
class RowCounters {
  public:
    static constexpr int kRound = 2;

    RowCounters(const KeySchedule& key, int64_t block, int64_t row, int64_t draw)
        : product_(multiply(widen(set(static_cast<uint32_t>(block)) + call_of_lane()), set(kPhiloxM0))),
          step_(multiply(widen(set(static_cast<uint32_t>(kLanes))), set(kPhiloxM0))),
          key_(set(key.k1[0])) {
        const Product of_draw(kPhiloxM1, static_cast<uint32_t>(draw));
        const Product of_row(kPhiloxM0, of_draw.high ^ static_cast<uint32_t>(row) ^ key.k0[0]);
        xor0_ = set(of_draw.low ^ key.k0[1]);
        xor2_ = set(of_row.high ^ key.k1[1]);
        word3_ = widen(set(of_row.low));
    }

    void next(W (&c)[4]) {
        c[1] = multiply(high_xor(product_, key_), set(kPhiloxM1));
        c[0] = high_xor(c[1], xor0_);
        c[2] = product_ ^ xor2_;
        c[3] = word3_;
        product_ = product_ + step_;
    }

  private:
    W product_, step_, word3_;
    U key_, xor0_, xor2_;
};

// The same for neighbouring rows of one block, which share half of the first three rounds.
class ColumnCounters {
  public:
    static constexpr int kRound = 3;

    ColumnCounters(const KeySchedule& key, int64_t block, int64_t row, int64_t draw) {
        uint32_t lanes[kLanes];
        ByWord::order(lanes);
        row_ = set(static_cast<uint32_t>(row)) + load(lanes);
        const Product of_block(kPhiloxM0, static_cast<uint32_t>(block));
        const Product of_draw(kPhiloxM1, static_cast<uint32_t>(draw));
        const Product second(kPhiloxM1, of_block.high ^ key.k1[0]);
        const Product third(kPhiloxM0, second.high ^ of_draw.low ^ key.k0[1]);
        xor_row_ = set(of_draw.high ^ key.k0[0]);
        xor_second_ = set(of_block.low ^ key.k1[1]);
        xor0_ = set(second.low ^ key.k0[2]);
        xor2_ = set(third.high ^ key.k1[2]);
        word3_ = widen(set(third.low));
    }

    void next(W (&c)[4]) {
        const W product = multiply(widen(row_ ^ xor_row_), set(kPhiloxM0));
        c[1] = multiply(high_xor(product, xor_second_), set(kPhiloxM1));
        c[0] = high_xor(c[1], xor0_);
        c[2] = product ^ xor2_;
        c[3] = word3_;
        row_ = row_ + set(static_cast<uint32_t>(kLanes));
    }

  private:
    W word3_;
    U row_, xor_row_, xor_second_, xor0_, xor2_;
};

// A key's schedule, with a vector for each round as well: an operand in memory, which takes no register.
struct RoundKeys {
    explicit RoundKeys(int64_t key) : schedule(key) {
        for (int round = 0; round < 10; ++round) {
            k0[round] = set(schedule.k0[round]);
            k1[round] = set(schedule.k1[round]);
        }
    }
    KeySchedule schedule;
    U k0[10], k1[10];
};

// Whether calls that share their row, or their block, are best made on their own: they fill several vectors, and the
// last one wastes few lanes.
inline bool fills_vectors(int64_t calls) {
    const int64_t lanes = (calls + kLanes - 1) / kLanes * kLanes;
    return calls > kLanes && (lanes - calls) * 16 <= calls;
}

// The words of the next `streams` x kLanes calls in sequence, the first of them number `call`. It and its caller
// are always inlined: as functions they would pass the places through memory, and noise would take half as long again.
template <typename Order, int streams, typename Sequence>
__attribute__((always_inline)) inline void philox_step(const RoundKeys& keys, Sequence& counters, uint32_t* words,
                                                       int64_t call, int64_t plane) {
    const U m0 = set(kPhiloxM0), m1 = set(kPhiloxM1);
    W c[streams][4];
    for (int s = 0; s < streams; ++s) counters.next(c[s]);
#pragma GCC unroll 10
    for (int round = Sequence::kRound; round < 10; ++round) {
        for (int s = 0; s < streams; ++s) {
            const W p0 = multiply(c[s][0], m0), p1 = multiply(c[s][2], m1);
            c[s][0] = high_xor(p1, c[s][1], keys.k0[round]);
            c[s][1] = p1;
            c[s][2] = high_xor(p0, c[s][3], keys.k1[round]);
            c[s][3] = p0;
        }
    }
    for (int s = 0; s < streams; ++s) Order::store_words(words, call + s * kLanes, plane, c[s]);
}

// The words of `count` calls in sequence, to `words`, which has room for kLanes calls more (`plane`: from one plane of
// words to the next, where there are any).
template <typename Order, typename Sequence>
__attribute__((always_inline)) inline void philox_words(const RoundKeys& keys, Sequence counters, int64_t count,
                                                        uint32_t* words, int64_t plane = 0) {
    static_assert(kStreams == 2 || kStreams == 3, "the last vectors go two by two");
    int64_t done = 0;
    const auto vectors = [&] { return (count - done + kLanes - 1) / kLanes; };
    // Four remaining vectors go two by two: one alone would wait for its products.
    if constexpr (kStreams == 3)
        for (; vectors() == 3 || vectors() > 4; done += kStreams * kLanes)
            philox_step<Order, kStreams>(keys, counters, words, done, plane);
    for (; vectors() > 1; done += 2 * kLanes) philox_step<Order, 2>(keys, counters, words, done, plane);
    if (vectors() > 0) philox_step<Order, 1>(keys, counters, words, done, plane);
}

// The places of a tile's calls, kept from one tile to the next: neighbours share their layout.
template <typename Order>
class Layout {
  public:
    const Calls& calls(int64_t middles, int64_t fastests) {
        if (middles != middles_ || fastests != fastests_) calls_ = made(middles_ = middles, fastests_ = fastests);
        return calls_;
    }

  private:
    static Calls made(int64_t middles, int64_t fastests) {
        uint32_t order[kLanes];
        Order::order(order);
        return Calls(middles, fastests, order);
    }
    int64_t middles_ = 1, fastests_ = 1;
    Calls calls_ = made(1, 1);
};

// Words to noise by the octaves of a distribution (distributions.h: quantile).
class Quantile {
  public:
    explicit Quantile(const Octaves& octaves) : octaves_(octaves) {}

    F operator()(U word) const {
        const U low31 = set(0x7fffffffu), one = set(1u), mantissa = set(0x007fffffu), unit = set(0x3f800000u);
        const U magnitude = bits(to_float(and_or(word, low31, one)));
        const U exponent = shift_right<23>(magnitude);
        const F t = as_float(and_or(magnitude, mantissa, unit));
        return as_float(and_xor(bits(octaves_.polynomial(exponent, t)), word, set(0x80000000u)));
    }

  private:
    const Octaves octaves_;  // a copy, which stays in registers: no store can change it
};

// The noise of `count` words, rounded up to whole vectors.
inline void quantiles(const Octaves& table, const uint32_t* words, int64_t count, float* values) {
    const Quantile quantile(table);
    for (int64_t i = 0; i < count; i += kLanes) store(values + i, quantile(load(words + i)));
}

// vectors(values)(i): the vector of values from i on.
inline auto vectors(const float* values) {
    return [values](int64_t i) { return load(values + i); };
}

// Makes tiles of one noise. Element (d, r, c) of the last tile is at row(d, r)[c].
class Tile {
  public:
    explicit Tile(const ulr_noise_spec& spec) : spec_(spec), keys_(*spec.key), octaves_(octaves_of(spec.dist)) {}

    const float* row(int64_t draw, int64_t row) const { return values_ + (draw * rows_ + row) * pitch_ + lead_; }

    // The number of rows of `cols` columns that fit in a tile.
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

    // noise(draw, row)(c) is the vector of the last tile's values from column c on.
    auto noise() const {
        return [this](int64_t draw, int64_t r) { return vectors(row(draw, r)); };
    }

    // Calls body(noise) with a tile's noise as above, for values that are used once: each is made where it is used, so
    // that its arithmetic overlaps with loads and stores.
    template <typename Body>
    __attribute__((always_inline)) void use(const Extent& at, Body body) {
        if (spec_.hadamard || spec_.sobol) {
            make(at);
            return body(noise());
        }
        if (spec_.dist == ULR_RADEMACHER) {
            rows_ = at.rows;
            lead_ = at.col % kSignColumns;
            pitch_ = 4 * make_words(at, at.draw, at.draws, kSignColumns);
            return body([this](int64_t draw, int64_t r) {
                // A byte has the signs of eight columns. A vector's first sign can be any of them.
                const auto* bytes = reinterpret_cast<const char*>(words_ + (draw * rows_ + r) * pitch_);
                return [bytes, lead = lead_](int64_t c) {
                    uint32_t bits;
                    memcpy(&bits, bytes + (lead + c) / 8, sizeof bits);
                    return signs(bits >> (lead + c) % 8);
                };
            });
        }
        make_words(at);
        body([this, quantile = Quantile(octaves_)](int64_t draw, int64_t r) {
            return [&quantile, words = words(draw, r)](int64_t c) { return quantile(load(words + c)); };
        });
    }

    // Makes only the words, one a column, which are then at words(d, r)[c]. Not for signs.
    void make_words(const Extent& at) {
        rows_ = at.rows;
        lead_ = at.col % kValueColumns;
        pitch_ = kValueColumns * make_words(at, at.draw, at.draws, kValueColumns);
    }
    const uint32_t* words(int64_t draw, int64_t row) const { return words_ + (draw * rows_ + row) * pitch_ + lead_; }

  private:
    // The words of every call with one of the columns. A row of the tile starts at its first call's first column.
    int64_t make_words(const Extent& at, int64_t draw, int64_t draws, int64_t columns_of_call) {
        const int64_t block = at.col / columns_of_call;
        const int64_t blocks = (at.col + at.cols - 1) / columns_of_call - block + 1;
        if (fills_vectors(blocks)) {
            for (int64_t i = 0; i < draws * at.rows; ++i)  // values beyond a row's end are overwritten by the next row
                philox_words<ByCall>(keys_,
                                     RowCounters(keys_.schedule, block, at.row + i % at.rows, draw + i / at.rows),
                                     blocks, words_ + 4 * i * blocks);
        } else {
            philox_words<ByCall>(keys_, Counters<ByCall>(block, at.row, draw, layout_.calls(at.rows, blocks)),
                                 draws * at.rows * blocks, words_);
        }
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
        // Orthogonal draws share their words.
        const int64_t draw = spec_.hadamard ? at.draw >> kHadamardBits : at.draw;
        const int64_t last = spec_.hadamard ? (at.draw + at.draws - 1) >> kHadamardBits : draw + at.draws - 1;
        const int64_t words_of_row = make_words(at, draw, last - draw + 1, kSignColumns) * 4;
        const int64_t lead = at.col % kSignColumns, shift = lead % 32, pitch = (at.cols + kLanes - 1) / kLanes * kLanes;
        lead_ = 0;
        pitch_ = pitch;
        for (int64_t row = 0; row < at.draws * at.rows; ++row) {
            const int64_t of_row = at.draw + row / at.rows;
            const int64_t shared = spec_.hadamard ? ((of_row >> kHadamardBits) - draw) * at.rows + row % at.rows : row;
            const uint32_t* word = words_ + shared * words_of_row + lead / 32;
            const uint32_t slot = spec_.hadamard ? hadamard_slot(spec_, at.row + row % at.rows, at.col) : 0;
            float* to = values_ + row * pitch;
            // A word at a time: values beyond the row's end are overwritten by the next row, or lie in the room after
            // the last one.
            for (int64_t c = 0; c < pitch; c += 32, ++word) {
                const uint64_t window = word[0] | static_cast<uint64_t>(word[1]) << 32;
                auto bits = static_cast<uint32_t>(window >> shift);
                if (spec_.hadamard) bits ^= walsh_word(static_cast<uint32_t>(of_row), slot + static_cast<uint32_t>(c));
                for (int lane = 0; lane < 32; lane += kLanes) store(to + c + lane, signs(bits >> lane));
            }
        }
    }

    const ulr_noise_spec& spec_;
    RoundKeys keys_;
    const Octaves& octaves_;
    Layout<ByCall> layout_;
    int64_t rows_ = 0, pitch_ = 0, lead_ = 0;
    alignas(64) uint32_t words_[kTileFloats + 8 * kLanes];
    alignas(64) float values_[kTileFloats + 8 * kLanes];
};

}  // namespace ULR_ISA
}  // namespace ulr

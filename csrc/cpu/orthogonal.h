// Orthogonal signs (docs/noise.md) of many draws: the draws of a block have the same signs but for Walsh functions. So
// a value of each draw costs an exclusive or, and a weighted sum over draws one transform of the weights.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "pass.h"
#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {

constexpr int64_t kBlockDraws = int64_t{1} << kHadamardBits;  // that have common signs
constexpr int64_t kPlaces = 512;                              // at once: their state stays in the first-level cache

// The first draw of the block of 2^16 draws.
inline int64_t block_of(int64_t draw) { return draw / kBlockDraws * kBlockDraws; }

// Calls body(draw, draws) for the parts of a range of draws that lie in one block of 2^16.
template <typename Body>
void for_each_block(int64_t draw, int64_t draws, Body body) {
    for (const int64_t end = draw + draws; draw < end;) {
        const int64_t part = std::min(block_of(draw) + kBlockDraws, end) - draw;
        body(draw, part);
        draw += part;
    }
}

// Draw after draw of sigma * eps at some neighbouring places: columns of a row, or rows of a column.
class OrthogonalDraws {
  public:
    // To be set before use(): the slot of each place, and sigma * eps of the block's first draw.
    uint32_t* slots() { return slots_; }
    float* values() { return values_; }

    // Calls row(d)(i, n, value) for each draw d of `draws` from 0 on, in one block of 2^16, and all places: `value` are
    // the n lanes from place i on of draw + d. Four draws are made together: they differ by their lowest two bits.
    template <typename Row>
    __attribute__((always_inline)) void use(int64_t draw, int64_t draws, int64_t places, Row row) {
        const auto low = static_cast<uint32_t>(draw) & (kBlockDraws - 1);
        move(low, places);
        make_steps(low, draws, places);
        int64_t d = 0;
        const auto one = [&]() __attribute__((always_inline)) {
            const auto to = row(d);
            by_lanes(places, [&](int64_t i, int64_t n) __attribute__((always_inline)) { to(i, n, load(values_ + i)); });
            const auto at = low + static_cast<uint32_t>(d++);
            if (d < draws) move(at ^ (at + 1), places);
        };
        while (d < draws && (low + static_cast<uint32_t>(d)) % 4) one();
        for (; d + 4 <= draws; d += 4) {
            const auto next = low + static_cast<uint32_t>(d) + 4;
            const uint32_t* step = d + 4 < draws ? steps_[__builtin_ctz(next)] : none_;
            const auto row0 = row(d), row1 = row(d + 1), row2 = row(d + 2), row3 = row(d + 3);
            const U sign = set(0x80000000u);
            by_lanes(places, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                const U slot = load(slots_ + i), value = bits(load(values_ + i));
                const U bit0 = shift_left<31>(slot), bit1 = shift_left<30>(slot) & sign;
                row0(i, n, as_float(value));
                row1(i, n, as_float(value ^ bit0));
                row2(i, n, as_float(value ^ bit1));
                row3(i, n, as_float(value ^ (bit0 ^ bit1)));
                store(values_ + i, as_float(value ^ load(step + i)));
            });
        }
        while (d < draws) one();
    }

  private:
    // Changes the values' draw by the bits `changed` of its number.
    void move(uint32_t changed, int64_t places) {
        for (uint32_t bit = 0; changed >> bit; ++bit) {
            if (!(changed >> bit & 1u)) continue;
            for (int64_t i = 0; i < places; i += kLanes)
                store(values_ + i,
                      as_float(bits(load(values_ + i)) ^ (shift_left(load(slots_ + i), 31 - bit) & set(0x80000000u))));
        }
    }

    // From a draw that four divides to the fourth one after it, number n: bits 2 ... ctz(n) change.
    void make_steps(uint32_t low, int64_t draws, int64_t places) {
        const auto last = static_cast<uint32_t>(low + draws - 1);
        for (uint32_t bit = 2; (low ^ last) >> bit; ++bit)
            for (int64_t i = 0; i < places; i += kLanes) {
                const U change = shift_left(load(slots_ + i), 31 - bit) & set(0x80000000u);
                store(steps_[bit] + i, bit > 2 ? change ^ load(steps_[bit - 1] + i) : change);
            }
    }

    alignas(64) uint32_t slots_[kPlaces + kLanes] = {};
    alignas(64) float values_[kPlaces + kLanes] = {};
    alignas(64) uint32_t steps_[kHadamardBits][kPlaces + kLanes];
    alignas(64) uint32_t none_[kPlaces + kLanes] = {};
};

// h[s] = sum over c of weights[c] (-1)^popcount(c & s), in place, by butterflies of ascending stride.
inline void walsh_hadamard(float* h, int64_t size) {
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t first = 0; first < size; first += 2 * half)
            by_lanes(half, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                float *low = h + first + i, *high = low + half;
                const F a = load_part(low, n), b = load_part(high, n);
                store_part(low, a + b, n);
                store_part(high, a - b, n);
            });
}

// sum over d of weights[d] eps(draw + d), for rows of weights: it is eps(first) * H[slot mod size] of one aligned block
// of `size` draws, or of several such blocks added up in ascending order.
class OrthogonalSums {
  public:
    // `room`: the places that are read one after another.
    OrthogonalSums(int64_t draw, int64_t draws, int64_t rows, int64_t room)
        : draw_(draw),
          draws_(draws),
          size_(size_of(draws)),
          pitch_(size_ + room + 16),
          rows_(rows),
          memory_(blocks() * rows * pitch_) {}

    bool failed() const { return blocks() > 0 && rows_ > 0 && !memory_.data(); }
    int64_t size() const { return size_; }
    int64_t blocks() const { return draws_ ? (draw_ + draws_ - 1) / size_ - draw_ / size_ + 1 : 0; }
    int64_t first(int64_t block) const { return (draw_ / size_ + block) * size_; }

    // H of a row's weights: at(...)[slot mod size + i] for `room` places i from one of a slot on.
    const float* at(int64_t block, int64_t row) const { return memory_.data() + (block * rows_ + row) * pitch_; }
    const float* from(int64_t block, int64_t row, uint32_t slot) const {
        return at(block, row) + (slot & static_cast<uint32_t>(size_ - 1));
    }

    // weight(row, d), from many threads.
    template <typename Weight>
    void make(int threads, Weight weight) {
        constexpr int64_t kWorthWaking = 1 << 12;
        parallel(threads, rows_, kWorthWaking / size_ + 1, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                for (int64_t block = 0; block < blocks(); ++block) {
                    float* h = memory_.data() + (block * rows_ + row) * pitch_;
                    for (int64_t i = 0; i < size_; ++i) {
                        const int64_t d = first(block) + i - draw_;
                        h[i] = d >= 0 && d < draws_ ? weight(row, d) : 0.0f;
                    }
                    walsh_hadamard(h, size_);
                    for (int64_t i = size_; i < pitch_; ++i) h[i] = h[i - size_];
                }
            }
        });
    }

  private:
    static int64_t size_of(int64_t draws) {
        int64_t size = 1;
        while (size < draws && size < kBlockDraws) size *= 2;
        return size;
    }

    const int64_t draw_, draws_, size_, pitch_, rows_;
    const Scratch memory_;
};

}  // namespace ULR_ISA
}  // namespace ulr

// The noise contract on the device (docs/noise.md): bit for bit like ulr/distributions.h, but arranged for a GPU.
#pragma once

#include "element.cuh"
#include "ptx.cuh"
#include "ulr/api.h"
#include "ulr/distributions.h"
#include "ulr/philox.h"

namespace ulr {

// A block's constants of the noise, in shared memory.
struct NoiseTable {
    // The coefficients of each octave in three tables of pairs: the 32 rows of a pair fill 256 bytes, so the lanes of a
    // half-warp conflict in a bank only if their octaves differ by 16 (a chance of 2^-16 a lane), and one index
    // register serves all three loads. Wider rows would conflict between octaves that are 8 or 4 apart.
    float2 pairs[(ULR_TABLE_DEGREE + 1) / 2][32];
    // 1 and the bits of 1.0f. Read from memory each is a register's value, and one three-input logic instruction takes
    // it and a mask; as literals the two would need two instructions.
    uint32_t odd, one;
    // The keys of Philox's rounds. Read from memory, they cannot be made again from one another, which the compiler
    // would otherwise do inside every loop to save registers.
    uint32_t k0[10], k1[10];

    // A barrier must follow.
    __device__ void fill(const ulr_noise_spec& spec, int thread, int threads);
};

__device__ const uint32_t kQuantileBits[2][32][ULR_TABLE_DEGREE + 1] = {{ULR_NORMAL_TABLE}, {ULR_LAPLACE_TABLE}};

__device__ inline void NoiseTable::fill(const ulr_noise_spec& spec, int thread, int threads) {
    if (thread == 0) {
        odd = 1u;
        one = 0x3f800000u;
        const KeySchedule key(*spec.key);
        for (int round = 0; round < 10; ++round) {
            k0[round] = key.k0[round];
            k1[round] = key.k1[round];
        }
    }
    for (int row = thread; row < 32; row += threads) {
        const uint32_t* bits = kQuantileBits[spec.dist == ULR_LAPLACE][row];
        for (int pair = 0; pair < (ULR_TABLE_DEGREE + 1) / 2; ++pair)
            pairs[pair][row] = make_float2(float_of(bits[2 * pair]), float_of(bits[2 * pair + 1]));
    }
}

// A thread's part of the table: the address of its rows, and the two words.
struct Quantile {
    uint32_t rows;  // shared address
    uint32_t odd, one;

    __device__ __forceinline__ explicit Quantile(const NoiseTable& table)
        : rows(shared_address(table.pairs)), odd(table.odd), one(table.one) {}

    __device__ __forceinline__ float operator()(uint32_t word) const;
};

__device__ __forceinline__ float Quantile::operator()(uint32_t word) const {
    const uint32_t bits = bits_of(static_cast<float>(static_cast<int32_t>((word & 0x7ffffffeu) | odd)));
    const float t = float_of((bits & 0x007fffffu) | one);
    // The raw exponent counts from 127, the rows from 0: the difference goes into the load's constant offset.
    const uint32_t row = rows + exponent(bits) * 8;
    constexpr int kPair = 32 * 8, kBias = -127 * 8;
    const float2 low = load_shared<kBias>(row), middle = load_shared<kBias + kPair>(row),
                 high = load_shared<kBias + 2 * kPair>(row);
    float result = fmaf(high.y, t, high.x);
    result = fmaf(result, t, middle.y);
    result = fmaf(result, t, middle.x);
    result = fmaf(result, t, low.y);
    result = fmaf(result, t, low.x);
    return float_of(bits_of(result) ^ (word & 0x80000000u));
}

enum class Kind { kQuantile, kSobol, kSigns };

inline Kind kind_of(const ulr_noise_spec& spec) {
    if (spec.dist == ULR_RADEMACHER) return Kind::kSigns;
    return spec.sobol != nullptr ? Kind::kSobol : Kind::kQuantile;
}

// Makes the four values of a quad. A kernel makes one, after the table is filled. Each round's key goes through a
// shuffle, so that the compiler knows that all lanes agree and keeps the schedule in uniform registers.
template <Kind kind>
class Noise {
  public:
    __device__ __forceinline__ Noise(const ulr_noise_spec& spec, const NoiseTable& table)
        : spec_(spec), positions_(static_cast<uint32_t>(opaque(spec.positions))), quantile_(table), key_(0) {
        for (int round = 0; round < 10; ++round) {
            key_.k0[round] = __shfl_sync(0xffffffffu, table.k0[round], 0);
            key_.k1[round] = __shfl_sync(0xffffffffu, table.k1[round], 0);
        }
    }

    // eps of columns 4 quad ... 4 quad + 3 of a row (all counted in the whole noise).
    __device__ __forceinline__ void quad(float (&eps)[4], uint32_t row, uint32_t quad, uint32_t draw) const {
        if constexpr (kind == Kind::kSigns) {
            sign_quad(eps, row, quad, draw, orthogonal());
        } else {
            Words words = philox4x32(Words{{quad, row, kind == Kind::kSobol ? 0u : draw, 0u}}, key_);
            if constexpr (kind == Kind::kSobol) add_points(words, row, quad, draw);
#pragma unroll
            for (int i = 0; i < 4; ++i) eps[i] = quantile_(words.w[i]);
        }
    }

    // The same of signs. Orthogonal: whether draws are; it may be a constant.
    template <typename Orthogonal>
    __device__ __forceinline__ void sign_quad(float (&eps)[4], uint32_t row, uint32_t quad, uint32_t draw,
                                              Orthogonal orthogonal) const {
        signs_to_floats(eps, sign_word(row, quad >> 3, draw, orthogonal) >> 4 * (quad & 7));
    }

    // Whether the draws are orthogonal: each block of 2^16 draws shares its calls of Philox.
    __device__ __forceinline__ bool orthogonal() const { return spec_.hadamard != 0; }

    // The slot of a coordinate of orthogonal signs; 16 bits of it count. As 32 bits the 2^32 positions of a parameter,
    // whose rows are all of one sample, are 0.
    __device__ __forceinline__ uint32_t slot(uint32_t row, uint32_t col) const {
        return slot(row, col, static_cast<uint32_t>(spec_.positions));
    }
    __device__ __forceinline__ uint32_t slot(uint32_t row, uint32_t col, uint32_t positions) const {
        const uint32_t position = positions == 0 ? row : row % positions;
        return position * static_cast<uint32_t>(spec_.width | 1) + col;
    }

    // The signs of columns 128 index ... 128 index + 127 of a row.
    template <typename Orthogonal>
    __device__ __forceinline__ Words sign_words(uint32_t row, uint32_t index, uint32_t draw,
                                                Orthogonal orthogonal) const {
        Words words = made_words(row, index, orthogonal ? draw >> kHadamardBits : draw);
        if (orthogonal) {
            // Opaque: kept from one row to the next, parts of it would take registers.
            const uint32_t positions = static_cast<uint32_t>(opaque(spec_.positions));
            const uint32_t first = slot(row, 128 * opaque(static_cast<int>(index)), positions);
#pragma unroll
            for (int i = 0; i < 4; ++i) words.w[i] ^= walsh_word(draw, first + 32 * i);
        }
        return words;
    }

    // The signs of columns 32 index ... 32 index + 31 of a row.
    template <typename Orthogonal>
    __device__ __forceinline__ uint32_t sign_word(uint32_t row, uint32_t index, uint32_t draw,
                                                  Orthogonal orthogonal) const {
        const uint32_t word = made_word(row, index, orthogonal ? draw >> kHadamardBits : draw);
        return orthogonal ? word ^ walsh_word(draw, slot(row, 32 * index)) : word;
    }

    // One word of a call of Philox. Orthogonal draws share it.
    __device__ __forceinline__ uint32_t made_word(uint32_t row, uint32_t index, uint32_t call_draw) const {
        const Words words = made_words(row, index >> 2, call_draw);
        const uint32_t low = index & 1 ? words.w[1] : words.w[0], high = index & 1 ? words.w[3] : words.w[2];
        return index & 2 ? high : low;
    }

    // The lowest bits of a word: 0 is +1, 1 is -1.
    template <int count>
    __device__ __forceinline__ void signs_to_floats(float (&eps)[count], uint32_t word) const {
#pragma unroll
        for (int i = 0; i < count; ++i) eps[i] = float_of((word << (31 - i) & 0x80000000u) | quantile_.one);
    }

  private:
    __device__ __forceinline__ Words made_words(uint32_t row, uint32_t index, uint32_t call_draw) const {
        return philox4x32(Words{{index, row, call_draw, 0u}}, key_);
    }

    // XORs each word with its dimension's Sobol point. Columns past the block's last are made with their quad and
    // discarded; they have no dimension and use the last one's.
    __device__ __forceinline__ void add_points(Words& words, uint32_t row, uint32_t quad, uint32_t draw) const {
        // In 32 bits: there are at most 21201 dimensions.
        const int position = row % positions_, width = static_cast<int>(spec_.width);
        const int col = min(static_cast<int>(4 * quad), width - 1), last = width - 1 - col;
        const uint32_t* directions = spec_.sobol + 30 * (position * width + col);
#pragma unroll 1
        for (; draw != 0; draw >>= 1, ++directions)
            if (draw & 1u)
#pragma unroll
                for (int i = 0; i < 4; ++i) words.w[i] ^= directions[30 * min(i, last)];
    }

    const ulr_noise_spec& spec_;
    const uint32_t positions_;
    const Quantile quantile_;
    KeySchedule key_;
};

// The noise of eight neighbouring columns of a row, octet number `octet` of the whole noise.
template <Kind kind>
__device__ __forceinline__ void octet_noise(float (&eps)[8], const Noise<kind>& noise, uint32_t row, uint32_t octet,
                                            uint32_t draw) {
    if constexpr (kind == Kind::kSigns) {
        noise.signs_to_floats(eps, noise.sign_word(row, octet >> 2, draw, noise.orthogonal()) >> 8 * (octet & 3));
    } else {
        float low[4], high[4];
        noise.quad(low, row, 2 * octet, draw);
        noise.quad(high, row, 2 * octet + 1, draw);
#pragma unroll
        for (int i = 0; i < 4; ++i) eps[i] = low[i], eps[4 + i] = high[i];
    }
}

// A word of signs of a row, for every draw number `step` from a first one on. What orthogonal draws share is kept.
template <uint32_t step>
class SignWord {
  public:
    // Columns 32 index ... 32 index + 31.
    __device__ __forceinline__ SignWord(const Noise<Kind::kSigns>& noise, uint32_t row, uint32_t index)
        : noise_(noise), row_(row), index_(index), slot_(noise.orthogonal() ? noise.slot(row, 32 * index) : 0) {}

    // First: the first draw of all.
    __device__ __forceinline__ uint32_t make(uint32_t draw, bool first) {
        constexpr uint32_t kWithinBlock = (1u << kHadamardBits) - 1;
        const bool orthogonal = noise_.orthogonal();
        if (!orthogonal || first || (draw & kWithinBlock) < step)
            shared_ = noise_.made_word(row_, index_, orthogonal ? draw >> kHadamardBits : draw);
        return orthogonal ? shared_ ^ walsh_word(draw, slot_) : shared_;
    }

    // The word of one draw; nothing of it is kept.
    __device__ __forceinline__ uint32_t once(uint32_t draw) const {
        return noise_.sign_word(row_, index_, draw, noise_.orthogonal());
    }

  private:
    const Noise<Kind::kSigns>& noise_;
    const uint32_t row_, index_, slot_;
    uint32_t shared_ = 0;
};

// The noise of a quad, draw after draw.
template <Kind kind>
class Quad {
  public:
    __device__ __forceinline__ Quad(const Noise<kind>& noise, uint32_t row, uint32_t quad)
        : noise_(noise), row_(row), quad_(quad) {}

    // Index counts the draws up from 0.
    __device__ __forceinline__ void make(float (&eps)[4], uint32_t draw, uint32_t) {
        noise_.quad(eps, row_, quad_, draw);
    }

  private:
    const Noise<kind>& noise_;
    const uint32_t row_, quad_;
};

template <>
class Quad<Kind::kSigns> {
  public:
    __device__ __forceinline__ Quad(const Noise<Kind::kSigns>& noise, uint32_t row, uint32_t quad)
        : noise_(noise), shift_(4 * (quad & 7)), word_(noise, row, quad >> 3) {}

    __device__ __forceinline__ void make(float (&eps)[4], uint32_t draw, uint32_t index) {
        noise_.signs_to_floats(eps, word_.make(draw, index == 0) >> shift_);
    }

  private:
    const Noise<Kind::kSigns>& noise_;
    const uint32_t shift_;
    SignWord<1> word_;
};

// The noise of eight neighbouring columns of a row, the first a multiple of eight in the whole noise, draw after draw.
template <Kind kind>
class Octet {
  public:
    __device__ __forceinline__ Octet(const Noise<kind>& noise, uint32_t row, int64_t col)
        : noise_(noise), row_(row), quad_(static_cast<uint32_t>(col >> 2)) {}

    // Draw number `index` from `draw` on, index counting up from 0. Keeps: a constant, whether registers hold what
    // orthogonal draws share.
    template <typename Keeps>
    __device__ __forceinline__ void make(float (&eps)[8], uint32_t draw, uint32_t index, Keeps) {
        float low[4], high[4];
        noise_.quad(low, row_, quad_, draw + index);
        noise_.quad(high, row_, quad_ + 1, draw + index);
#pragma unroll
        for (int i = 0; i < 4; ++i) eps[i] = low[i], eps[4 + i] = high[i];
    }

  private:
    const Noise<kind>& noise_;
    const uint32_t row_, quad_;
};

template <>
class Octet<Kind::kSigns> {
  public:
    __device__ __forceinline__ Octet(const Noise<Kind::kSigns>& noise, uint32_t row, int64_t col)
        : noise_(noise),
          lane_(opaque(static_cast<int>(threadIdx.x)) % 32),
          made_(noise, row, static_cast<uint32_t>(col >> 5)) {}

    template <typename Keeps>
    __device__ __forceinline__ void make(float (&eps)[8], uint32_t draw, uint32_t index, Keeps keeps) {
        noise_.signs_to_floats(eps, signs(draw, index, keeps));
    }

    // The same as bits, the lowest the first column's; 0 is +1, 1 is -1. All lanes of a warp run together; each aligned
    // group of four has the four octets of one word, so each lane makes the word of one draw for all of them.
    template <typename Keeps>
    __device__ __forceinline__ uint32_t signs(uint32_t draw, uint32_t index, Keeps keeps) {
        const uint32_t member = lane_ % 4;
        if (index % 4 == 0) {
            const uint32_t own_draw = draw + index + member;
            word_ = keeps ? made_.make(own_draw, index == 0) : made_.once(own_draw);
        }
        return __shfl_sync(0xffffffffu, word_, index % 4, 4) >> 8 * member;
    }

  private:
    const Noise<Kind::kSigns>& noise_;
    const uint32_t lane_;
    SignWord<4> made_;
    uint32_t word_ = 0;
};

// Eight noised values: clean + sigma eps, and clean - sigma eps for the second of an antithetic pair.
template <Kind kind>
class Noised {
  public:
    __device__ __forceinline__ Noised(const float (&clean)[8], const float* sigma) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            a_[i] = kind == Kind::kSigns ? clean[i] + sigma[i] : clean[i];
            b_[i] = kind == Kind::kSigns ? clean[i] - sigma[i] : sigma[i];
        }
    }

    // The values of the next draw (see Octet). Paired: whether `second` is wanted.
    template <typename Paired>
    __device__ __forceinline__ void make(float (&first)[8], float (&second)[8], Paired paired, Octet<kind>& octet,
                                         uint32_t draw, uint32_t index) const {
        if constexpr (kind == Kind::kSigns) {
            const uint32_t signs = octet.signs(draw, index, StaticBool<true>{});
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                first[i] = signs >> i & 1u ? b_[i] : a_[i];
                if (paired) second[i] = signs >> i & 1u ? a_[i] : b_[i];
            }
        } else {
            float eps[8];
            octet.make(eps, draw, index, StaticBool<true>{});
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                first[i] = fmaf(b_[i], eps[i], a_[i]);
                if (paired) second[i] = fmaf(-b_[i], eps[i], a_[i]);
            }
        }
    }

  private:
    float a_[8], b_[8];  // signs: the two values there are; else clean and sigma
};

}  // namespace ulr

// Words to noise, and the coordinates of the noise contract to words (docs/noise.md), on host and device.
// The exact tier: integer operations, int-to-float conversion, IEEE multiply, add and explicit fma in a fixed order.
#pragma once

#include <math.h>
#include <string.h>

#include "ulr/api.h"
#include "ulr/philox.h"
#include "ulr/tables.h"

namespace ulr {
inline namespace ULR_ISA {

constexpr int kTableStride = 8;  // coefficients of an octave, padded so that a row is two 16-byte loads

ULR_HD float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// A number of an op that is no integer: its bits.
ULR_HD float number_of(int64_t bits) { return float_of(static_cast<uint32_t>(bits)); }

ULR_HD uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

// |quantile| by octaves: `table` is [32][kTableStride] coefficients, lowest power first; then the word's bit 31 as
// sign.
ULR_HD float quantile(uint32_t word, const float* table) {
    const float magnitude = static_cast<float>(static_cast<int32_t>((word & 0x7fffffffu) | 1u));
    const uint32_t bits = bits_of(magnitude);
    const float* row = table + ((bits >> 23) - 127u) * kTableStride;
    const float t = float_of((bits & 0x007fffffu) | 0x3f800000u);
    float result = row[ULR_TABLE_DEGREE];
    for (int power = ULR_TABLE_DEGREE - 1; power >= 0; --power) result = fmaf(result, t, row[power]);
    return float_of(bits_of(result) ^ (word & 0x80000000u));
}

// The 32 signs of a word: bit b is column b; 0 is +1, 1 is -1.
ULR_HD float rademacher(uint32_t word, int bit) { return float_of(0x3f800000u | ((word >> bit) & 1u) << 31); }

// -d/d eps ln f(eps). Laplace: sqrt(2) with the sign bit of eps (never sign(eps), which has a third value).
ULR_HD float score(float eps, int dist) {
    return dist == ULR_LAPLACE ? float_of(0x3fb504f3u | (bits_of(eps) & 0x80000000u)) : eps;
}

// The slot of a coordinate of orthogonal signs; 16 bits of it count.
ULR_HD uint32_t hadamard_slot(const ulr_noise_spec& spec, int64_t row, int64_t col) {
    return static_cast<uint32_t>(row % spec.positions * (spec.width | 1) + col);
}

constexpr int kHadamardBits = 16;  // of a draw: the higher ones choose the signs that 2^16 draws share

// All bits set where an odd number of bits is set, else none.
ULR_HD uint32_t parity_mask(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return static_cast<uint32_t>(static_cast<int32_t>(__popc(static_cast<int>(bits)) << 31) >> 31);
#else
    return 0u - static_cast<uint32_t>(__builtin_parity(bits));
#endif
}

// The Walsh functions 0 ... 31 at the lower five bits of a draw, a bit each: 1 is -1.
ULR_HD uint32_t walsh_bits(uint32_t draw) {
    constexpr uint32_t kFunctions[] = {0xaaaaaaaau, 0xccccccccu, 0xf0f0f0f0u, 0xff00ff00u, 0xffff0000u};
    uint32_t bits = 0;
    for (int b = 0; b < 5; ++b) bits ^= (draw & 1u << b) * (kFunctions[b] >> b);
    return bits;
}

// The same of slots slot ... slot + 31, at all 16 bits. The lower five bits of the slots go round once; where they
// start again, the higher ones have grown by one.
ULR_HD uint32_t walsh_word(uint32_t draw, uint32_t slot) {
    const uint32_t bits = walsh_bits(draw), turn = slot & 31u, high = (draw & 0xffffu) >> 5, block = slot >> 5;
    const uint32_t turned = bits >> turn | bits << ((0u - turn) & 31u);
    const uint32_t later = ~(~0u >> turn);  // slots of the next block
    const uint32_t here = parity_mask(high & block), next = parity_mask(high & (block + 1u));
    return turned ^ here ^ (later & (here ^ next));
}

// The Sobol point of a dimension, in natural order. `directions` is its row: 30 numbers that fill 32 bits.
ULR_HD uint32_t sobol(const uint32_t* directions, uint32_t draw) {
    uint32_t point = 0;
    for (int bit = 0; draw >> bit; ++bit)
        if (draw >> bit & 1u) point ^= directions[bit];
    return point;
}

}  // namespace ULR_ISA
}  // namespace ulr

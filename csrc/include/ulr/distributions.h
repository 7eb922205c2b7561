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

// The Sobol point of a dimension, in natural order. `directions` is its row: 30 numbers that fill 32 bits.
ULR_HD uint32_t sobol(const uint32_t* directions, uint32_t draw) {
    uint32_t point = 0;
    for (int bit = 0; draw >> bit; ++bit)
        if (draw >> bit & 1u) point ^= directions[bit];
    return point;
}

}  // namespace ULR_ISA
}  // namespace ulr

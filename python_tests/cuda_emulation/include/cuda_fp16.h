// fp16 on the host, rounded to nearest even.
#pragma once

#include <math.h>
#include <stdint.h>

struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
    float result;
    if (exponent == 31) {
        result = mantissa ? NAN : INFINITY;
    } else {
        result = exponent ? ldexpf(1024.0f + mantissa, exponent - 25) : ldexpf(mantissa, -24);
    }
    return value.bits >> 15 ? -result : result;
}

inline __half __float2half_rn(float value) {
    const uint16_t sign = signbit(value) ? 0x8000 : 0;
    const float magnitude = fabsf(value);
    if (isnan(value)) return {0x7fff};
    if (magnitude == 0.0f) return {sign};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent;
    frexpf(magnitude, &exponent);
    if (exponent < -13) exponent = -13;  // subnormal numbers share the least exponent
    // In units of the last place; nearbyint rounds to even, and a carry moves into the exponent by itself.
    const auto units = static_cast<uint32_t>(nearbyintf(ldexpf(magnitude, 11 - exponent)));
    return {static_cast<uint16_t>(sign | (units + (static_cast<uint32_t>(exponent + 13) << 10)))};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

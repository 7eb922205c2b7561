// exp, tanh and the logistic function of lanes, to about one unit in the last place; NaN stays NaN.
#pragma once

#include "simd.h"

namespace ulr {
inline namespace ULR_ISA {

// e^x = scale * (1 + rest): scale a power of two, rest the series of e^f - 1 for f within ln(2) / 2 of 0.
struct Exponential {
    F scale, rest;

    explicit Exponential(F x) {
        x = smaller(set(88.0f), larger(set(-87.0f), x));  // so that the scale is an ordinary number
        const F shift = set(0x1.8p23f);                   // brings a number's nearest integer to its lowest bits
        const F n = fma(x, set(0x1.715476p0f), shift);    // x / ln(2)
        const F whole = n - shift;
        F f = fma(whole, set(-0x1.62e4p-1f), x);   // ln(2), its first bits: the product is exact
        f = fma(whole, set(-0x1.7f7d1cp-20f), f);  // and the rest of it
        scale = as_float(shift_left<23>(bits(n)) + set(0x3f800000u));
        F series = set(1.0f / 5040);
        for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f}) series = fma(series, f, set(term));
        rest = fma(series, f * f, f);
    }
};

inline F exponential(F x) {
    const Exponential e(x);
    return fma(e.scale, e.rest, e.scale);
}

inline F logistic(F x) {
    const F one = set(1.0f);
    return one / (one + exponential(set(0.0f) - x));
}

// (e^2|x| - 1) / (e^2|x| + 1) with the sign of x, the numerator without cancellation.
inline F hyperbolic_tangent(F x) {
    const U sign = set(0x80000000u);
    const F magnitude = as_float(bits(x) & set(0x7fffffffu));
    const Exponential e(smaller(set(40.0f), magnitude + magnitude));
    const F numerator = fma(e.scale, e.rest, e.scale - set(1.0f));
    return as_float(and_xor(bits(numerator / (numerator + set(2.0f))), bits(x), sign));
}

}  // namespace ULR_ISA
}  // namespace ulr

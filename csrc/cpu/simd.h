// The lanes of one instruction set, picked when this source is compiled: AVX-512, AVX2 with FMA, NEON, or
// portable C++. Each of the four headers defines, in its own inline namespace, the same names:
//     kLanes; U, F: vectors of uint32 and of float; M: a mask of lanes
//     integers   set, load, store, operators + - & | ^, shift_left<n>, shift_right<n>, and_or (a & b | c),
//                and_xor (a ^ b & c), not_less, subtract_where
//     products   W: the lanes of a U in 64 bits each; the upper 32 bits are ignored, so that a product is itself
//                the vector of its lower halves: widen, narrow, multiply, + (of whole products), ^, high_xor (upper
//                half ^ a ^ k)
//     floats     set, load, store, fma, operators + - * /, square_root, larger and smaller (b where either is NaN),
//                where_positive (b where a > 0, else 0), to_float (of int32), bits, as_float
//     kStreams   vectors of calls of Philox in flight, which hide the products' latency as far as registers reach
//     Octaves    the table of a distribution, held where an octave's coefficients can be looked up by lane.
//                polynomial(exponent, t): that of each lane's octave at t; `exponent` is the biased exponent of
//                2^octave
//     interleave four vectors, one word of each of kLanes calls of Philox, to the order of columns
//     signs      kLanes bits to +1 and -1
//     load_part, store_part: the first n lanes (all, where n is more), of fp32, bf16 or fp16 (Bf16, Half) in memory
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ulr/distributions.h"

namespace ulr {
inline namespace ULR_ISA {

struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

alignas(64) constexpr uint32_t kNormalTable[32][ULR_TABLE_DEGREE + 1] = {ULR_NORMAL_TABLE};
alignas(64) constexpr uint32_t kLaplaceTable[32][ULR_TABLE_DEGREE + 1] = {ULR_LAPLACE_TABLE};

// coefficient(power) for each power: Horner's rule, whose order of rounding is part of the contract.
template <typename Vector, typename Coefficient>
__attribute__((always_inline)) inline Vector horner(Vector t, Coefficient coefficient) {
    Vector result = coefficient(ULR_TABLE_DEGREE);
    for (int power = ULR_TABLE_DEGREE - 1; power >= 0; --power) result = fma(result, t, coefficient(power));
    return result;
}

}  // namespace ULR_ISA
}  // namespace ulr

#if defined(ULR_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(ULR_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(ULR_ISA_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

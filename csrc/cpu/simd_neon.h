// Four lanes: NEON, which every 64-bit ARM processor has.
#pragma once

#include <arm_neon.h>

namespace ulr {
inline namespace ULR_ISA {

constexpr int kLanes = 4;
constexpr int kStreams = 3;

struct U {
    uint32x4_t v;
};
struct F {
    float32x4_t v;
};
using M = uint32x4_t;

inline U set(uint32_t value) { return {vdupq_n_u32(value)}; }
inline U load(const uint32_t* p) { return {vld1q_u32(p)}; }
inline void store(uint32_t* p, U a) { vst1q_u32(p, a.v); }
inline U operator+(U a, U b) { return {vaddq_u32(a.v, b.v)}; }
inline U operator-(U a, U b) { return {vsubq_u32(a.v, b.v)}; }
inline U operator&(U a, U b) { return {vandq_u32(a.v, b.v)}; }
inline U operator|(U a, U b) { return {vorrq_u32(a.v, b.v)}; }
inline U operator^(U a, U b) { return {veorq_u32(a.v, b.v)}; }
inline U and_or(U a, U b, U c) { return (a & b) | c; }
inline U and_xor(U a, U b, U c) { return a ^ (b & c); }
template <int n>
U shift_right(U a) {
    return {vshrq_n_u32(a.v, n)};
}
template <int n>
U shift_left(U a) {
    return {vshlq_n_u32(a.v, n)};
}
inline U shift_left(U a, uint32_t n) { return {vshlq_u32(a.v, vdupq_n_s32(static_cast<int32_t>(n)))}; }
inline M not_less(U a, U b) { return vcgeq_u32(a.v, b.v); }
inline U subtract_where(M m, U a, U b) { return {vsubq_u32(a.v, vandq_u32(m, b.v))}; }

// The two halves of 64 bits are vectors of their own: a product is cut once, and the rest takes half the instructions.
struct W {
    U low, high;
};

inline W widen(U a) { return {a, a}; }
inline U narrow(W a) { return a.low; }
inline W multiply(W a, U m) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a.low.v), vget_low_u32(m.v)));
    const uint32x4_t second = vreinterpretq_u32_u64(vmull_high_u32(a.low.v, m.v));
    return {{vuzp1q_u32(first, second)}, {vuzp2q_u32(first, second)}};
}
inline W operator+(W a, W b) {
    const U low = a.low + b.low;
    const U carry = {vcltq_u32(low.v, a.low.v)};  // -1 where there is one
    return {low, a.high + b.high - carry};
}
inline W operator^(W a, U k) { return widen(a.low ^ k); }
inline W high_xor(W product, U k) { return widen(product.high ^ k); }
inline W high_xor(W product, W a, U k) { return widen(product.high ^ a.low ^ k); }

inline F set(float value) { return {vdupq_n_f32(value)}; }
inline F load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, F a) { vst1q_f32(p, a.v); }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
inline F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
inline F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
inline F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
inline F square_root(F a) { return {vsqrtq_f32(a.v)}; }
// By comparison: NEON's own maximum and minimum of a NaN and a number are NaN.
inline F larger(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline F smaller(F a, F b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline F to_float(U a) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.v))}; }
inline U bits(F a) { return {vreinterpretq_u32_f32(a.v)}; }
inline F as_float(U a) { return {vreinterpretq_f32_u32(a.v)}; }
inline F where_positive(F a, F b) { return as_float(U{vcgtzq_f32(a.v)} & bits(b)); }

inline U call_of_lane() {
    const uint32_t calls[kLanes] = {0, 1, 2, 3};
    return load(calls);
}

inline void interleave(const W (&w)[4], uint32_t* to) {
    const uint32x4x4_t words{{w[0].low.v, w[1].low.v, w[2].low.v, w[3].low.v}};
    vst4q_u32(to, words);  // clang's is a macro, which takes no braces
}

// A lane reads two neighbouring coefficients of its octave at once, and the next power takes the second of them.
class Octaves {
  public:
    explicit Octaves(const uint32_t (*table)[ULR_TABLE_DEGREE + 1]) : table_(table) {}
    F polynomial(U exponent, F t) const {
        return horner(t, [&](int power) { return coefficient(exponent, power); });
    }

  private:
    F coefficient(U exponent, int power) const {
        static_assert(ULR_TABLE_DEGREE % 2 == 1, "an octave holds pairs of coefficients");
        const auto pair = [&](uint32_t lane) { return vld1_u32(table_[lane - 127] + power / 2 * 2); };
        const uint32x2_t pairs[kLanes] = {pair(vgetq_lane_u32(exponent.v, 0)), pair(vgetq_lane_u32(exponent.v, 1)),
                                          pair(vgetq_lane_u32(exponent.v, 2)), pair(vgetq_lane_u32(exponent.v, 3))};
        const uint32x4_t first = vcombine_u32(pairs[0], pairs[1]), second = vcombine_u32(pairs[2], pairs[3]);
        return as_float(U{power % 2 ? vuzp2q_u32(first, second) : vuzp1q_u32(first, second)});
    }

    const uint32_t (*table_)[ULR_TABLE_DEGREE + 1];
};

inline F signs(uint32_t bit) {
    const int32_t shifts[kLanes] = {31, 30, 29, 28};
    const U sign = U{vshlq_u32(set(bit).v, vld1q_s32(shifts))} & set(0x80000000u);
    return as_float(sign | set(0x3f800000u));
}

inline F widened(const float* p) { return load(p); }
inline F widened(const Bf16* p) { return as_float(U{vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16)}); }
inline F widened(const Half* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}

inline void store_rounded(float* p, F a) { store(p, a); }
inline void store_rounded(Bf16* p, F a) {
    const U word = bits(a);
    const U nearest = word + (shift_right<16>(word) & set(1u)) + set(0x7fffu);
    const uint16x4_t result = vbsl_u16(vmovn_u32(vceqq_f32(a.v, a.v)), vshrn_n_u32(nearest.v, 16), vdup_n_u16(0x7fc0));
    vst1_u16(reinterpret_cast<uint16_t*>(p), result);
}
inline void store_rounded(Half* p, F a) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}

// Fewer lanes go through the stack, because NEON has no masked load or store.
template <typename T>
F load_part(const T* p, int64_t n) {
    if (n >= kLanes) return widened(p);
    T part[kLanes] = {};
    memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
    return widened(part);
}
template <typename T>
void store_part(T* p, F a, int64_t n) {
    if (n >= kLanes) return store_rounded(p, a);
    T part[kLanes];
    store_rounded(part, a);
    memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace ULR_ISA
}  // namespace ulr

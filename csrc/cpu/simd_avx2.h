// Eight lanes: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

namespace ulr {
inline namespace ULR_ISA {

constexpr int kLanes = 8;
constexpr int kStreams = 3;

struct U {
    __m256i v;
};
struct F {
    __m256 v;
};
using M = __m256i;

inline U set(uint32_t value) { return {_mm256_set1_epi32(static_cast<int>(value))}; }
inline U load(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store(uint32_t* p, U a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline U operator+(U a, U b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline U operator-(U a, U b) { return {_mm256_sub_epi32(a.v, b.v)}; }
inline U operator&(U a, U b) { return {_mm256_and_si256(a.v, b.v)}; }
inline U operator|(U a, U b) { return {_mm256_or_si256(a.v, b.v)}; }
inline U operator^(U a, U b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline U and_or(U a, U b, U c) { return (a & b) | c; }
inline U and_xor(U a, U b, U c) { return a ^ (b & c); }
template <int n>
U shift_right(U a) {
    return {_mm256_srli_epi32(a.v, n)};
}
template <int n>
U shift_left(U a) {
    return {_mm256_slli_epi32(a.v, n)};
}
inline U shift_left(U a, uint32_t n) { return {_mm256_sll_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(n)))}; }
inline M not_less(U a, U b) { return _mm256_cmpeq_epi32(_mm256_max_epu32(a.v, b.v), a.v); }
inline U subtract_where(M m, U a, U b) { return {_mm256_sub_epi32(a.v, _mm256_and_si256(m, b.v))}; }

struct W {
    __m256i even, odd;
};

inline W widen(U a) { return {a.v, _mm256_srli_epi64(a.v, 32)}; }
inline U narrow(W a) { return {_mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xAA)}; }
inline W multiply(W a, U m) { return {_mm256_mul_epu32(a.even, m.v), _mm256_mul_epu32(a.odd, m.v)}; }
inline W operator+(W a, W b) { return {_mm256_add_epi64(a.even, b.even), _mm256_add_epi64(a.odd, b.odd)}; }
inline W operator^(W a, U k) { return {_mm256_xor_si256(a.even, k.v), _mm256_xor_si256(a.odd, k.v)}; }
inline W high_xor(W product, U k) {
    return {_mm256_xor_si256(_mm256_srli_epi64(product.even, 32), k.v),
            _mm256_xor_si256(_mm256_srli_epi64(product.odd, 32), k.v)};
}
inline W high_xor(W product, W a, U k) {
    const auto half = [&](__m256i p, __m256i b) {
        return _mm256_xor_si256(_mm256_srli_epi64(p, 32), _mm256_xor_si256(b, k.v));
    };
    return {half(product.even, a.even), half(product.odd, a.odd)};
}

inline F set(float value) { return {_mm256_set1_ps(value)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F square_root(F a) { return {_mm256_sqrt_ps(a.v)}; }
inline F larger(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F smaller(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F where_positive(F a, F b) { return {_mm256_and_ps(_mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_GT_OQ), b.v)}; }
inline F to_float(U a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline U bits(F a) { return {_mm256_castps_si256(a.v)}; }
inline F as_float(U a) { return {_mm256_castsi256_ps(a.v)}; }

// Call i of Philox sits in the lane for which interleave() puts its words at 4 i.
inline U call_of_lane() { return {_mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7)}; }

inline void interleave(const W (&w)[4], uint32_t* to) {
    const auto pairs = [](__m256i first, __m256i second) {
        return _mm256_blend_epi32(first, _mm256_slli_epi64(second, 32), 0xAA);
    };
    const __m256i even01 = pairs(w[0].even, w[1].even), even23 = pairs(w[2].even, w[3].even);
    const __m256i odd01 = pairs(w[0].odd, w[1].odd), odd23 = pairs(w[2].odd, w[3].odd);
    store(to, U{_mm256_unpacklo_epi64(even01, even23)});
    store(to + 8, U{_mm256_unpackhi_epi64(even01, even23)});
    store(to + 16, U{_mm256_unpacklo_epi64(odd01, odd23)});
    store(to + 24, U{_mm256_unpackhi_epi64(odd01, odd23)});
}

// A coefficient's 32 octaves side by side in memory. Words have octaves 23 to 30 in 255 of 256 cases: one permute looks
// up those eight. A vector with another octave takes four permutes, each over eight octaves, and chooses by the upper
// two bits of the octave: twice as fast as a gather.
class Octaves {
  public:
    explicit Octaves(const uint32_t (*table)[ULR_TABLE_DEGREE + 1]) {
        for (int power = 0; power <= ULR_TABLE_DEGREE; ++power) {
            // Indexed by the exponent's low five bits: octave + 127, modulo 32.
            for (int octave = 0; octave < 32; ++octave)
                column_[power][(octave + 127) % 32] = float_of(table[octave][power]);
            for (int i = 0; i < 8; ++i) common_[power][i] = float_of(table[kCommon + i][power]);
        }
    }
    __attribute__((always_inline)) F polynomial(U exponent, F t) const {
        const __m256i common = (exponent - set(127u + kCommon)).v;
        if (__builtin_expect(_mm256_testz_si256(common, set(~7u).v), 1))
            return horner(t, [&](int power) { return eight(common_[power], common); });
        const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(exponent.v, 28));
        const __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(exponent.v, 27));
        return horner(t, [&](int power) {
            const auto part = [&](int i) { return eight(column_[power] + 8 * i, exponent.v).v; };
            const __m256 low = _mm256_blendv_ps(part(0), part(1), bit3),
                         high = _mm256_blendv_ps(part(2), part(3), bit3);
            return F{_mm256_blendv_ps(low, high, bit4)};
        });
    }

  private:
    static constexpr uint32_t kCommon = 23;

    static F eight(const float* values, __m256i at) { return {_mm256_permutevar8x32_ps(_mm256_load_ps(values), at)}; }

    alignas(32) float column_[ULR_TABLE_DEGREE + 1][32], common_[ULR_TABLE_DEGREE + 1][8];
};

inline F signs(uint32_t bit) {
    const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    const U sign = U{_mm256_sllv_epi32(set(bit).v, shifts)} & set(0x80000000u);
    return as_float(sign | set(0x3f800000u));
}

inline M first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < kLanes ? n : kLanes)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Eight 16-bit values; fewer go through the stack, because there is no masked load of them.
inline __m128i load_words(const void* p, int64_t n) {
    if (n >= kLanes) return _mm_loadu_si128(static_cast<const __m128i*>(p));
    alignas(16) uint16_t part[kLanes] = {};
    memcpy(part, p, static_cast<size_t>(n) * sizeof(uint16_t));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
}
inline void store_words(void* p, __m128i a, int64_t n) {
    if (n >= kLanes) return _mm_storeu_si128(static_cast<__m128i*>(p), a);
    alignas(16) uint16_t part[kLanes];
    _mm_store_si128(reinterpret_cast<__m128i*>(part), a);
    memcpy(p, part, static_cast<size_t>(n) * sizeof(uint16_t));
}

inline F load_part(const float* p, int64_t n) { return n >= kLanes ? load(p) : F{_mm256_maskload_ps(p, first(n))}; }
inline F load_part(const Bf16* p, int64_t n) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(p, n)), 16))};
}
inline F load_part(const Half* p, int64_t n) { return {_mm256_cvtph_ps(load_words(p, n))}; }

// Whole vectors are stored without a mask: a masked store delays later loads until its line has come from memory.
inline void store_part(float* p, F a, int64_t n) {
    if (n >= kLanes) return store(p, a);
    _mm256_maskstore_ps(p, first(n), a.v);
}
inline void store_part(Bf16* p, F a, int64_t n) {
    const U word = bits(a);
    const U nearest = shift_right<16>(word + (shift_right<16>(word) & set(1u)) + set(0x7fffu));
    const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    const __m256i result = _mm256_blendv_epi8(nearest.v, set(0x7fc0u).v, _mm256_castps_si256(nan));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0xD8);
    store_words(p, _mm256_castsi256_si128(packed), n);
}
inline void store_part(Half* p, F a, int64_t n) { store_words(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT), n); }

}  // namespace ULR_ISA
}  // namespace ulr

// Sixteen lanes: AVX-512 F, DQ, BW, VL.
#pragma once

#include <immintrin.h>

namespace ulr {
inline namespace ULR_ISA {

constexpr int kLanes = 16;
constexpr int kStreams = 3;

struct U {
    __m512i v;
};
struct F {
    __m512 v;
};
using M = __mmask16;

inline U set(uint32_t value) { return {_mm512_set1_epi32(static_cast<int>(value))}; }
inline U load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(uint32_t* p, U a) { _mm512_storeu_si512(p, a.v); }
inline U operator+(U a, U b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline U operator-(U a, U b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline U operator&(U a, U b) { return {_mm512_and_si512(a.v, b.v)}; }
inline U operator|(U a, U b) { return {_mm512_or_si512(a.v, b.v)}; }
inline U operator^(U a, U b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline U and_or(U a, U b, U c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0xea)}; }
inline U and_xor(U a, U b, U c) { return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x78)}; }
template <int n>
U shift_right(U a) {
    return {_mm512_srli_epi32(a.v, n)};
}
template <int n>
U shift_left(U a) {
    return {_mm512_slli_epi32(a.v, n)};
}
inline U shift_left(U a, uint32_t n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(static_cast<int>(n)))}; }
inline M not_less(U a, U b) { return _mm512_cmpge_epu32_mask(a.v, b.v); }
inline U subtract_where(M m, U a, U b) { return {_mm512_mask_sub_epi32(a.v, m, a.v, b.v)}; }

struct W {
    __m512i even, odd;
};

inline W widen(U a) { return {a.v, _mm512_srli_epi64(a.v, 32)}; }
inline U narrow(W a) { return {_mm512_mask_shuffle_epi32(a.even, 0xAAAA, a.odd, static_cast<_MM_PERM_ENUM>(0xA0))}; }
inline W multiply(W a, U m) { return {_mm512_mul_epu32(a.even, m.v), _mm512_mul_epu32(a.odd, m.v)}; }
inline W operator+(W a, W b) { return {_mm512_add_epi64(a.even, b.even), _mm512_add_epi64(a.odd, b.odd)}; }
inline W operator^(W a, U k) { return {_mm512_xor_si512(a.even, k.v), _mm512_xor_si512(a.odd, k.v)}; }
inline W high_xor(W product, U k) {
    return {_mm512_xor_si512(_mm512_srli_epi64(product.even, 32), k.v),
            _mm512_xor_si512(_mm512_srli_epi64(product.odd, 32), k.v)};
}
inline W high_xor(W product, W a, U k) {
    return {_mm512_ternarylogic_epi64(_mm512_srli_epi64(product.even, 32), a.even, k.v, 0x96),
            _mm512_ternarylogic_epi64(_mm512_srli_epi64(product.odd, 32), a.odd, k.v, 0x96)};
}

inline F set(float value) { return {_mm512_set1_ps(value)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F square_root(F a) { return {_mm512_sqrt_ps(a.v)}; }
inline F larger(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F smaller(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F where_positive(F a, F b) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ), b.v)};
}
inline F to_float(U a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline U bits(F a) { return {_mm512_castps_si512(a.v)}; }
inline F as_float(U a) { return {_mm512_castsi512_ps(a.v)}; }

// Call i of Philox, of the kLanes calls in a vector, sits in the lane for which interleave() puts its words at 4 i.
inline U call_of_lane() { return {_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15)}; }

inline void interleave(const W (&w)[4], uint32_t* to) {
    const auto pairs = [](__m512i first, __m512i second) {
        return _mm512_mask_shuffle_epi32(first, 0xAAAA, second, static_cast<_MM_PERM_ENUM>(0xA0));
    };
    const __m512i even01 = pairs(w[0].even, w[1].even), even23 = pairs(w[2].even, w[3].even);
    const __m512i odd01 = pairs(w[0].odd, w[1].odd), odd23 = pairs(w[2].odd, w[3].odd);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi64(even01, even23));
    _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi64(even01, even23));
    _mm512_storeu_si512(to + 32, _mm512_unpacklo_epi64(odd01, odd23));
    _mm512_storeu_si512(to + 48, _mm512_unpackhi_epi64(odd01, odd23));
}

// All 32 octaves of a coefficient in two registers; a permute looks up sixteen lanes.
class Octaves {
  public:
    explicit Octaves(const uint32_t (*table)[ULR_TABLE_DEGREE + 1]) {
        for (int power = 0; power <= ULR_TABLE_DEGREE; ++power) {
            alignas(64) uint32_t column[32];
            // Indexed by the exponent's low five bits: octave + 127, modulo 32.
            for (int octave = 0; octave < 32; ++octave) column[(octave + 127) % 32] = table[octave][power];
            low_[power] = _mm512_load_ps(column);
            high_[power] = _mm512_load_ps(column + 16);
        }
    }
    F polynomial(U exponent, F t) const {
        return horner(t, [&](int power) { return F{_mm512_permutex2var_ps(low_[power], exponent.v, high_[power])}; });
    }

  private:
    __m512 low_[ULR_TABLE_DEGREE + 1], high_[ULR_TABLE_DEGREE + 1];
};

// Lane i: -1 where bit i is set, else +1.
inline F signs(uint32_t bit) {
    return {_mm512_mask_blend_ps(static_cast<M>(bit), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f))};
}

inline M first(int64_t n) { return static_cast<M>(n >= kLanes ? 0xffff : (1 << n) - 1); }

// Whole vectors are stored without a mask: a masked store delays later loads until its line has come from memory.
// Sixteen 16-bit values:
inline __m256i load_words(const void* p, int64_t n) {
    return n >= kLanes ? _mm256_loadu_si256(static_cast<const __m256i*>(p)) : _mm256_maskz_loadu_epi16(first(n), p);
}
inline void store_words(void* p, __m256i a, int64_t n) {
    if (n >= kLanes) return _mm256_storeu_si256(static_cast<__m256i*>(p), a);
    _mm256_mask_storeu_epi16(p, first(n), a);
}

inline F load_part(const float* p, int64_t n) { return n >= kLanes ? load(p) : F{_mm512_maskz_loadu_ps(first(n), p)}; }
inline F load_part(const Bf16* p, int64_t n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p, n)), 16))};
}
inline F load_part(const Half* p, int64_t n) { return {_mm512_cvtph_ps(load_words(p, n))}; }

inline void store_part(float* p, F a, int64_t n) {
    if (n >= kLanes) return store(p, a);
    _mm512_mask_storeu_ps(p, first(n), a.v);
}
inline void store_part(Bf16* p, F a, int64_t n) {
    const __m512i word = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(nearest, 16), nan, _mm512_set1_epi32(0x7fc0));
    store_words(p, _mm512_cvtepi32_epi16(result), n);
}
inline void store_part(Half* p, F a, int64_t n) {
    store_words(p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}

}  // namespace ULR_ISA
}  // namespace ulr

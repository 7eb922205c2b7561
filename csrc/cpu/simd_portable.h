// Four lanes in plain C++, for every machine: the compiler vectorises what its baseline allows.
#pragma once

namespace ulr {
inline namespace ULR_ISA {

constexpr int kLanes = 4;
constexpr int kStreams = 3;

template <typename T>
struct Lanes {
    T v[kLanes];
};
using U = Lanes<uint32_t>;
using F = Lanes<float>;
using M = Lanes<bool>;

template <typename R, typename Function>
Lanes<R> each(Function function) {
    Lanes<R> result;
    for (int lane = 0; lane < kLanes; ++lane) result.v[lane] = function(lane);
    return result;
}

inline U set(uint32_t value) {
    return each<uint32_t>([&](int) { return value; });
}
inline U load(const uint32_t* p) {
    return each<uint32_t>([&](int i) { return p[i]; });
}
inline void store(uint32_t* p, U a) { memcpy(p, a.v, sizeof a.v); }
inline U operator+(U a, U b) {
    return each<uint32_t>([&](int i) { return a.v[i] + b.v[i]; });
}
inline U operator-(U a, U b) {
    return each<uint32_t>([&](int i) { return a.v[i] - b.v[i]; });
}
inline U operator&(U a, U b) {
    return each<uint32_t>([&](int i) { return a.v[i] & b.v[i]; });
}
inline U operator|(U a, U b) {
    return each<uint32_t>([&](int i) { return a.v[i] | b.v[i]; });
}
inline U operator^(U a, U b) {
    return each<uint32_t>([&](int i) { return a.v[i] ^ b.v[i]; });
}
inline U and_or(U a, U b, U c) { return (a & b) | c; }
inline U and_xor(U a, U b, U c) { return a ^ (b & c); }
template <int n>
U shift_right(U a) {
    return each<uint32_t>([&](int i) { return a.v[i] >> n; });
}
template <int n>
U shift_left(U a) {
    return each<uint32_t>([&](int i) { return a.v[i] << n; });
}
inline U shift_left(U a, uint32_t n) {
    return each<uint32_t>([&](int i) { return a.v[i] << n; });
}
inline M not_less(U a, U b) {
    return each<bool>([&](int i) { return a.v[i] >= b.v[i]; });
}
inline U subtract_where(M m, U a, U b) {
    return each<uint32_t>([&](int i) { return m.v[i] ? a.v[i] - b.v[i] : a.v[i]; });
}

using W = Lanes<uint64_t>;

inline W widen(U a) {
    return each<uint64_t>([&](int i) { return a.v[i]; });
}
inline U narrow(W a) {
    return each<uint32_t>([&](int i) { return static_cast<uint32_t>(a.v[i]); });
}
inline W multiply(W a, U m) {
    return each<uint64_t>([&](int i) { return (a.v[i] & 0xffffffffu) * m.v[i]; });
}
inline W operator+(W a, W b) {
    return each<uint64_t>([&](int i) { return a.v[i] + b.v[i]; });
}
inline W operator^(W a, U k) {
    return each<uint64_t>([&](int i) { return a.v[i] ^ k.v[i]; });
}
inline W high_xor(W product, U k) {
    return each<uint64_t>([&](int i) { return product.v[i] >> 32 ^ k.v[i]; });
}
inline W high_xor(W product, W a, U k) {
    return each<uint64_t>([&](int i) { return product.v[i] >> 32 ^ a.v[i] ^ k.v[i]; });
}

inline F set(float value) {
    return each<float>([&](int) { return value; });
}
inline F load(const float* p) {
    return each<float>([&](int i) { return p[i]; });
}
inline void store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }
inline F fma(F a, F b, F c) {
    return each<float>([&](int i) { return fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline F operator+(F a, F b) {
    return each<float>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(F a, F b) {
    return each<float>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(F a, F b) {
    return each<float>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(F a, F b) {
    return each<float>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F square_root(F a) {
    return each<float>([&](int i) { return sqrtf(a.v[i]); });
}
inline F larger(F a, F b) {
    return each<float>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F smaller(F a, F b) {
    return each<float>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F where_positive(F a, F b) {
    return each<float>([&](int i) { return a.v[i] > 0.0f ? b.v[i] : 0.0f; });
}
inline F to_float(U a) {
    return each<float>([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}
inline U bits(F a) {
    return each<uint32_t>([&](int i) { return bits_of(a.v[i]); });
}
inline F as_float(U a) {
    return each<float>([&](int i) { return float_of(a.v[i]); });
}

inline U call_of_lane() { return {{0, 1, 2, 3}}; }

inline void interleave(const W (&w)[4], uint32_t* to) {
    for (int call = 0; call < kLanes; ++call)
        for (int word = 0; word < 4; ++word) to[4 * call + word] = static_cast<uint32_t>(w[word].v[call]);
}

class Octaves {
  public:
    explicit Octaves(const uint32_t (*table)[ULR_TABLE_DEGREE + 1]) : table_(table) {}
    F polynomial(U exponent, F t) const {
        return horner(t, [&](int power) {
            return each<float>([&](int i) { return float_of(table_[exponent.v[i] - 127][power]); });
        });
    }

  private:
    const uint32_t (*table_)[ULR_TABLE_DEGREE + 1];
};

inline F signs(uint32_t bit) {
    return each<float>([&](int i) { return rademacher(bit, i); });
}

inline float to_fp32(float value) { return value; }
inline float to_fp32(Bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_fp32(Half value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
    // As a fp32 number the bits stand for 2^-112 times the value, subnormal or not; the product is exact.
    return float_of(bits_of(float_of(magnitude << 13) * 0x1p112f) | sign);
}

inline void from_fp32(float value, float& result) { result = value; }
inline void from_fp32(float value, Bf16& result) {
    const uint32_t word = bits_of(value);
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    result.bits = static_cast<uint16_t>(nan ? 0x7fc0u : (word + (word >> 16 & 1u) + 0x7fffu) >> 16);
}
inline void from_fp32(float value, Half& result) {
    const uint32_t word = bits_of(value), sign = word >> 16 & 0x8000u, magnitude = word & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x47800000u) {  // 2^16 and beyond
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the last place of a subnormal
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    result.bits = static_cast<uint16_t>(sign | half);
}

template <typename T>
F load_part(const T* p, int64_t n) {
    return each<float>([&](int i) { return i < n ? to_fp32(p[i]) : 0.0f; });
}
template <typename T>
void store_part(T* p, F a, int64_t n) {
    for (int i = 0; i < kLanes && i < n; ++i) from_fp32(a.v[i], p[i]);
}

}  // namespace ULR_ISA
}  // namespace ulr

// Tools of the passes over the noise: lanes of a row, elements of a tensor, sigma by columns, sums over pieces of rows.
#pragma once

#include <algorithm>

#include "simd.h"
#include "ulr/api.h"

namespace ulr {
inline namespace ULR_ISA {

template <typename T>
T* at(const ulr_tensor& t, int64_t i, int64_t j, int64_t k) {
    return static_cast<T*>(t.data) + i * t.stride[0] + j * t.stride[1] + k * t.stride[2];
}

// body(c, n): n lanes from column c on; n is a constant except for the last lanes.
template <typename Body>
inline __attribute__((always_inline)) void by_lanes(int64_t cols, Body body) {
    int64_t c = 0;
    for (; c + kLanes <= cols; c += kLanes) body(c, kLanes);
    if (c < cols) body(c, cols - c);
}

// A row of any stride as fp32; `values` has room for whole vectors.
template <typename T>
void widen_row(const T* from, int64_t stride, int64_t cols, float* values) {
    if (stride == 1) {
        by_lanes(cols, [&](int64_t c, int64_t n)
                           __attribute__((always_inline)) { store(values + c, load_part(from + c, n)); });
    } else {
        for (int64_t c = 0; c < cols; ++c) store_part(values + c, load_part(from + c * stride, 1), 1);
    }
}

// Adds up halves, so that the order of the sum does not depend on the compiler.
inline float sum_of_lanes(F a) {
    alignas(64) float lane[kLanes];
    store(lane, a);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[half + i];
    return lane[0];
}

// Columns first ... first + cols - 1 of sigma, fp32 [1, 1, N] of any stride, to `to`, with ones up to `padded` columns.
inline void load_sigma(const ulr_tensor& sigma, int64_t first, int64_t cols, int64_t padded, float* to) {
    const float* from = at<float>(sigma, 0, 0, first);
    const int64_t stride = sigma.stride[2];
    if (stride == 0) {
        std::fill_n(to, padded, *from);
    } else {
        for (int64_t c = 0; c < cols; ++c) to[c] = from[c * stride];
        std::fill(to + cols, to + padded, 1.0f);
    }
}

// to[c] += the sums of column c over pieces of the rows, `stride` apart, in the order of the pieces.
inline void add_pieces(const ulr_tensor& to, const float* sums, int64_t pieces, int64_t stride, int64_t cols) {
    for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t c = 0; c < cols; ++c) *at<float>(to, 0, 0, c) += sums[piece * stride + c];
}

// -d/d eps ln f(eps): eps, or for Laplace noise sqrt(2) with the sign bit of eps.
inline F score(F eps, bool laplace) {
    const U sign = set(0x80000000u), root2 = set(0x3fb504f3u);
    return laplace ? as_float((bits(eps) & sign) | root2) : eps;
}

}  // namespace ULR_ISA
}  // namespace ulr

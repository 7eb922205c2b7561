// Noise on a weight: of full and of low rank, and round(fma(sigma, eps, W)) for chunks of 16 bytes in shared memory.
#pragma once

#include "element.cuh"
#include "launch.cuh"
#include "noise.cuh"
#include "ulr/step.h"

namespace ulr {

// Noise only where it is set; absent: everywhere.
struct Mask {
    const uint8_t* data;
    int64_t row_stride, col_stride;

    Mask() = default;
    explicit Mask(const ulr_tensor& t)
        : data(static_cast<const uint8_t*>(t.data)), row_stride(t.stride[1]), col_stride(t.stride[2]) {}
    __device__ __forceinline__ bool at(int64_t row, int64_t col) const {
        return data == nullptr || data[row * row_stride + col * col_stride] != 0;
    }
};

// Selects one of four, without an array, which would lie in memory.
__device__ __forceinline__ float pick(const float (&v)[4], uint32_t i) {
    const float low = i & 1 ? v[1] : v[0], high = i & 1 ? v[3] : v[2];
    return i & 2 ? high : low;
}

// The noise of one element, for chunks that cut calls of Philox in two.
template <Kind kind>
__device__ __forceinline__ float single_noise(const Noise<kind>& noise, uint32_t row, int64_t col, uint32_t draw) {
    float eps[4];
    noise.quad(eps, row, static_cast<uint32_t>(col >> 2), draw);
    return pick(eps, static_cast<uint32_t>(col & 3));
}

// The noise of a thread's chunks, which lie in one row and move along it. Signs: a call of Philox covers 128 columns,
// and is kept while the row stays within them.
template <typename T, Kind kind>
class WeightNoise {
  public:
    static constexpr int kElements = 16 / sizeof(T);

    // Elements row, col ... of the noise of draw number `draw_index`, counted in the weight.
    __device__ __forceinline__ void make(float (&eps)[kElements], const Noise<kind>& noise, const ulr_noise_spec& spec,
                                         uint32_t draw_index, int64_t row, int64_t col) {
        const uint32_t noise_row = static_cast<uint32_t>(spec.row_offset + row);
        const uint32_t draw = static_cast<uint32_t>(spec.draw + draw_index);
        if (spec.col_offset % 8 == 0) {
            aligned(eps, noise, noise_row, spec.col_offset + col, draw);
        } else {
#pragma unroll
            for (int i = 0; i < kElements; ++i)
                eps[i] = single_noise(noise, noise_row, spec.col_offset + col + i, draw);
        }
    }

  private:
    __device__ __forceinline__ void aligned(float (&eps)[kElements], const Noise<kind>& noise, uint32_t row,
                                            int64_t col, uint32_t draw) {
        if constexpr (kind == Kind::kSigns) {
            const uint32_t call = static_cast<uint32_t>(col >> 7), word = static_cast<uint32_t>(col >> 5) & 3;
            if (call != call_) {
                call_ = call;
                words_ = noise.sign_words(row, call, draw, noise.orthogonal());
            }
            const uint32_t low = word & 1 ? words_.w[1] : words_.w[0], high = word & 1 ? words_.w[3] : words_.w[2];
            noise.signs_to_floats(eps, (word & 2 ? high : low) >> (col & 31));
        } else {
#pragma unroll
            for (int quad = 0; quad < kElements / 4; ++quad) {
                float four[4];
                noise.quad(four, row, static_cast<uint32_t>(col >> 2) + quad, draw);
#pragma unroll
                for (int i = 0; i < 4; ++i) eps[4 * quad + i] = four[i];
            }
        }
    }

    uint32_t call_ = 0xffffffffu;  // no column reaches that call
    Words words_{};
};

// W' in place of a chunk of W, `plus`, and where `minus` is given the one of the negated noise there. row, col: of the
// weight; elements from column `cols` on do not exist and stay 0.
template <typename T, int count, typename Mask>
__device__ __forceinline__ void perturb_chunk(T* plus, T* minus, const float (&eps)[count], float sigma, int64_t row,
                                              int64_t col, int64_t cols, const Mask& mask) {
    uint4 first = *reinterpret_cast<const uint4*>(plus), second = first;
    T *a = reinterpret_cast<T*>(&first), *b = reinterpret_cast<T*>(&second);
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const float weight = to_float(a[i]);
        if (col + i >= cols || !mask.at(row, col + i)) continue;
        a[i] = from_float<T>(fmaf(sigma, eps[i], weight));
        b[i] = from_float<T>(fmaf(-sigma, eps[i], weight));
    }
    *reinterpret_cast<uint4*>(plus) = first;
    if (minus != nullptr) *reinterpret_cast<uint4*>(minus) = second;
}

// A block's constants for noise of full rank, or of low rank, which has a key for each factor.
struct WeightTables {
    NoiseTable noise, row_factor;
    int64_t keys[2];

    // A barrier must follow.
    __device__ __forceinline__ void fill(const ulr_noise_spec& spec, int64_t rank, int thread, int threads) {
        ulr_noise_spec by_row = spec, by_col = spec;
        if (rank) {
            if (thread < 2) keys[thread] = fold_in(*spec.key, thread == 0 ? kRowFactorStream : kColFactorStream);
            __syncthreads();
            by_row.key = &keys[0];
            by_col.key = &keys[1];
        }
        noise.fill(by_col, thread, threads);
        row_factor.fill(by_row, thread, threads);
    }
};

// Neighbours in a row of noise of low rank; a(j) is the row's element of A, make_b(b, j) the neighbours' of B.
template <int count, typename A, typename MakeB>
__device__ __forceinline__ void low_rank_noise(float (&eps)[count], int64_t rank, float scale, A a, MakeB make_b) {
#pragma unroll
    for (int i = 0; i < count; ++i) eps[i] = 0.0f;
#pragma unroll 1
    for (int64_t j = 0; j < rank; ++j) {
        const float factor = a(j);
        float b[count];
        make_b(b, j);
#pragma unroll
        for (int i = 0; i < count; ++i) eps[i] = fmaf(factor, b[i], eps[i]);
    }
#pragma unroll
    for (int i = 0; i < count; ++i) eps[i] *= scale;
}

// Makes the noise of a tile's chunks, of full rank.
template <Kind kind>
class FullRank {
  public:
    using Tables = NoiseTable;

    // To be followed by a barrier.
    __device__ __forceinline__ static void fill(Tables& tables, const ulr_noise_spec& spec, int64_t, int thread,
                                                int threads) {
        tables.fill(spec, thread, threads);
    }
    __device__ __forceinline__ FullRank(const ulr_noise_spec& spec, int64_t, float, const Tables& tables)
        : spec_(spec), noise_(spec, tables) {}

    // Elements row, col ... of draw number `draw`, counted in the weight.
    template <typename T>
    __device__ __forceinline__ void make(float (&eps)[16 / sizeof(T)], WeightNoise<T, kind>& chunk, uint32_t draw,
                                         int64_t row, int64_t col) const {
        chunk.make(eps, noise_, spec_, draw, row, col);
    }

  private:
    const ulr_noise_spec& spec_;
    const Noise<kind> noise_;
};

// The same for noise that may be of low rank.
template <Kind kind>
class AnyRank {
  public:
    using Tables = WeightTables;

    __device__ __forceinline__ static void fill(Tables& tables, const ulr_noise_spec& spec, int64_t rank, int thread,
                                                int threads) {
        tables.fill(spec, rank, thread, threads);
    }
    __device__ __forceinline__ AnyRank(const ulr_noise_spec& spec, int64_t rank, float scale, const Tables& tables)
        : spec_(spec), noise_(spec, tables.noise), row_factor_(spec, tables.row_factor), rank_(rank), scale_(scale) {}

    template <typename T>
    __device__ __forceinline__ void make(float (&eps)[16 / sizeof(T)], WeightNoise<T, kind>& chunk, uint32_t draw,
                                         int64_t row, int64_t col) const {
        if (rank_ == 0) return chunk.make(eps, noise_, spec_, draw, row, col);
        const auto a = [&](int64_t j) {
            return single_noise(row_factor_, static_cast<uint32_t>(j), spec_.row_offset + row,
                                static_cast<uint32_t>(spec_.draw + draw));
        };
        const auto b = [&](float (&of_rank)[16 / sizeof(T)], int64_t j) {
            WeightNoise<T, kind>().make(of_rank, noise_, spec_, draw, j - spec_.row_offset, col);  // row j of B^T
        };
        low_rank_noise(eps, rank_, scale_, a, b);
    }

  private:
    const ulr_noise_spec& spec_;
    const Noise<kind> noise_, row_factor_;
    const int64_t rank_;
    const float scale_;
};

// Eight neighbours of a copy's bias; 0 where there is none.
template <typename T>
__device__ __forceinline__ void load_bias(float (&bias)[8], const PerFeature<T>& of, int64_t offset, int64_t feature,
                                          int64_t features) {
    PerFeature<T> own = of;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const bool exists = of.data != nullptr && feature + i >= 0 && feature + i < features;
        bias[i] = exists ? to_float(own.data[offset + (feature + i) * own.stride]) : 0.0f;
    }
}

}  // namespace ulr

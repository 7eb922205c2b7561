// y[c, r] = W'_c[indices[c, r]], W'_c = round(fma(sigma, eps_c, W)): noise for the gathered rows alone.
#include <algorithm>

#include "dispatch.cuh"
#include "perturbed.cuh"

namespace ulr {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Gather {
    ulr_noise_spec noise;
    T* y;  // [C, R, K], contiguous
    int64_t rows, cols;
    const T* weight;
    int64_t weight_rows, weight_row_stride, weight_col_stride;
    const float* sigma;
    Mask mask;
    const int64_t* indices;
    int64_t index_copy_stride, index_stride;
    int64_t rank;  // 0: full
    float scale;   // 1 / sqrt(rank)
    uint32_t draws;
    bool pairs;      // the copies of a pair share their rows, so their noise is made once
    int64_t octets;  // that a row touches, counted in the whole noise
    int64_t total;   // octets of all rows of all copies, or of all pairs
};

template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads) perturbed_embedding_kernel(const Gather<T> p) {
    __shared__ WeightTables tables;
    tables.fill(p.noise, p.rank, threadIdx.x, kThreads);
    __syncthreads();
    const Noise<kind> noise(p.noise, tables.noise), row_noise(p.noise, tables.row_factor);
    const float sigma = *p.sigma;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    const int64_t first_octet = p.noise.col_offset >> 3;
#pragma unroll 1
    for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.total; i += step) {
        const int64_t octet = i % p.octets, place = i / p.octets, row = place % p.rows, copy = place / p.rows;
        const int64_t index = p.indices[copy * p.index_copy_stride + row * p.index_stride];
        const bool exists = index >= 0 && index < p.weight_rows;
        const uint32_t draw = static_cast<uint32_t>(p.noise.draw + copy % p.draws);
        const uint32_t noise_row = static_cast<uint32_t>(p.noise.row_offset + index);
        const uint32_t at = static_cast<uint32_t>(first_octet + octet);
        float eps[8];
        if (p.rank == 0)
            octet_noise(eps, noise, noise_row, at, draw);
        else
            low_rank_noise(
                eps, p.rank, p.scale,
                [&](int64_t j) {
                    return single_noise(row_noise, static_cast<uint32_t>(j), p.noise.row_offset + index, draw);
                },
                [&](float (&b)[8], int64_t j) { octet_noise(b, noise, static_cast<uint32_t>(j), at, draw); });
        const float signed_sigma = copy < p.draws ? sigma : -sigma;
        T* to = p.y + (copy * p.rows + row) * p.cols;
        T* minus = to + int64_t{p.draws} * p.rows * p.cols;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const int64_t col = 8 * (first_octet + octet) + c - p.noise.col_offset;
            if (col < 0 || col >= p.cols) continue;
            T plus_value = from_float<T>(float_of(0x7fc00000u)), minus_value = plus_value;  // out of range: NaN
            if (exists) {
                plus_value = minus_value = p.weight[index * p.weight_row_stride + col * p.weight_col_stride];
                if (p.mask.at(index, col)) {
                    const float weight = to_float(plus_value);
                    plus_value = from_float<T>(fmaf(signed_sigma, eps[c], weight));
                    minus_value = from_float<T>(fmaf(-signed_sigma, eps[c], weight));
                }
            }
            to[col] = plus_value;
            if (p.pairs) minus[col] = minus_value;
        }
    }
}

enum { kY, kIndices, kWeight, kSigma, kMask };
enum { kNoiseRank };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const int64_t copies = t[kY].size[0], rank = launch.numbers[kNoiseRank];
    const bool shared = t[kIndices].size[1] == 1, pairs = noise.antithetic && shared;
    const int64_t octets = (noise.col_offset % 8 + t[kY].size[2] + 7) / 8;
    const Gather<T> p{noise,
                      static_cast<T*>(t[kY].data),
                      t[kY].size[1],
                      t[kY].size[2],
                      static_cast<const T*>(t[kWeight].data),
                      t[kWeight].size[1],
                      t[kWeight].stride[1],
                      t[kWeight].stride[2],
                      static_cast<const float*>(t[kSigma].data),
                      Mask(t[kMask]),
                      static_cast<const int64_t*>(t[kIndices].data),
                      shared ? 0 : t[kIndices].stride[1],
                      t[kIndices].stride[2],
                      rank,
                      rank ? low_rank_scale(rank) : 0.0f,
                      static_cast<uint32_t>(noise.antithetic ? copies / 2 : copies),
                      pairs,
                      octets,
                      (pairs ? copies / 2 : copies) * t[kY].size[1] * octets};
    if (p.rows == 0 || p.cols == 0) return ULR_OK;
    constexpr int64_t kFullDevice = 8 * 160;  // blocks: more only repeat the set-up
    const int64_t blocks = std::min((p.total + kThreads - 1) / kThreads, kFullDevice);
    const auto launch_kind = [&](auto kernel) { return launch_kernel(kernel, blocks, dim3(kThreads), 0, launch, p); };
    if (kind_of(noise) == Kind::kSigns) return launch_kind(perturbed_embedding_kernel<T, Kind::kSigns>);
    return launch_kind(perturbed_embedding_kernel<T, Kind::kQuantile>);
}

}  // namespace
}  // namespace ulr

// tensors: y [C, R, K], contiguous, indices int64 [1, 1 or C, R], weight [1, V, K], sigma [1, 1, 1], mask uint8 [1, V,
// K] or absent. numbers: the noise's rank, 0: full.
extern "C" int ulr_cuda_perturbed_embedding(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                            const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kWeight].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

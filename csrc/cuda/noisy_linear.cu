// y[c] = x[c] W^T + b + sigma * eps_c. One product serves all copies that share x; the noise is made on the way out.
#include "launch.cuh"
#include "noise.cuh"
#include "tile.cuh"

namespace ulr {
namespace {

constexpr int kRows = 128, kFeatures = 128;  // of a block's tile; eight warps take 32 x 64 each
constexpr int kThreads = 256, kStages = 4;
constexpr int kSharedBytes = kStages * 64 * (kRows + kFeatures);
static_assert(kSharedBytes >= int{sizeof(float)} * kRows * kFeatures);  // the sums take the place of the operands

template <typename T>
struct Forward {
    ulr_noise_spec noise;
    Matrix<T> x, weight;
    int64_t x_copy_stride;
    PerFeature<T> bias;
    PerFeature<float> sigma;
    Output<T> y;
    uint32_t draws;             // how many copies make noise of their own
    uint32_t draws_of_product;  // all of them where the copies share x, else one
    uint32_t passes;            // two products where an antithetic pair has an x for each copy
    uint32_t row_tiles, feature_tiles;
};

// What a block makes: kRows x kFeatures outputs of the copies that share one product.
struct Tile {
    uint32_t product;
    int64_t first_row, first_feature;

    template <typename T>
    __device__ __forceinline__ Tile(const Forward<T>& p, uint32_t block) {
        const uint32_t feature_tile = block % p.feature_tiles, rest = block / p.feature_tiles;
        product = rest / p.row_tiles;
        first_row = int64_t{rest % p.row_tiles} * kRows;
        // Tiles start at multiples of their width in the whole noise, so that no call of Philox is cut in two.
        first_feature = int64_t{feature_tile} * kFeatures - p.noise.col_offset % kFeatures;
    }
};

template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads, 2) noisy_linear_kernel(const Forward<T> p) {
    char* memory = dynamic_shared<char>();
    float* sums = dynamic_shared<float>();
    __shared__ NoiseTable table;
    alignas(16) __shared__ float sigma[kFeatures], bias[kFeatures];
    table.fill(p.noise, threadIdx.x, kThreads);
    const int warp_row = threadIdx.x / 64 * 32, warp_col = threadIdx.x / 32 % 2 * 64;
    const Tile tile(p, blockIdx.x);
    if (threadIdx.x < kFeatures) {
        const int64_t feature = tile.first_feature + threadIdx.x;
        const bool exists = feature >= 0 && feature < p.y.cols;
        sigma[threadIdx.x] = exists ? p.sigma[feature] : 0.0f;
        bias[threadIdx.x] = exists && p.bias.data != nullptr ? p.bias[feature] : 0.0f;
    }
    // The sums of the second pass start from the noise of the first, negated.
#pragma unroll 1
    for (uint32_t pass = 0; pass < p.passes; ++pass) {
        // A choice for each sum rather than a branch around all: the sums then stay in place all through the product.
        float acc[2][8][4];
        load_sums<kFeatures>(acc, sums, warp_row, warp_col);
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            float& sum = acc[i / 32][i / 4 % 8][i % 4];
            sum = pass == 0 ? 0.0f : sum;
        }
        __syncthreads();
        Matrix<T> x = p.x;
        x.data += (tile.product + int64_t{pass} * p.draws) * p.x_copy_stride;
        tiled_product<kRows, kFeatures, kStages, kThreads>(acc, memory, x, tile.first_row, p.weight, tile.first_feature,
                                                           warp_row, warp_col);
        store_sums<kFeatures>(sums, acc, warp_row, warp_col);
        __syncthreads();
        const Noise<kind> noise(p.noise, table);  // only now, so that the product has all registers
        const int thread = not_before_here(static_cast<int>(threadIdx.x));
        const Tile out(p, not_before_here(static_cast<int>(blockIdx.x)));
        const int col = thread % (kFeatures / 8) * 8;  // of all octets of this thread
#pragma unroll 1
        for (int row = thread / (kFeatures / 8); row < kRows; row += kThreads / (kFeatures / 8)) {
            if (out.first_row + row / 2 * 2 >= p.y.rows) break;  // for a warp as a whole: it covers two rows
            float* const sum = sums + row * kFeatures + col;
            float clean[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) clean[i] = sum[i] + bias[col + i];
            const OutputOctet<T> y(p.y, out.first_row + row, out.first_feature + col);
            if (pass == 1) {
                y.store(y.of(int64_t{out.product} + p.draws), clean, p.y.whole);
                continue;
            }
            Octet<kind> octet(noise, static_cast<uint32_t>(p.noise.row_offset + out.first_row + row),
                              p.noise.col_offset + out.first_feature + col);
            const uint32_t draw = static_cast<uint32_t>(p.noise.draw + out.product);
            if (p.passes == 2) {
                float eps[8], value[8];
                octet.make(eps, draw, 0);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    value[i] = fmaf(sigma[col + i], eps[i], clean[i]);
                    sum[i] = -sigma[col + i] * eps[i];
                }
                y.store(y.of(out.product), value, p.y.whole);
                continue;
            }
            const Noised<kind> noised(clean, sigma + col);
            const auto store_copies = [&](auto whole, auto paired) {
                T *to = y.of(out.product), *to_second = y.of(p.draws);
#pragma unroll 1
                for (uint32_t copy = 0; copy < p.draws_of_product; ++copy) {
                    float value[8], mirrored[8];
                    noised.make(value, mirrored, paired, octet, draw, copy);
                    y.store(to, value, whole);
                    if (paired) y.store(to_second, mirrored, whole);
                    to += p.y.copy_stride;
                    to_second += p.y.copy_stride;
                }
            };
            // A loop for each case, so that each holds nothing but its own instructions.
            if (!p.y.whole) {
                store_copies(Known<false>{}, p.noise.antithetic != 0);
            } else if (p.noise.antithetic) {
                store_copies(Known<true>{}, Known<true>{});
            } else {
                store_copies(Known<true>{}, Known<false>{});
            }
        }
        __syncthreads();
    }
}

enum { kY, kX, kWeight, kBias, kSigma };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const uint32_t copies = static_cast<uint32_t>(t[kY].size[0]), draws = noise.antithetic ? copies / 2 : copies;
    const bool shared = t[kX].size[0] == 1 || t[kX].stride[0] == 0;
    const Forward<T> p{
        noise,
        Matrix<T>(t[kX]),
        Matrix<T>(t[kWeight]),
        shared ? 0 : t[kX].stride[0],
        PerFeature<T>(t[kBias]),
        PerFeature<float>(t[kSigma]),
        Output<T>(t[kY], noise.col_offset),
        draws,
        shared ? draws : 1,
        noise.antithetic && !shared ? 2u : 1u,
        static_cast<uint32_t>((t[kY].size[1] + kRows - 1) / kRows),
        static_cast<uint32_t>((noise.col_offset % kFeatures + t[kY].size[2] + kFeatures - 1) / kFeatures)};
    if (p.y.rows == 0 || p.y.cols == 0) return ULR_OK;
    const int64_t blocks = int64_t{shared ? 1 : draws} * p.row_tiles * p.feature_tiles;
    const auto launch_kind = [&](auto kernel) {
        return launch_kernel(kernel, blocks, dim3(kThreads), kSharedBytes, launch, p);
    };
    switch (kind_of(noise)) {
        case Kind::kQuantile:
            return launch_kind(noisy_linear_kernel<T, Kind::kQuantile>);
        case Kind::kSobol:
            return launch_kind(noisy_linear_kernel<T, Kind::kSobol>);
        default:
            return launch_kind(noisy_linear_kernel<T, Kind::kSigns>);
    }
}

}  // namespace
}  // namespace ulr

// tensors: y [C, R, N], x [1 or C, R, K], weight [1, N, K], bias [1, 1, N] or absent, sigma [1, 1, 1 or N].
extern "C" int ulr_cuda_noisy_linear(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    switch (tensors[ulr::kX].dtype) {
        case ULR_F32:
            return ulr::run<float>(*noise, tensors, *launch);
        case ULR_BF16:
            return ulr::run<__nv_bfloat16>(*noise, tensors, *launch);
        case ULR_F16:
            return ulr::run<__half>(*noise, tensors, *launch);
        default:
            return ULR_BAD_ARGUMENT;
    }
}

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
    int64_t draws;  // how many copies make noise of their own
    bool shared;    // one x, and so one product, for all copies
    uint32_t row_tiles, feature_tiles;
};

template <typename T, Kind kind>
__global__ void __launch_bounds__(kThreads, 2) noisy_linear_kernel(const Forward<T> p) {
    char* memory = dynamic_shared<char>();
    float* sums = dynamic_shared<float>();
    __shared__ NoiseTable table;
    table.fill(p.noise, threadIdx.x, kThreads);
    const int warp_row = threadIdx.x / 64 * 32, warp_col = threadIdx.x / 32 % 2 * 64;
    // Tiles start at multiples of their width in the whole noise, so that no call of Philox is cut in two.
    const int64_t shift = p.noise.col_offset % kFeatures;
    // An antithetic pair with an x for each copy: the second's sums start from the first's noise, negated.
    const bool second = p.noise.antithetic && !p.shared;
    const uint32_t feature_tile = blockIdx.x % p.feature_tiles, rest = blockIdx.x / p.feature_tiles;
    const uint32_t product = rest / p.row_tiles;
    const int64_t first_row = int64_t{rest % p.row_tiles} * kRows;
    const int64_t first_feature = int64_t{feature_tile} * kFeatures - shift;
#pragma unroll 1
    for (int pass = 0; pass <= second; ++pass) {
        float acc[2][8][4] = {};
        if (pass == 1) {
            load_sums<kFeatures>(acc, sums, warp_row, warp_col);
            __syncthreads();
        }
        Matrix<T> x = p.x;
        x.data += (product + pass * p.draws) * p.x_copy_stride;
        tiled_product<kRows, kFeatures, kStages, kThreads>(acc, memory, x, first_row, p.weight, first_feature, warp_row,
                                                           warp_col);
        store_sums<kFeatures>(sums, acc, warp_row, warp_col);
        __syncthreads();
        const Noise<kind> noise(p.noise, table);  // only now, so that the product has all registers
#pragma unroll 1
        for (int index = threadIdx.x; index < kRows * kFeatures / 8; index += kThreads) {
            const int row = index / (kFeatures / 8), col = index % (kFeatures / 8) * 8;
            if (first_row + row / 2 * 2 >= p.y.rows) break;  // for a warp as a whole: it covers two rows
            float clean[8], sigma[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int64_t feature = first_feature + col + i;
                const bool exists = feature >= 0 && feature < p.y.cols;
                sigma[i] = exists ? p.sigma[feature] : 0.0f;
                clean[i] =
                    sums[row * kFeatures + col + i] + (exists && p.bias.data != nullptr ? p.bias[feature] : 0.0f);
            }
            const OutputOctet<T> y(p.y, first_row + row, first_feature + col);
            if (pass == 1) {
                y.store(product + p.draws, clean);
                continue;
            }
            Octet<kind> octet(noise, static_cast<uint32_t>(p.noise.row_offset + first_row + row),
                              p.noise.col_offset + first_feature + col);
            const int64_t copies = p.shared ? p.draws : 1;
#pragma unroll 1
            for (int64_t copy = 0; copy < copies; ++copy) {
                float eps[8], value[8];
                octet.make(eps, static_cast<uint32_t>(p.noise.draw + product), static_cast<uint32_t>(copy));
#pragma unroll
                for (int i = 0; i < 8; ++i) value[i] = fmaf(sigma[i], eps[i], clean[i]);
                y.store(product + copy, value);
                if (p.noise.antithetic && !second) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) value[i] = fmaf(-sigma[i], eps[i], clean[i]);
                    y.store(copy + p.draws, value);
                }
                if (second)
                    for (int i = 0; i < 8; ++i) sums[row * kFeatures + col + i] = -sigma[i] * eps[i];
            }
        }
        __syncthreads();
    }
}

enum { kY, kX, kWeight, kBias, kSigma };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const int64_t copies = t[kY].size[0];
    const bool shared = t[kX].size[0] == 1 || t[kX].stride[0] == 0;
    const Forward<T> p{
        noise,
        Matrix<T>(t[kX]),
        Matrix<T>(t[kWeight]),
        shared ? 0 : t[kX].stride[0],
        PerFeature<T>(t[kBias]),
        PerFeature<float>(t[kSigma]),
        Output<T>(t[kY]),
        noise.antithetic ? copies / 2 : copies,
        shared,
        static_cast<uint32_t>((t[kY].size[1] + kRows - 1) / kRows),
        static_cast<uint32_t>((noise.col_offset % kFeatures + t[kY].size[2] + kFeatures - 1) / kFeatures)};
    if (p.y.rows == 0 || p.y.cols == 0) return ULR_OK;
    const int64_t blocks = (shared ? 1 : p.draws) * p.row_tiles * p.feature_tiles;
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

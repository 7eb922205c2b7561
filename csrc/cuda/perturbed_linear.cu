// y[p] = x[p] W'_p^T + b, W'_p = round(fma(sigma, eps_p, W)): the weight's tile is perturbed on its way into the
// product.
#include "low_rank.cuh"
#include "perturbed.cuh"
#include "tile.cuh"

namespace ulr {
namespace {

constexpr int kRows = 128, kSlots = 128;  // of a block's tile; eight warps take 32 x 64 each
constexpr int kThreads = 256;

// A block of `pairs` makes half as many features, once with the noise as it is and once with it negated.
template <bool pairs>
constexpr int kFeatures = pairs ? kSlots / 2 : kSlots;
template <bool pairs>
constexpr int kStages = pairs ? 3 : 4;
// A stage holds a tile of x, one of W', and for pairs whose members have an x each, the second members' x.
template <bool pairs>
constexpr int kStageBytes = 64 * (kRows + kSlots + (pairs ? kRows : 0));
template <bool pairs>
constexpr int kSharedBytes = kStages<pairs> * kStageBytes<pairs>;
static_assert(kSharedBytes<false> >= int{sizeof(float)} * kRows * kSlots);  // the sums take the operands' place
static_assert(kSharedBytes<true> >= int{sizeof(float)} * kRows * kSlots);

template <typename T>
struct Perturbed {
    ulr_noise_spec noise;
    Matrix<T> x, weight;
    int64_t x_member_stride;  // 0: the members share x
    PerFeature<T> bias;
    int64_t bias_member_stride;
    const float* sigma;
    Mask mask;
    Output<T> y;
    uint32_t draws;
    uint32_t row_tiles, feature_tiles;
};

template <typename T, Kind kind, bool pairs>
__global__ void __launch_bounds__(kThreads, 1) perturbed_linear_kernel(const Perturbed<T> p) {
    constexpr int kDepth = 64 / sizeof(T);
    char* memory = dynamic_shared<char>();
    float* sums = dynamic_shared<float>();
    __shared__ NoiseTable table;
    table.fill(p.noise, threadIdx.x, kThreads);
    const uint32_t rest = blockIdx.x / p.feature_tiles, draw = rest / p.row_tiles;
    const int64_t first_feature = int64_t{blockIdx.x % p.feature_tiles} * kFeatures<pairs>;
    const int64_t first_row = int64_t{rest % p.row_tiles} * kRows;
    const int warp_row = threadIdx.x / 64 * 32, warp_col = threadIdx.x / 32 % 2 * 64;
    const bool own_x = pairs && p.x_member_stride != 0;
    Matrix<T> x = p.x, minus_x = p.x;
    x.data += draw * p.x_member_stride;
    minus_x.data += (int64_t{draw} + p.draws) * p.x_member_stride;
    const int steps = static_cast<int>((p.x.cols + kDepth - 1) / kDepth);
    const auto load = [&](int step) {
        if (step < steps) {
            char* stage = memory + step % kStages<pairs> * kStageBytes<pairs>;
            const int64_t col = int64_t{step} * kDepth;
            load_tile<kRows, 64, kThreads>(stage, x, first_row, col, in_order);
            load_tile<kFeatures<pairs>, 64, kThreads>(stage + 64 * kRows, p.weight, first_feature, col, column_of_slot);
            if (own_x) load_tile<kRows, 64, kThreads>(stage + 64 * (kRows + kSlots), minus_x, first_row, col, in_order);
        }
        cp_async_commit();  // an empty group too: the wait counts groups
    };
    float acc[2][8][4] = {};
    __syncthreads();  // the table is filled
    const Noise<kind> noise(p.noise, table);
    const float sigma = *p.sigma;
    // A thread perturbs the same chunk of the same rows of every tile.
    WeightNoise<T, kind> chunks[kFeatures<pairs> * 4 / kThreads];
#pragma unroll 1
    for (int step = 0; step < kStages<pairs> - 1; ++step) load(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<kStages<pairs> - 2>();
        __syncthreads();  // this step's tiles are there for all, and all are done with those that are loaded next
        load(step + kStages<pairs> - 1);
        char* stage = memory + step % kStages<pairs> * kStageBytes<pairs>;
#pragma unroll
        for (int i = 0; i < kFeatures<pairs> * 4 / kThreads; ++i) {
            const int slot = threadIdx.x / 4 + i * (kThreads / 4), chunk = threadIdx.x % 4;
            char* plus = stage + 64 * kRows + chunk_offset<64>(slot, chunk);
            char* minus = pairs ? plus + 64 * kFeatures<pairs> : nullptr;
            const int64_t row = first_feature + column_of_slot(slot);
            const int64_t col = int64_t{step} * kDepth + chunk * (16 / int{sizeof(T)});
            if (row < p.weight.rows && col < p.weight.cols)
                chunks[i].perturb(reinterpret_cast<T*>(plus), reinterpret_cast<T*>(minus), noise, p.noise, draw, row,
                                  col, p.weight.cols, sigma, p.mask);
            else if (pairs)
                *reinterpret_cast<uint4*>(minus) = make_uint4(0u, 0u, 0u, 0u);
        }
        __syncthreads();
        multiply<T>(acc, own_x && warp_col != 0 ? stage + 64 * (kRows + kSlots) : stage, warp_row, stage + 64 * kRows,
                    warp_col);
    }
    cp_async_wait<0>();
    __syncthreads();
    store_sums<kSlots>(sums, acc, warp_row, warp_col);
    __syncthreads();
    const int slot = threadIdx.x % (kSlots / 8) * 8;  // of all octets of this thread
    const int64_t feature = first_feature + slot % kFeatures<pairs>;
    const int64_t member = draw + (slot < kFeatures<pairs> ? 0 : int64_t{p.draws});
    float bias[8];
    load_bias(bias, p.bias, member * p.bias_member_stride, feature, p.y.cols);
#pragma unroll 1
    for (int row = threadIdx.x / (kSlots / 8); row < kRows; row += kThreads / (kSlots / 8)) {
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = sums[row * kSlots + slot + i] + bias[i];
        const OutputOctet<Output<T>> y(p.y, first_row + row, feature);
        y.store(y.of(member), value, p.y.whole);
    }
}

enum { kY, kX, kWeight, kBias, kSigma, kMask };
enum { kNoiseRank };

template <typename T, bool pairs>
int run_full(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const uint32_t members = static_cast<uint32_t>(t[kY].size[0]), draws = pairs ? members / 2 : members;
    const bool shared = t[kX].size[0] == 1;
    const Perturbed<T> p{noise,
                         Matrix<T>(t[kX]),
                         Matrix<T>(t[kWeight]),
                         shared ? 0 : t[kX].stride[0],
                         PerFeature<T>(t[kBias]),
                         t[kBias].size[0] == 1 ? 0 : t[kBias].stride[0],
                         static_cast<const float*>(t[kSigma].data),
                         Mask(t[kMask]),
                         Output<T>(t[kY], 0),
                         draws,
                         static_cast<uint32_t>((t[kY].size[1] + kRows - 1) / kRows),
                         static_cast<uint32_t>((t[kY].size[2] + kFeatures<pairs> - 1) / kFeatures<pairs>)};
    const int64_t blocks = int64_t{draws} * p.row_tiles * p.feature_tiles;
    const auto launch_kind = [&](auto kernel) {
        return launch_kernel(kernel, blocks, dim3(kThreads), kSharedBytes<pairs>, launch, p);
    };
    if (kind_of(noise) == Kind::kSigns) return launch_kind(perturbed_linear_kernel<T, Kind::kSigns, pairs>);
    return launch_kind(perturbed_linear_kernel<T, Kind::kQuantile, pairs>);
}

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    if (t[kY].size[0] == 0 || t[kY].size[1] == 0 || t[kY].size[2] == 0) return ULR_OK;
    if (launch.numbers[kNoiseRank])
        return run_low_rank<T>(noise, {t[kY], t[kX], t[kWeight], t[kBias], t[kSigma]}, launch.numbers[kNoiseRank],
                               launch);
    return noise.antithetic ? run_full<T, true>(noise, t, launch) : run_full<T, false>(noise, t, launch);
}

}  // namespace
}  // namespace ulr

// tensors: y [P, R, N], x [1 or P, R, K], weight [1, N, K], bias [1 or P, 1, N] or absent, sigma [1, 1, 1], mask uint8
// [1, N, K] or absent. numbers: the noise's rank, 0: full.
extern "C" int ulr_cuda_perturbed_linear(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                         const ulr_launch* launch) {
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

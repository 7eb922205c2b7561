// noise_score: the sum over copies of loss_weight * score / sigma.
#include "dispatch.cuh"
#include "grid.cuh"
#include "launch.cuh"
#include "scores.cuh"

namespace ulr {
namespace {

constexpr int kThreads = 256;

struct Scores {
    ulr_noise_spec noise;
    Grid<float> out;
    LossWeights loss;
    PerFeature<float> sigma;
    Quads quads;
};

// Orthogonal: a constant, of signs; their draws are summed by transforms.
template <Kind kind, bool orthogonal>
__global__ void __launch_bounds__(kThreads, kind == Kind::kSobol ? 6 : 0) noise_score_kernel(const Scores p) {
    __shared__ NoiseTable table;
    table.fill(p.noise, threadIdx.x, kThreads);
    __syncthreads();
    ulr_noise_spec spec = p.noise;
    spec.hadamard = orthogonal;
    const Noise<kind> noise(spec, table);
    const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    if (index >= p.quads.rows * p.quads.quads) return;
    const uint32_t row = p.quads.row(index), quad = p.quads.quad(index);
    const int64_t col = 4 * int64_t{quad} - p.quads.shift;
    float total[4] = {};
    for_draws(noise, p.noise, p.loss, StaticBool<orthogonal>{}, row, static_cast<uint32_t>(p.quads.first) + quad,
              [&](uint32_t, const float (&eps)[4], float first, float second) {
#pragma unroll
                  for (int i = 0; i < 4; ++i)  // the score is odd
                      total[i] = fmaf(first - second, score(eps[i], p.noise.dist), total[i]);
              });
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] /= p.sigma[min(max(col + i, int64_t{0}), p.out.cols - 1)];
    GridQuad<float>(p.out, row, col).store(0, total);
}

enum { kOut, kLossWeight, kSigma, kWalshSums };

}  // namespace
}  // namespace ulr

// tensors: out fp32 [1, a, N, b, c], loss_weight [1, C, rows / positions], sigma [1, 1, 1 or N], walsh_sums
// (walsh_sums.cuh) or absent.
extern "C" int ulr_cuda_noise_score(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    using namespace ulr;
    const Grid<float> out(tensors[kOut], noise->col_offset);
    if (out.rows == 0 || out.cols == 0) return ULR_OK;
    if (const int status = launch_walsh_sums(*noise, tensors[kLossWeight], tensors[kWalshSums], *launch)) return status;
    const Scores p{*noise, out, LossWeights(*noise, tensors[kLossWeight], tensors[kWalshSums]),
                   PerFeature<float>(tensors[kSigma]), Quads(out, noise->col_offset)};
    const auto launch_kind = [&](auto kernel) {
        return launch_kernel(kernel, (p.quads.count() + kThreads - 1) / kThreads, dim3(kThreads), 0, *launch, p);
    };
    if (noise->hadamard) return launch_kind(noise_score_kernel<Kind::kSigns, true>);
    return by_kind(*noise, [&](auto kind) { return launch_kind(noise_score_kernel<decltype(kind)::value, false>); });
}

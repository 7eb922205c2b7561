// The gradient buffers of many linear layers in one launch: a table of problems, and a block for each part of each
// problem (gradient.cuh). The longest parts start first, so that the last blocks to finish are short ones.
#include <algorithm>
#include <numeric>
#include <vector>

#include "linear_gradient.cuh"

namespace ulr {
namespace {

constexpr int kMostProblems = 64;  // of one launch: the table travels with it

// The properties of one layer's gradient.
template <typename T>
struct Problem {
    Matrix<T> x;
    int64_t x_copy_stride;
    PerFeature<float> sigma;
    const float* loss_weight;
    int64_t loss_copy_stride, loss_sample_stride, loss_samples;
    Buffer<T> grad_weight, grad_bias;
    const int64_t* key;
    int64_t positions, row_offset, col_offset, width;
    int64_t features, feature_tiles, panels;
    int64_t end;  // the block past its last one, among all blocks
    int copies, draws, walsh_size;
    bool shared;
};

template <typename T>
struct Table {
    ulr_noise_spec noise;  // the noise that all have in common
    int count;
    Problem<T> problems[kMostProblems];
};

template <typename T>
__device__ void describe(Gradient<Linear<T>>& gradient, const ulr_noise_spec& noise, const Problem<T>& problem) {
    gradient = Gradient<Linear<T>>{};
    gradient.noise = noise;
    gradient.noise.key = problem.key;
    gradient.noise.positions = problem.positions;
    gradient.noise.row_offset = problem.row_offset;
    gradient.noise.col_offset = problem.col_offset;
    gradient.noise.width = problem.width;
    if (problem.walsh_size) gradient.noise.draw -= noise.draw % problem.walsh_size;
    gradient.x = problem.x;
    gradient.x_copy_stride = problem.x_copy_stride;
    gradient.sigma = problem.sigma;
    gradient.loss_weight = problem.loss_weight;
    gradient.loss_copy_stride = problem.loss_copy_stride;
    gradient.loss_sample_stride = problem.loss_sample_stride;
    gradient.loss_samples = problem.loss_samples;
    gradient.grad_weight = problem.grad_weight;
    gradient.grad_bias = problem.grad_bias;
    gradient.features = problem.features;
    gradient.copies = problem.copies;
    gradient.draws = problem.draws;
    gradient.walsh_size = problem.walsh_size;
    gradient.shared = problem.shared;
    gradient.feature_tiles = problem.feature_tiles;
    gradient.panels = problem.panels;
}

template <typename T, Kind kind>
__global__ void __launch_bounds__(kGradThreads, 1) gradients_kernel(const Table<T> table) {
    auto& gradient = *reinterpret_cast<Gradient<Linear<T>>*>(dynamic_shared<char>() + GradientMemory<T, false>::kBytes);
    int which = 0;
    while (blockIdx.x >= table.problems[which].end) ++which;
    const int64_t item = blockIdx.x - (which == 0 ? 0 : table.problems[which - 1].end);
    if (threadIdx.x == 0) describe(gradient, table.noise, table.problems[which]);
    __syncthreads();
    const GradientPart part{item % gradient.feature_tiles, static_cast<int>(item / gradient.feature_tiles), kGradRows,
                            0, gradient_units(gradient, kGradRows)};
    gradient_block<Linear<T>, kind, false>(gradient, part);
}

// tensors: of each layer these. numbers: of each layer those.
enum { kGradWeight, kGradBias, kX, kLossWeight, kSigma, kKey, kWalshSums, kTensorsOfLayer };
enum { kPositions, kRowOffset, kColOffset, kWidth, kNumbersOfLayer };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* tensors, const ulr_launch& launch) {
    const int layers = launch.tensors / kTensorsOfLayer;
    const ulr_tensor absent{};
    const auto work = [&](int layer) {  // of a part
        const ulr_tensor* t = tensors + layer * kTensorsOfLayer;
        return t[kLossWeight].size[1] * t[kX].size[1];
    };
    std::vector<int> order(static_cast<size_t>(layers));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return work(a) > work(b); });
    const auto launch_table = [&](Table<T>& table) {
        if (table.count == 0) return int{ULR_OK};
        const int64_t blocks = table.problems[table.count - 1].end;
        constexpr int kBytes = GradientMemory<T, false>::kBytes + int{sizeof(Gradient<Linear<T>>)};
        const auto launch_kind = [&](auto kernel) {
            return launch_kernel(kernel, blocks, dim3(kGradThreads), kBytes, launch, table);
        };
        table.count = 0;
        return by_kind(noise, [&](auto kind) { return launch_kind(gradients_kernel<T, decltype(kind)::value>); });
    };
    Table<T> table{noise, 0, {}};
    for (const int layer : order) {
        const ulr_tensor* t = tensors + layer * kTensorsOfLayer;
        const int64_t* numbers = launch.numbers + layer * kNumbersOfLayer;
        ulr_noise_spec own = noise;
        own.col_offset = numbers[kColOffset];
        const Gradient<Linear<T>> g = linear_gradient<T>(
            own, {t[kGradWeight], t[kGradBias], absent, t[kX], t[kLossWeight], t[kSigma], absent, t[kWalshSums]},
            absent, absent, absent);
        if (g.x.rows == 0 || g.features == 0) continue;
        if (const int status = launch_walsh_sums(own, t[kLossWeight], t[kWalshSums], launch)) return status;
        const int64_t before = table.count == 0 ? 0 : table.problems[table.count - 1].end;
        table.problems[table.count++] = Problem<T>{g.x,
                                                   g.x_copy_stride,
                                                   g.sigma,
                                                   g.loss_weight,
                                                   g.loss_copy_stride,
                                                   g.loss_sample_stride,
                                                   g.loss_samples,
                                                   g.grad_weight,
                                                   g.grad_bias,
                                                   static_cast<const int64_t*>(t[kKey].data),
                                                   numbers[kPositions],
                                                   numbers[kRowOffset],
                                                   numbers[kColOffset],
                                                   numbers[kWidth],
                                                   g.features,
                                                   g.feature_tiles,
                                                   g.panels,
                                                   before + g.feature_tiles * g.panels,
                                                   g.copies,
                                                   g.draws,
                                                   g.walsh_size,
                                                   g.shared};
        if (table.count < kMostProblems) continue;
        if (const int status = launch_table(table); status != ULR_OK) return status;
    }
    return launch_table(table);
}

}  // namespace
}  // namespace ulr

extern "C" int ulr_cuda_foreach_noisy_linear_grad_(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                                   const ulr_launch* launch) {
    return ulr::by_dtype(tensors[ulr::kX].dtype,
                         [&](auto type) { return ulr::run<typename decltype(type)::T>(*noise, tensors, *launch); });
}

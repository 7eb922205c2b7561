// combine_: a step along the sum of many draws' noise, over a list of tensors; each is read and written once.
#include "parameters.cuh"
#include "walsh_sums.cuh"

namespace ulr {
namespace {

enum { kParameter, kFirstState, kSecondState, kTensorsOfOne };

template <int views>
struct Combine {
    ListNoise how;
    int64_t numbers[kFirst];
    const float* coefficients;
    int64_t coefficient_stride, count;
    // Orthogonal draws: the transforms [walsh_blocks, walsh_size] of the coefficients (walsh_sums.cuh).
    const float* walsh_sums;
    int64_t walsh_blocks, walsh_size;
    const float* lr;
    const int64_t* step;
    ParameterTable<views> table;
};

// The new elements of a tensor and its states, given the sum of the noise. Without states there is one view.
template <int views>
__device__ __forceinline__ void take_step(const ParameterEntry<views>& entry, const RowOctet& at, float (&values)[8],
                                          const float (&sum)[8], Rule rule, const StepNumbers& with) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float kept = fmaf(with.decay, values[i], values[i]);
        values[i] = views == 1 ? kept + sum[i] : kept;
    }
    if constexpr (views > 1) {
        float first[8] = {}, second[8] = {};
        at.load<float>(first, entry.view[kFirstState]);
        if (rule == Rule::kMomentum) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                first[i] = fmaf(with.momentum, first[i], sum[i]);
                values[i] = fmaf(with.rate, first[i], values[i]);
            }
        } else {
            at.load<float>(second, entry.view[kSecondState]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                first[i] = fmaf(with.beta1, first[i], with.new1 * sum[i]);
                second[i] = fmaf(with.beta2, second[i], with.new2 * sum[i] * sum[i]);
                const float below = sqrtf(second[i]) / with.root + with.epsilon;
                values[i] = fmaf(with.rate, first[i] / below, values[i]);
            }
            at.store<float>(second, entry.view[kSecondState]);
        }
        at.store<float>(first, entry.view[kFirstState]);
    }
}

template <Kind kind, bool low_rank, int views>
__global__ void __launch_bounds__(kListThreads) combine_kernel(const __grid_constant__ Combine<views> p) {
    __shared__ StepNumbers with;  // a barrier follows
    if (threadIdx.x == 0) with = step_numbers(p.numbers, p.lr, p.step);
    const Rule rule = static_cast<Rule>(p.numbers[kRule]);
    for_each_unit<kind, low_rank>(
        p.table, p.how,
        [&](const auto& noise, auto& sum, uint32_t group, uint32_t octet) {
            constexpr int kHeight = UnitNoise<kind, low_rank>::kHeight;
            noise.clear(sum);
            if constexpr (kind == Kind::kSigns && !low_rank) {
                if (p.how.noise.hadamard) {
                    const uint32_t size = static_cast<uint32_t>(p.walsh_size), slot = noise.slot(group, octet);
                    const float* sums = p.walsh_sums;
                    uint32_t draw = static_cast<uint32_t>(p.how.noise.draw) & ~(size - 1);
                    for (int64_t block = 0; block < p.walsh_blocks; ++block, draw += size, sums += size) {
                        float eps[1][8];
                        noise.make(eps, group, octet, draw);
#pragma unroll
                        for (int i = 0; i < 8; ++i) sum[0][i] += eps[0][i] * sums[(slot + i) & (size - 1)];
                    }
                    return;
                }
            }
            for (int64_t draw = 0; draw < p.count; ++draw) {
                const float coefficient = p.coefficients[draw * p.coefficient_stride];
                float eps[kHeight][8];
                noise.make(eps, group, octet, static_cast<uint32_t>(p.how.noise.draw + draw));
#pragma unroll
                for (int h = 0; h < kHeight; ++h)
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum[h][i] = fmaf(coefficient, eps[h][i], sum[h][i]);
            }
        },
        [&](const ParameterEntry<views>& entry, const RowOctet& at, float (&values)[8], const float (&sum)[8]) {
            take_step(entry, at, values, sum, rule, with);
        });
}

template <int views, bool low_rank>
int launch_combine(Combine<views> p, const ulr_tensor* tensors, const ulr_launch& launch, int first) {
    const auto kernel = kind_of(p.how.noise) == Kind::kSigns ? combine_kernel<Kind::kSigns, low_rank, views>
                                                             : combine_kernel<Kind::kQuantile, low_rank, views>;
    return for_each_table<views, low_rank>(tensors + first, kTensorsOfOne, (launch.tensors - first) / kTensorsOfOne,
                                           launch.numbers + kFirst,
                                           [&](const ParameterTable<views>& table, int64_t blocks) {
                                               p.table = table;
                                               return launch_kernel(kernel, blocks, dim3(kListThreads), 0, launch, p);
                                           });
}

enum CombineTensor { kKeys, kCoefficients, kLearningRate, kStep, kWalshSums, kList };

template <int views>
int combine(const ulr_noise_spec& noise, const ulr_tensor* tensors, const ulr_launch& launch) {
    Combine<views> p{};
    p.how = list_noise(noise, launch);
    for (int i = 0; i < kFirst; ++i) p.numbers[i] = launch.numbers[i];
    p.coefficients = static_cast<const float*>(tensors[kCoefficients].data);
    p.coefficient_stride = tensors[kCoefficients].stride[2];
    p.count = tensors[kCoefficients].size[2];
    ulr_tensor by_draw = tensors[kCoefficients];  // [1, P, 1]
    by_draw.size[1] = p.count, by_draw.stride[1] = p.coefficient_stride, by_draw.size[2] = 1;
    if (const int status = launch_walsh_sums(noise, by_draw, tensors[kWalshSums], launch)) return status;
    p.walsh_sums = static_cast<const float*>(tensors[kWalshSums].data);
    p.walsh_blocks = tensors[kWalshSums].size[0];
    p.walsh_size = tensors[kWalshSums].size[2];
    p.lr = static_cast<const float*>(tensors[kLearningRate].data);
    p.step = static_cast<const int64_t*>(tensors[kStep].data);
    if (const int code = launch_combine<views, false>(p, tensors, launch, kList)) return code;
    return p.how.rank ? launch_combine<views, true>(p, tensors, launch, kList) : ULR_OK;
}

}  // namespace
}  // namespace ulr

// tensors: keys (one for each tensor), coefficients [P], lr [] and step [] or nothing, walsh_sums (walsh_sums.cuh)
// or nothing, and three for each of the list: itself and its states or nothing, each as [rows, a, b, c, columns].
extern "C" int ulr_cuda_combine_(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    using namespace ulr;
    return static_cast<Rule>(launch->numbers[kRule]) == Rule::kSum ? combine<1>(*noise, tensors, *launch)
                                                                   : combine<kTensorsOfOne>(*noise, tensors, *launch);
}

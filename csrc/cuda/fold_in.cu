// New keys from keys and numbers.
#include "launch.cuh"
#include "ulr/philox.h"

namespace ulr {
namespace {

struct Keys {
    ulr_tensor out, key, data;
};

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t& element(const ulr_tensor& t, int64_t plane, int64_t row, int64_t col) {
    return static_cast<int64_t*>(t.data)[plane * t.stride[0] + row * t.stride[1] + col * t.stride[2]];
}

__global__ void __launch_bounds__(kThreads) fold_in_kernel(const Keys p) {
    const int64_t rows = p.out.size[1], cols = p.out.size[2], count = p.out.size[0] * rows * cols;
    for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
        const int64_t plane = i / (rows * cols), row = i / cols % rows, col = i % cols;
        element(p.out, plane, row, col) = fold_in(element(p.key, plane, row, col), element(p.data, plane, row, col));
    }
}

}  // namespace
}  // namespace ulr

// tensors: out, key, data, all int64 of one size, up to three axes; broadcast axes have stride 0.
extern "C" int ulr_cuda_fold_in(const ulr_noise_spec*, const ulr_tensor* tensors, const ulr_launch* launch) {
    using namespace ulr;
    const Keys p{tensors[0], tensors[1], tensors[2]};
    const int64_t count = p.out.size[0] * p.out.size[1] * p.out.size[2];
    return launch_kernel(fold_in_kernel, (count + kThreads - 1) / kThreads, dim3(kThreads), 0, *launch, p);
}

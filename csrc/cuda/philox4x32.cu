// Philox4x32-10 of each counter.
#include "launch.cuh"
#include "ulr/philox.h"

namespace ulr {
namespace {

struct Words64 {
    const int64_t *counter, *key;
    int64_t* out;
    int64_t count;
    int64_t counter_stride, word_stride, key_stride;
};

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) philox4x32_kernel(const Words64 p) {
    const uint64_t low = static_cast<uint32_t>(p.key[0]), high = static_cast<uint64_t>(p.key[p.key_stride]) << 32;
    const KeySchedule key(static_cast<int64_t>(high | low));
    for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.count; i += int64_t{gridDim.x} * kThreads) {
        Words counter;
        for (int word = 0; word < 4; ++word)
            counter.w[word] = static_cast<uint32_t>(p.counter[i * p.counter_stride + word * p.word_stride]);
        const Words words = philox4x32(counter, key);
        for (int word = 0; word < 4; ++word) p.out[4 * i + word] = words.w[word];
    }
}

}  // namespace
}  // namespace ulr

// tensors: out [1, M, 4] contiguous, counter [1, M, 4], key [1, 1, 2], all int64.
extern "C" int ulr_cuda_philox4x32(const ulr_noise_spec*, const ulr_tensor* tensors, const ulr_launch* launch) {
    using namespace ulr;
    const ulr_tensor &out = tensors[0], &counter = tensors[1], &key = tensors[2];
    const Words64 p{static_cast<const int64_t*>(counter.data),
                    static_cast<const int64_t*>(key.data),
                    static_cast<int64_t*>(out.data),
                    out.size[1],
                    counter.stride[1],
                    counter.stride[2],
                    key.stride[2]};
    return launch_kernel(philox4x32_kernel, (p.count + kThreads - 1) / kThreads, dim3(kThreads), 0, *launch, p);
}

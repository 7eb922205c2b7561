// Whether the library's kernels can run on a device at all. A driver that is older than the library's CUDA, or a device
// that it was not built for, is found here, before a launch fails.
#include "launch.cuh"

namespace {
__global__ void usable_kernel() {}
}  // namespace

extern "C" int ulr_cuda_usable(int device) {
    const ulr::DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return ulr::report(guard.status());
    cudaFuncAttributes attributes;
    return ulr::report(cudaFuncGetAttributes(&attributes, usable_kernel));
}

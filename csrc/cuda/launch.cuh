// The common part of launchers: make the caller's device current, launch on the caller's stream, report errors. Errors
// are the calls' own results: cudaGetLastError may still hold an earlier one.
#pragma once

#include "ptx.cuh"
#include "ulr/api.h"

namespace ulr {

// The text of the last failure of this thread; ulr_cuda_error returns it.
void remember_error(cudaError_t error);

inline int report(cudaError_t error) {
    if (error == cudaSuccess) return ULR_OK;
    remember_error(error);
    return error == cudaErrorMemoryAllocation ? ULR_OUT_OF_MEMORY : ULR_LAUNCH_FAILED;
}

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&previous_);
        if (status_ == cudaSuccess && previous_ != device) {
            status_ = cudaSetDevice(device);
            changed_ = status_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status() const { return status_; }

  private:
    cudaError_t status_;
    int previous_ = 0;
    bool changed_ = false;
};

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid

// Raises the limit of dynamic shared memory. By default a kernel may use 48 KiB, including its static memory; each
// device has its own limit.
template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int shared_bytes) {
    if (shared_bytes == 0) return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                shared_bytes);
}

// One launch, without synchronising.
template <typename Params>
int launch_kernel(void (*kernel)(Params), int64_t blocks, dim3 threads, int shared_bytes, const ulr_launch& launch,
                  const Params& params) {
    if (blocks <= 0) return ULR_OK;
    if (blocks > kMostBlocks) return ULR_BAD_ARGUMENT;
    const DeviceGuard guard(launch.device);
    if (guard.status() != cudaSuccess) return report(guard.status());
    if (const cudaError_t error = allow_shared(kernel, shared_bytes); error != cudaSuccess) return report(error);
    const dim3 grid(static_cast<unsigned>(blocks));
#ifdef __CUDACC__
    void* arguments[] = {const_cast<Params*>(&params)};
    return report(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, threads, arguments,
                                   static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(launch.stream)));
#else
    return report(emulate::launch(kernel, grid, threads, shared_bytes, params));
#endif
}

// One launch of as many blocks as the device holds at once, which may then wait for each other (grid_sync).
template <typename Params>
int launch_together(void (*kernel)(Params), dim3 threads, int shared_bytes, const ulr_launch& launch,
                    const Params& params) {
    const DeviceGuard guard(launch.device);
    if (guard.status() != cudaSuccess) return report(guard.status());
    cudaError_t error = allow_shared(kernel, shared_bytes);
    int processors = 0, blocks = 0;
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, launch.device);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads.x),
                                                              static_cast<size_t>(shared_bytes));
    if (error != cudaSuccess) return report(error);
    const dim3 grid(static_cast<unsigned>(processors * blocks));
#ifdef __CUDACC__
    void* arguments[] = {const_cast<Params*>(&params)};
    return report(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, threads, arguments,
                                              static_cast<size_t>(shared_bytes),
                                              static_cast<cudaStream_t>(launch.stream)));
#else
    return report(emulate::launch(kernel, grid, threads, shared_bytes, params, true));
#endif
}

}  // namespace ulr

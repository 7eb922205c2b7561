// CUDA's names for the host: just what csrc/cuda uses, on top of the emulator.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define threadIdx (emulate::thread_index())
#define blockIdx (emulate::block_index())
#define gridDim (emulate::geometry().grid)
#define blockDim (emulate::geometry().block)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <typename T>
T __ldcg(const T* from) {
    return *from;
}

template <typename T>
void __stcs(T* to, T value) {
    *to = value;
}

// Blocks run one after another, and threads change only at barriers: any addition is atomic, any store seen.
inline unsigned atomicAdd(unsigned* to, unsigned value) {
    const unsigned before = *to;
    *to += value;
    return before;
}
inline void __threadfence() {}

inline void __syncthreads(int line = __builtin_LINE()) { emulate::barrier(line); }

template <typename T>
T emulated_shuffle(const char* name, T value, int source) {
    struct Argument {
        T value;
        int source;
        T result;
    } argument{value, source, {}};
    emulate::warp_wide(name, &argument, [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            Argument& to = *static_cast<Argument*>(lanes[lane]);
            to.result = static_cast<Argument*>(lanes[to.source & 31])->value;
        }
    });
    return argument.result;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    if (mask != 0xffffffffu) emulate::fail("only shuffles of the whole warp are emulated");
    return emulated_shuffle("shfl", value, emulate::lane() / width * width + source % width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    if (mask != 0xffffffffu) emulate::fail("only shuffles of the whole warp are emulated");
    return emulated_shuffle("shfl.xor", value, emulate::lane() ^ bits);
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    // Compute capability 8.6, 8.9 and 12.0 have 99 KiB; test_cuda_build.py sees to it that static memory takes no more
    // than the rest.
    constexpr int kSmallestOptIn = 96 * 1024;
    if (bytes > kSmallestOptIn) return cudaErrorInvalidValue;
    emulate::allowed_shared(kernel) = bytes;
    return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 3;  // few, so that each has several parts of the work
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? emulate::failure() : "invalid argument";
}

namespace emulate {

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes, const Params& params,
                   bool cooperative = false) {
    if (shared_bytes > allowed_shared(reinterpret_cast<const void*>(kernel))) return cudaErrorInvalidValue;
    const int failed = run([&] { kernel(params); }, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                           static_cast<size_t>(shared_bytes), cooperative);
    return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulate

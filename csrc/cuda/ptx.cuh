// Functions for instructions that C++ lacks. Off the device (python_tests/cuda_emulation) the same functions are
// emulated, so all other files are one source for both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifndef __CUDACC__
#include <emulated_ptx.h>
#else
#include <cooperative_groups.h>

namespace ulr {

// A barrier of all blocks of a cooperative launch: after it, all see the earlier writes of each.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// The block's dynamic shared memory.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ uint4 ulr_dynamic_shared[];
    return reinterpret_cast<T*>(ulr_dynamic_shared);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// bits >> 23. Opaque to the compiler, which would merge it with the scaling of a table's index into two instructions.
__device__ __forceinline__ uint32_t exponent(uint32_t bits) {
    uint32_t result;
    asm("shr.u32 %0, %1, 23;" : "=r"(result) : "r"(bits));
    return result;
}

// Hides a value from the optimiser, so that work on it is not hoisted above this point and held in registers.
__device__ __forceinline__ int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}
__device__ __forceinline__ int64_t opaque(int64_t value) {
    asm volatile("" : "+l"(value));
    return value;
}

template <int offset>
__device__ __forceinline__ float2 load_shared(uint32_t address) {
    float2 pair;
    asm("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(pair.x), "=f"(pair.y) : "r"(address), "n"(offset));
    return pair;
}

// Copies the first `bytes` of 16 from global to shared memory and zeros the rest; complete only after cp_async_wait.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's newest groups are still pending.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and gets in `out[m]`
// elements (l / 4, 2 (l % 4)) and the next one of matrix m; transposed: of its transpose.
template <bool transposed>
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], const void* row) {
    if constexpr (transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// d += a b: [16 x 16] x [16 x 8], fp32 sums, fragments as PTX's mma.m16n8k16 lays them out.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ulr
#endif

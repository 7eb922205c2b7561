// Philox4x32-10 and the layout of its counters: the noise contract, version 1 (docs/noise.md), on host and device.
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC'11.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define ULR_HD __host__ __device__ __forceinline__
#else
#define ULR_HD inline
#endif

// The CPU library compiles its kernels once per instruction set, each under an inline namespace of its own: otherwise
// the linker would keep one copy of each inline function, perhaps one with instructions that the machine lacks.
#ifndef ULR_ISA
#define ULR_ISA host
#endif

namespace ulr {
inline namespace ULR_ISA {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr uint32_t kFoldInCounter = 0x666F6C64u;  // "fold": keeps key derivation apart from noise

struct Words {
    uint32_t w[4];
};

// The key of each of the ten rounds. A kernel makes it once and keeps it in (uniform) registers.
struct KeySchedule {
    uint32_t k0[10], k1[10];

    ULR_HD explicit KeySchedule(int64_t key) {
        uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32);
        for (int round = 0; round < 10; ++round) {
            k0[round] = low;
            k1[round] = high;
            low += kPhiloxW0;
            high += kPhiloxW1;
        }
    }
};

ULR_HD Words philox4x32(Words c, const KeySchedule& key) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        // One wide multiply gives both halves.
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.w[0];
        const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.w[2];
        c = Words{{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ key.k0[round], static_cast<uint32_t>(p1),
                   static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ key.k1[round], static_cast<uint32_t>(p0)}};
    }
    return c;
}

ULR_HD int64_t fold_in(int64_t key, int64_t data) {
    const uint64_t bits = static_cast<uint64_t>(data);
    const Words w = philox4x32(
        Words{{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), 0u, kFoldInCounter}}, KeySchedule(key));
    return static_cast<int64_t>(static_cast<uint64_t>(w.w[0]) | static_cast<uint64_t>(w.w[1]) << 32);
}

}  // namespace ULR_ISA
}  // namespace ulr

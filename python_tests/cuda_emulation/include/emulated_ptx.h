// The functions of csrc/cuda/ptx.cuh for the host. Fragments are laid out as the PTX manual's tables of ldmatrix and
// mma.m16n8k16 say, written here a second time and on purpose in another way: from element to lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace ulr {

template <typename T>
T* dynamic_shared() {
    return static_cast<T*>(emulate::dynamic_shared());
}

// Static shared memory lies within 2 GiB of this library's own data.
inline char shared_anchor;
inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(reinterpret_cast<intptr_t>(pointer) - reinterpret_cast<intptr_t>(&shared_anchor));
}

template <int offset>
float2 load_shared(uint32_t address) {
    const intptr_t at = reinterpret_cast<intptr_t>(&shared_anchor) + static_cast<int32_t>(address + offset);
    return *reinterpret_cast<const float2*>(at);
}

inline int opaque(int value) { return value; }
inline int64_t opaque(int64_t value) { return value; }
inline uint32_t exponent(uint32_t bits) { return bits >> 23; }

inline void grid_sync(int line = __builtin_LINE()) { emulate::grid_barrier(line); }

inline void cp_async16(void* shared, const void* global, int bytes) { emulate::async_copy(shared, global, bytes); }
inline void cp_async_commit() { emulate::async_commit(); }
template <int pending>
void cp_async_wait() {
    emulate::async_wait(pending);
}

template <bool transposed>
void ldmatrix(uint32_t (&out)[4], const void* row) {
    struct Argument {
        uint32_t* out;
        const uint16_t* row;
    } argument{out, static_cast<const uint16_t*>(row)};
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulate::fail("ldmatrix: a row is not aligned to 16 bytes");
    emulate::warp_wide(transposed ? "ldmatrix.trans" : "ldmatrix", &argument, [](void* const* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int i = 0; i < 8; ++i)
                for (int j = 0; j < 8; ++j) {
                    const uint16_t element = static_cast<Argument*>(lanes[8 * matrix + i])->row[j];
                    const int r = transposed ? j : i, c = transposed ? i : j;  // where the element goes
                    uint32_t& to = static_cast<Argument*>(lanes[4 * r + c / 2])->out[matrix];
                    to = c % 2 ? (to & 0xffffu) | static_cast<uint32_t>(element) << 16 : (to & 0xffff0000u) | element;
                }
    });
}

template <typename T>
float emulated_element(uint16_t bits) {
    T value;
    value.bits = bits;
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
        return __half2float(value);
    } else {
        return __bfloat162float(value);
    }
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
    struct Argument {
        float* d;
        uint32_t a[4], b[2];
    } argument{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulate::warp_wide("mma", &argument, [](void* const* lanes) {
        const auto half_of = [](uint32_t pair, int which) {
            return emulated_element<T>(static_cast<uint16_t>(pair >> 16 * which));
        };
        float left[16][16], right[16][8];
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k) {
                const auto& from = *static_cast<Argument*>(lanes[row % 8 * 4 + k % 8 / 2]);
                left[row][k] = half_of(from.a[row / 8 + k / 8 * 2], k % 2);
            }
        for (int k = 0; k < 16; ++k)
            for (int col = 0; col < 8; ++col) {
                const auto& from = *static_cast<Argument*>(lanes[col * 4 + k % 8 / 2]);
                right[k][col] = half_of(from.b[k / 8], k % 2);
            }
        for (int row = 0; row < 16; ++row)
            for (int col = 0; col < 8; ++col) {
                float sum = 0.0f;
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
                static_cast<Argument*>(lanes[row % 8 * 4 + col / 2])->d[row / 8 * 2 + col % 2] += sum;
            }
    });
}

}  // namespace ulr

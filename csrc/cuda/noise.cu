// The noise itself, written as fp32.
#include <algorithm>

#include "dispatch.cuh"
#include "launch.cuh"
#include "noise.cuh"

namespace ulr {
namespace {

struct Fill {
    ulr_noise_spec noise;
    float* out;
    int64_t rows, cols;
    int64_t row_stride, col_stride;
    int64_t octets;  // pairs of quads of a row of the block
};

constexpr int kThreads = 256;

// Threads walk the octets of all rows in steps of the whole grid; (row, octet) is advanced without a division.
// Whole: the output is contiguous, aligned and made of whole octets. Else each element is stored by itself.
template <Kind kind, bool whole>
__global__ void __launch_bounds__(kThreads) noise_kernel(const Fill p) {
    __shared__ NoiseTable table;
    table.fill(p.noise, threadIdx.x, kThreads);
    __syncthreads();
    const Noise<kind> noise(p.noise, table);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads,
                  first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    // Both fit into 32 bits, as the contract's counters do; only the count of all octets does not.
    const uint32_t octets = static_cast<uint32_t>(p.octets), octet_step = static_cast<uint32_t>(step % p.octets);
    const uint32_t row_step = static_cast<uint32_t>(step / p.octets);
    uint32_t octet = static_cast<uint32_t>(first % p.octets);
    uint32_t row = static_cast<uint32_t>(p.noise.row_offset + first / p.octets);
    const uint32_t first_quad = static_cast<uint32_t>(p.noise.col_offset >> 2);
    const uint32_t first_row = static_cast<uint32_t>(p.noise.row_offset), draw = static_cast<uint32_t>(p.noise.draw);
    const int shift = static_cast<int>(p.noise.col_offset & 3);
    const int64_t total = p.rows * p.octets;
    float4* out = reinterpret_cast<float4*>(p.out) + 2 * first;
    for (uint32_t left = first < total ? (total - first + step - 1) / step : 0; left > 0; --left) {
        float eps[2][4];
        noise.quad(eps[0], row, first_quad + 2 * octet, draw);
        noise.quad(eps[1], row, first_quad + 2 * octet + 1, draw);
        if constexpr (whole) {
            __stcs(out, make_float4(eps[0][0], eps[0][1], eps[0][2], eps[0][3]));  // nothing here reads it again
            __stcs(out + 1, make_float4(eps[1][0], eps[1][1], eps[1][2], eps[1][3]));
            out += 2 * step;
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int64_t col = 8 * int64_t{octet} + i - shift;
                if (col >= 0 && col < p.cols)
                    p.out[(row - first_row) * p.row_stride + col * p.col_stride] = eps[i / 4][i % 4];
            }
        }
        row += row_step;
        octet += octet_step;
        if (octet >= octets) {
            octet -= octets;
            ++row;
        }
    }
}

template <Kind kind>
int launch_noise(const Fill& p, bool whole, const ulr_launch& launch) {
    // More blocks than fit at once only repeat the set-up; 8 for each multiprocessor fill any device of today.
    constexpr int64_t kFullDevice = 8 * 160;
    const int64_t needed = (p.rows * p.octets + kThreads - 1) / kThreads;
    return launch_kernel(whole ? noise_kernel<kind, true> : noise_kernel<kind, false>, std::min(needed, kFullDevice),
                         dim3(kThreads), 0, launch, p);
}

}  // namespace
}  // namespace ulr

// tensors: out [1, rows, cols] fp32.
extern "C" int ulr_cuda_noise(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    using namespace ulr;
    const ulr_tensor& out = tensors[0];
    if (out.dtype != ULR_F32) return ULR_BAD_ARGUMENT;
    const int64_t shift = noise->col_offset & 3;
    const Fill p{*noise,        static_cast<float*>(out.data), out.size[1], out.size[2], out.stride[1],
                 out.stride[2], (shift + out.size[2] + 7) / 8};
    if (p.rows == 0 || p.cols == 0) return ULR_OK;
    const bool whole = shift == 0 && p.cols % 8 == 0 && p.col_stride == 1 && (p.rows == 1 || p.row_stride == p.cols) &&
                       reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    return by_kind(*noise, [&](auto kind) { return launch_noise<decltype(kind)::value>(p, whole, *launch); });
}

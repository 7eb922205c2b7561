// Tiles of matrices in shared memory, and products of tiles on a warp's registers.
//
// A tile keeps its rows one after another, each cut into chunks of 16 bytes that are permuted within the row, so that
// eight rows' chunks at one place lie in different banks, for ldmatrix and float4 reads.
//
// Sums have the layout of mma.m16n8k16: acc[mi][ni][2 h + i] of a lane is row 16 mi + 8 h + lane / 4 and slot
// 8 ni + 2 (lane % 4) + i. The fp32 product, which has no such instruction, has the same layout.
#pragma once

#include <type_traits>

#include "element.cuh"

namespace ulr {

template <int row_bytes>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
    static_assert(row_bytes == 64 || row_bytes % 128 == 0);
    return row * row_bytes + 16 * (chunk ^ (row_bytes == 64 ? (row >> 1) & 3 : row & 7));
}

// Slots of a warp's sums to columns: within 16, a lane's two pairs of slots hold four neighbouring columns, the columns
// of one call of Philox. A tile whose rows become columns of the sums is loaded in this order.
__device__ __forceinline__ int column_of_slot(int slot) {
    return (slot & ~15) | (slot & 6) << 1 | (slot & 8) >> 2 | (slot & 1);
}
__device__ __forceinline__ int in_order(int row) { return row; }

// One copy's matrix in global memory.
template <typename T>
struct Matrix {
    using Element = T;
    const T* data;
    int64_t rows, cols, row_stride, col_stride;
    bool whole;  // 16-byte chunks can be copied as they are

    Matrix() = default;
    explicit Matrix(const ulr_tensor& t)
        : data(static_cast<const T*>(t.data)),
          rows(t.size[1]),
          cols(t.size[2]),
          row_stride(t.stride[1]),
          col_stride(t.stride[2]),
          whole(moves_whole(t, 16 / sizeof(T))) {}
};

// Starts to load the part of `m` whose first element is (row, col), zeros where it has none: cp.async where chunks are
// whole, element by element elsewhere. Runs of 64 columns that lie outside `m` altogether are left as they are.
template <int tile_rows, int row_bytes, int threads, typename T, typename Order>
__device__ __forceinline__ void load_tile(char* tile, const Matrix<T>& m, int64_t row, int64_t col, Order order) {
    constexpr int kChunks = row_bytes / 16, kElements = 16 / sizeof(T), kRowsAtOnce = threads / kChunks;
    static_assert(threads % kChunks == 0);
    // Addresses are recomputed for each tile: kept, they would take registers that the sums need.
    const int thread = opaque(static_cast<int>(threadIdx.x)), chunk = thread % kChunks;
    const int64_t first = col + chunk * kElements;
    if (first / 64 * 64 >= m.cols) return;
    const int inside = static_cast<int>(min(max(m.cols - first, int64_t{0}), int64_t{kElements}));
    if (m.whole) {
#pragma unroll
        for (int from = 0; from < tile_rows; from += kRowsAtOnce) {
            const int tile_row = from + thread / kChunks;
            if (tile_rows % kRowsAtOnce != 0 && tile_row >= tile_rows) break;
            const int64_t r = row + order(tile_row);
            const bool exists = r >= 0 && r < m.rows && inside > 0;
            cp_async16(tile + chunk_offset<row_bytes>(tile_row, chunk),
                       m.data + (exists ? r * m.row_stride + first : 0), exists ? inside * int{sizeof(T)} : 0);
        }
    } else {
#pragma unroll 1
        for (int tile_row = thread / kChunks; tile_row < tile_rows; tile_row += kRowsAtOnce) {
            const int64_t r = row + order(tile_row);
            const bool exists = r >= 0 && r < m.rows;
            T* to = reinterpret_cast<T*>(tile + chunk_offset<row_bytes>(tile_row, chunk));
#pragma unroll 1
            for (int i = 0; i < kElements; ++i)
                to[i] =
                    exists && i < inside ? m.data[r * m.row_stride + (first + i) * m.col_stride] : from_float<T>(0.0f);
        }
    }
}

// acc += A B^T over 64 bytes of the inner axis, which both tiles keep along their rows: rows a_row ... of A, rows
// b_row ... of B as slots.
template <typename T, int mis, int nis>
__device__ __forceinline__ void multiply(float (&acc)[mis][nis][4], const char* a, int a_row, const char* b,
                                         int b_row) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            // Rows 16 apart are permuted alike, so that they have one address.
            const char* a_chunk = a + chunk_offset<64>(a_row + lane % 16, 2 * k + lane / 16);
            const char* b_chunk = b + chunk_offset<64>(b_row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2);
            uint32_t left[mis][4];
#pragma unroll
            for (int mi = 0; mi < mis; ++mi) ldmatrix<false>(left[mi], a_chunk + mi * 16 * 64);
#pragma unroll
            for (int pair = 0; pair < nis / 2; ++pair) {
                uint32_t right[4];
                ldmatrix<false>(right, b_chunk + pair * 16 * 64);
#pragma unroll
                for (int mi = 0; mi < mis; ++mi) {
                    mma(acc[mi][2 * pair], left[mi], right[0], right[1], T{});
                    mma(acc[mi][2 * pair + 1], left[mi], right[2], right[3], T{});
                }
            }
        }
    } else {
        const int group = lane / 4, member = lane % 4;
#pragma unroll 1
        for (int chunk = 0; chunk < 4; ++chunk) {
            float4 left[mis][2];
#pragma unroll
            for (int i = 0; i < 2 * mis; ++i)
                left[i / 2][i % 2] =
                    *reinterpret_cast<const float4*>(a + chunk_offset<64>(a_row + 8 * i + group, chunk));
#pragma unroll
            for (int i = 0; i < 2 * nis; ++i) {
                const float4 right = *reinterpret_cast<const float4*>(
                    b + chunk_offset<64>(b_row + 8 * (i / 2) + 2 * member + i % 2, chunk));
#pragma unroll
                for (int j = 0; j < 2 * mis; ++j) {
                    float& sum = acc[j / 2][i / 2][2 * (j % 2) + i % 2];
                    const float4 l = left[j / 2][j % 2];
                    sum = fmaf(l.x, right.x, sum);
                    sum = fmaf(l.y, right.y, sum);
                    sum = fmaf(l.z, right.z, sum);
                    sum = fmaf(l.w, right.w, sum);
                }
            }
        }
    }
}

// acc += A^T B over `depth` rows, which are the inner axis of both tiles: from a_row and columns a_col of A, from row 0
// and columns b_col of B.
template <int a_bytes, int b_bytes, int depth, typename T, int mis, int nis>
__device__ __forceinline__ void multiply_transposed(float (&acc)[mis][nis][4], const char* a, int a_row, int a_col,
                                                    const char* b, int b_col, T) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        static_assert(depth == 16);
        uint32_t left[mis][4];
#pragma unroll
        for (int mi = 0; mi < mis; ++mi)
            ldmatrix<true>(left[mi], a + chunk_offset<a_bytes>(a_row + lane % 8 + lane / 16 * 8,
                                                               a_col / 8 + 2 * mi + lane / 8 % 2));
#pragma unroll
        for (int pair = 0; pair < nis / 2; ++pair) {
            uint32_t right[4];
            ldmatrix<true>(right, b + chunk_offset<b_bytes>(lane % 16, b_col / 8 + 2 * pair + lane / 16));
#pragma unroll
            for (int mi = 0; mi < mis; ++mi) {
                mma(acc[mi][2 * pair], left[mi], right[0], right[1], T{});
                mma(acc[mi][2 * pair + 1], left[mi], right[2], right[3], T{});
            }
        }
    } else {
        const int group = lane / 4, member = lane % 4;
#pragma unroll 1
        for (int k = 0; k < depth; ++k) {
            float left[mis][2];
#pragma unroll
            for (int i = 0; i < 2 * mis; ++i) {
                const int col = a_col + 8 * i + group;
                left[i / 2][i % 2] =
                    reinterpret_cast<const float*>(a + chunk_offset<a_bytes>(a_row + k, col / 4))[col % 4];
            }
#pragma unroll
            for (int ni = 0; ni < nis; ++ni) {
                const int col = b_col + 8 * ni + 2 * member;
                const float2 right =
                    reinterpret_cast<const float2*>(b + chunk_offset<b_bytes>(k, col / 4))[col % 4 / 2];
#pragma unroll
                for (int i = 0; i < 2 * mis; ++i) {
                    float* sum = &acc[i / 2][ni][2 * (i % 2)];
                    sum[0] = fmaf(left[i / 2][i % 2], right.x, sum[0]);
                    sum[1] = fmaf(left[i / 2][i % 2], right.y, sum[1]);
                }
            }
        }
    }
}

// acc += A^T 1, the sums over 16 rows of A, from a_row and columns a_col; each as often as mma has columns.
template <int a_bytes, typename T, int mis>
__device__ __forceinline__ void add_column_sums(float (&acc)[mis][4], const char* a, int a_row, int a_col, T) {
    const int lane = threadIdx.x % 32;
    const uint32_t ones = twice<T>(1.0f);
#pragma unroll
    for (int mi = 0; mi < mis; ++mi) {
        uint32_t left[4];
        ldmatrix<true>(left,
                       a + chunk_offset<a_bytes>(a_row + lane % 8 + lane / 16 * 8, a_col / 8 + 2 * mi + lane / 8 % 2));
        mma(acc[mi], left, ones, ones, T{});
    }
}

// sums = X W^T + sums for a tile of rows x columns, the whole inner axis through `stages` pairs of tiles, loads running
// ahead. Each warp owns 16 mis rows from a_row and 8 nis columns from b_row. All threads together, from and to a
// barrier.
template <int tile_rows, int tile_cols, int stages, int threads, typename X, typename Weight, int mis, int nis>
__device__ __forceinline__ void tiled_product(float (&acc)[mis][nis][4], char* memory, const X& x, int64_t row,
                                              const Weight& weight, int64_t col, int a_row, int b_row) {
    using T = typename X::Element;
    constexpr int kDepth = 64 / sizeof(T), kStageBytes = 64 * (tile_rows + tile_cols);
    const int steps = static_cast<int>((x.cols + kDepth - 1) / kDepth);
    const auto load = [&](int step) {
        if (step < steps) {
            char* stage = memory + step % stages * kStageBytes;
            load_tile<tile_rows, 64, threads>(stage, x, row, int64_t{step} * kDepth, in_order);
            load_tile<tile_cols, 64, threads>(stage + 64 * tile_rows, weight, col, int64_t{step} * kDepth,
                                              column_of_slot);
        }
        cp_async_commit();  // an empty group too: the wait counts groups
    };
#pragma unroll 1
    for (int step = 0; step < stages - 1; ++step) load(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<stages - 2>();
        __syncthreads();  // this step's tiles are there for all, and all are done with those that are loaded next
        load(step + stages - 1);
        const char* stage = memory + step % stages * kStageBytes;
        multiply<T>(acc, stage, a_row, stage + 64 * tile_rows, b_row);
    }
    cp_async_wait<0>();
    __syncthreads();
}

// A lane's sums between registers and a plain fp32 tile [rows][cols] in shared memory.
template <int cols, int mis, int nis>
__device__ __forceinline__ void store_sums(float* tile, const float (&acc)[mis][nis][4], int row, int col) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * mis; ++i)
#pragma unroll
        for (int group = 0; group < nis / 2; ++group) {
            const float *low = &acc[i / 2][2 * group][2 * (i % 2)], *high = &acc[i / 2][2 * group + 1][2 * (i % 2)];
            auto* pairs =
                reinterpret_cast<float2*>(tile + (row + 8 * i + lane / 4) * cols + col + 16 * group + lane % 4 * 4);
            pairs[0] = make_float2(low[0], low[1]);
            pairs[1] = make_float2(high[0], high[1]);
        }
}

template <int cols, int mis, int nis>
__device__ __forceinline__ void load_sums(float (&acc)[mis][nis][4], const float* tile, int row, int col) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * mis; ++i)
#pragma unroll
        for (int group = 0; group < nis / 2; ++group) {
            float *low = &acc[i / 2][2 * group][2 * (i % 2)], *high = &acc[i / 2][2 * group + 1][2 * (i % 2)];
            // In pairs, as mma has them: four at once would tie the sums to other registers throughout the product.
            const auto* pairs = reinterpret_cast<const float2*>(tile + (row + 8 * i + lane / 4) * cols + col +
                                                                16 * group + lane % 4 * 4);
            low[0] = pairs[0].x, low[1] = pairs[0].y, high[0] = pairs[1].x, high[1] = pairs[1].y;
        }
}

}  // namespace ulr

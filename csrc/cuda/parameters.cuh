// Lists of parameters: a table of them in the kernel's own arguments, the blocks' work on it, noise and elements.
#pragma once

#include "element.cuh"
#include "launch.cuh"
#include "noise.cuh"
#include "ulr/step.h"

namespace ulr {

constexpr int kListThreads = 256;
constexpr int kUnitsOfThread = 8;  // so that the set-up of a block is paid for
constexpr int kUnitsOfBlock = kListThreads * kUnitsOfThread;
constexpr int kRowsOfLowRank = 4;  // the rows of a unit there: one call of Philox makes their factors
constexpr int kColumnAxes = 4;     // after the first one, of a tensor's view [rows, ...]
// Kernel arguments need no copy and no wait, and a graph keeps them. The older limit of their size is 4 KB.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
constexpr int kTableBytes = 32000;
#else
constexpr int kTableBytes = 3800;
#endif

// The elements of a tensor of the list.
struct ParameterView {
    void* data;
    int64_t row_stride, col_stride;
    int32_t dtype;
    bool whole;  // each octet of columns of the whole noise is one aligned access, or not there at all
};

template <int views>
struct ParameterEntry {
    ParameterView view[views];
    int64_t cols, col_offset, width;  // width: columns of the whole noise
    uint32_t rows, row_offset, first_block, key;
};

template <int views>
struct ParameterTable {
    static constexpr int kMost = kTableBytes / static_cast<int>(sizeof(ParameterEntry<views>));
    ParameterEntry<views> entries[kMost];
    int count;
};

inline ParameterView view_of(const ulr_tensor& t, int64_t start, int64_t col_offset) {
    const int size = element_size(t.dtype);
    ParameterView v{static_cast<char*>(t.data) + start * size, t.stride[0], t.stride[kColumnAxes], t.dtype, false};
    const int64_t cols = t.size[kColumnAxes];
    v.whole = (cols == 1 || v.col_stride == 1) && cols % 8 == 0 && col_offset % 8 == 0 &&
              reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && (t.size[0] <= 1 || v.row_stride % 8 == 0);
    return v;
}

// Octets of columns of the whole noise that a row touches.
__host__ __device__ inline int64_t octets_of(int64_t col_offset, int64_t cols) {
    return ((col_offset & 7) + cols + 7) / 8;
}

// Rows, or groups of rows of the whole noise for low rank.
__host__ __device__ inline int64_t groups_of(int64_t row_offset, int64_t rows, int height) {
    return (row_offset % height + rows + height - 1) / height;
}

// Walks the list: launch(table, blocks) for as many entries at a time as fit in a table. `tensors` has `stride` a
// parameter; the first `views` count; those that are absent have no data. A kernel of full rank takes the
// tensors of full rank. A tensor whose rows one stride cannot step through is an entry for each run of columns.
template <int views, bool low_rank, typename Launch>
int for_each_table(const ulr_tensor* tensors, int64_t stride, int64_t count, const int64_t* numbers, Launch launch) {
    ParameterTable<views> table{};
    int64_t blocks = 0;
    const auto flush = [&]() {
        const int code = table.count ? launch(table, blocks) : ULR_OK;
        table.count = 0;
        blocks = 0;
        return code;
    };
    for (int64_t i = 0; i < count; ++i, tensors += stride, numbers += kTensorNumbers) {
        const int64_t *size = tensors->size, rows = size[0], cols = size[kColumnAxes];
        if ((numbers[kRank] > 0) != low_rank || !rows || !cols) continue;
        for (int64_t run = 0; run < size[1] * size[2] * size[3]; ++run) {
            const int64_t a = run / (size[2] * size[3]), b = run / size[3] % size[2], c = run % size[3];
            const int64_t row_offset = numbers[kRowOffset], col_offset = numbers[kColOffset] + run * cols;
            ParameterEntry<views>& entry = table.entries[table.count++];
            for (int v = 0; v < views; ++v) {
                const int64_t* steps = tensors[v].stride;
                entry.view[v] = view_of(tensors[v], a * steps[1] + b * steps[2] + c * steps[3], col_offset);
            }
            entry.cols = cols;
            entry.col_offset = col_offset;
            entry.width = numbers[kWidth];
            entry.rows = static_cast<uint32_t>(rows);
            entry.row_offset = static_cast<uint32_t>(row_offset);
            entry.first_block = static_cast<uint32_t>(blocks);
            entry.key = static_cast<uint32_t>(i);
            const int64_t groups = groups_of(row_offset, rows, low_rank ? kRowsOfLowRank : 1);
            blocks += (octets_of(col_offset, cols) * groups + kUnitsOfBlock - 1) / kUnitsOfBlock;
            if (table.count == table.kMost || blocks > kMostBlocks / 2)
                if (const int code = flush()) return code;
        }
    }
    return flush();
}

// The entry that a block works on.
template <int views>
__device__ __forceinline__ const ParameterEntry<views>& entry_of(const ParameterTable<views>& table, uint32_t block) {
    int low = 0;
    for (int count = table.count; count > 1;) {
        const int half = count / 2;
        if (table.entries[low + half].first_block <= block) low += half;
        count -= half;
    }
    return table.entries[low];
}

// Which noise, and how results are rounded.
struct ListNoise {
    ulr_noise_spec noise;  // its key is the list's first
    int64_t rank;          // of low rank
    float scale;           // 1 / sqrt(rank)
    bool stochastic;
};

inline ListNoise list_noise(const ulr_noise_spec& noise, const ulr_launch& launch) {
    const int64_t rank = launch.numbers[kListRank];
    return {noise, rank, low_rank_scale(rank > 0 ? rank : 1), launch.numbers[kStochastic] != 0};
}

// The noise of a unit: an octet of columns of the whole noise, of one row or of four.
template <Kind kind, bool low_rank>
class UnitNoise {
  public:
    static constexpr int kHeight = low_rank ? kRowsOfLowRank : 1;

    // The noise of `how`, with what its specification says of the tensor.
    __device__ __forceinline__ UnitNoise(const ListNoise& how, const ulr_noise_spec& spec, const NoiseTable& by_col,
                                         const NoiseTable& by_row)
        : how_(how), by_col_(spec, by_col), by_row_(spec, low_rank ? by_row : by_col) {}

    __device__ __forceinline__ void make(float (&eps)[kHeight][8], uint32_t group, uint32_t octet,
                                         uint32_t draw) const {
        if constexpr (low_rank) {
            clear(eps);
            for (uint32_t i = 0; i < how_.rank; ++i) {
                float a[kHeight], b[8];
                by_row_.quad(a, i, group, draw);
                octet_noise(b, by_col_, i, octet, draw);
#pragma unroll
                for (int h = 0; h < kHeight; ++h)
#pragma unroll
                    for (int c = 0; c < 8; ++c) eps[h][c] = fmaf(a[h], b[c], eps[h][c]);
            }
#pragma unroll
            for (int h = 0; h < kHeight; ++h)
#pragma unroll
                for (int c = 0; c < 8; ++c) eps[h][c] *= how_.scale;
        } else {
            octet_noise(eps[0], by_col_, group, octet, draw);
        }
    }

    // The slot of the first column of an octet.
    __device__ __forceinline__ uint32_t slot(uint32_t row, uint32_t octet) const {
        return by_col_.slot(row, 8 * octet);
    }

    __device__ __forceinline__ static void clear(float (&values)[kHeight][8]) {
#pragma unroll
        for (int h = 0; h < kHeight; ++h)
#pragma unroll
            for (int c = 0; c < 8; ++c) values[h][c] = 0.0f;
    }

  private:
    const ListNoise& how_;
    const Noise<kind> by_col_, by_row_;
};

// Eight neighbouring columns of a row from `col` on, which may begin before the row or end after it.
struct RowOctet {
    int64_t row, col, cols;

    // move(element, i) for each element there is.
    template <typename T, typename Move>
    __device__ __forceinline__ void each(const ParameterView& view, Move move) const {
        T* const base = static_cast<T*>(view.data) + row * view.row_stride + col * view.col_stride;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (col + i >= 0 && col + i < cols) move(base[i * view.col_stride], i);
    }

    template <typename T>
    __device__ __forceinline__ void load(float (&values)[8], const ParameterView& view) const {
        if (view.whole) {
            load8(values, static_cast<const T*>(view.data) + row * view.row_stride + col);
        } else {
            each<T>(view, [&](const T& element, int i) { values[i] = to_float(element); });
        }
    }

    template <typename T>
    __device__ __forceinline__ void store(const float (&values)[8], const ParameterView& view) const {
        if (view.whole) {
            store8(static_cast<T*>(view.data) + row * view.row_stride + col, values);
        } else {
            each<T>(view, [&](T& element, int i) { element = from_float<T>(values[i]); });
        }
    }
};

// Rounds to bf16 by the words of the parameter's rounding stream, away from zero with the probability of the cut-off
// part.
__device__ __forceinline__ void round_stochastically(float (&values)[8], int64_t rounding_key, uint32_t row,
                                                     uint32_t octet, uint32_t draw) {
    const KeySchedule key(opaque(rounding_key));  // recomputed: the rounds' keys are not worth registers
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Words words = philox4x32(Words{{2 * octet + half, row, draw, 0u}}, key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& value = values[4 * half + i];
            const uint32_t bits = bits_of(value);
            if ((bits & 0x7fffffffu) < 0x7f800000u) value = float_of((bits + (words.w[i] >> 16)) & 0xffff0000u);
        }
    }
}

// A block's share of the list. sum(noise, change, group, octet): the sum of the noise; apply(entry, at, old,
// change): the new elements instead of the old.
template <Kind kind, bool low_rank, int views, typename Sum, typename Apply>
__device__ __forceinline__ void for_each_unit(const ParameterTable<views>& table, const ListNoise& how, Sum sum,
                                              Apply apply) {
    __shared__ int64_t keys[3];
    __shared__ NoiseTable by_col, by_row;
    const ParameterEntry<views>& entry = entry_of(table, blockIdx.x);
    if (threadIdx.x == 0) {
        const int64_t key = how.noise.key[entry.key];
        keys[0] = low_rank ? fold_in(key, kColFactorStream) : key;
        keys[1] = low_rank ? fold_in(key, kRowFactorStream) : key;
        keys[2] = fold_in(key, kRoundingStream);
    }
    __syncthreads();
    ulr_noise_spec spec = how.noise;
    spec.key = &keys[0];
    by_col.fill(spec, threadIdx.x, kListThreads);
    if (low_rank) {
        spec.key = &keys[1];
        by_row.fill(spec, threadIdx.x, kListThreads);
    }
    __syncthreads();
    ulr_noise_spec of_entry = how.noise;
    of_entry.width = entry.width;
    of_entry.positions = int64_t{1} << 32;  // a constant, as it is for every parameter
    if (low_rank) of_entry.hadamard = 0;    // a constant
    const UnitNoise<kind, low_rank> noise(how, of_entry, by_col, by_row);
    constexpr int kHeight = UnitNoise<kind, low_rank>::kHeight;
    const uint32_t octets = static_cast<uint32_t>(octets_of(entry.col_offset, entry.cols));
    const uint32_t groups = static_cast<uint32_t>(groups_of(entry.row_offset, entry.rows, kHeight));
    const int64_t first = (blockIdx.x - entry.first_block) * int64_t{kUnitsOfBlock} + threadIdx.x;
    uint32_t octet = static_cast<uint32_t>(first % octets), group = static_cast<uint32_t>(first / octets);
    const uint32_t octet_step = kListThreads % octets, group_step = kListThreads / octets;
    const uint32_t first_octet = static_cast<uint32_t>(entry.col_offset >> 3);
    const uint32_t first_group = entry.row_offset / kHeight;
#pragma unroll 1
    for (int unit = 0; unit < kUnitsOfThread && group < groups; ++unit) {
        float change[kHeight][8];
        sum(noise, change, first_group + group, first_octet + octet);
#pragma unroll
        for (int h = 0; h < kHeight; ++h) {
            const int64_t row = int64_t{first_group + group} * kHeight + h;
            const RowOctet at{row - entry.row_offset, 8 * int64_t{octet} - (entry.col_offset & 7), entry.cols};
            if (at.row < 0 || at.row >= entry.rows) continue;
            const ParameterView& view = entry.view[0];
            float values[8] = {};
            if (view.dtype == ULR_F32) {
                at.template load<float>(values, view);
                apply(entry, at, values, change[h]);
                at.template store<float>(values, view);
            } else if (view.dtype == ULR_BF16) {
                at.template load<__nv_bfloat16>(values, view);
                apply(entry, at, values, change[h]);
                if (how.stochastic)
                    round_stochastically(values, keys[2], static_cast<uint32_t>(row), first_octet + octet,
                                         static_cast<uint32_t>(how.noise.draw));
                at.template store<__nv_bfloat16>(values, view);
            } else {
                at.template load<__half>(values, view);
                apply(entry, at, values, change[h]);
                at.template store<__half>(values, view);
            }
        }
        octet += octet_step;
        group += group_step;
        if (octet >= octets) {
            octet -= octets;
            ++group;
        }
    }
}

}  // namespace ulr

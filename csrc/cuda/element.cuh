// Elements of the three dtypes, and views of tensors with any strides.
#pragma once

#include <string.h>

#include <type_traits>

#include "ptx.cuh"
#include "ulr/api.h"

namespace ulr {

// A bool that is a constant, for a parameter that also takes bools known at run time only.
template <bool value>
struct StaticBool {
    __device__ __forceinline__ constexpr operator bool() const { return value; }
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
    if constexpr (sizeof(T) == 4) {
        return value;
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(value);
    } else {
        return __float2bfloat16_rn(value);
    }
}

// Two 16-bit elements as one word.
template <typename Pair>
__device__ __forceinline__ uint32_t word_of(const Pair& pair) {
    uint32_t word;
    static_assert(sizeof pair == sizeof word);
    memcpy(&word, &pair, sizeof word);
    return word;
}

// A 16-bit element twice in one word.
template <typename T>
__device__ __forceinline__ uint32_t twice(float value) {
    if constexpr (std::is_same_v<T, __half>) {
        return word_of(__floats2half2_rn(value, value));
    } else {
        return word_of(__floats2bfloat162_rn(value, value));
    }
}

// Four neighbours at once; `out` is aligned to all four.
__device__ __forceinline__ void store4(float* out, const float (&v)[4]) {
    *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ void store4(__nv_bfloat16* out, const float (&v)[4]) {
    *reinterpret_cast<uint2*>(out) =
        make_uint2(word_of(__floats2bfloat162_rn(v[0], v[1])), word_of(__floats2bfloat162_rn(v[2], v[3])));
}

__device__ __forceinline__ void store4(__half* out, const float (&v)[4]) {
    *reinterpret_cast<uint2*>(out) =
        make_uint2(word_of(__floats2half2_rn(v[0], v[1])), word_of(__floats2half2_rn(v[2], v[3])));
}

__device__ __forceinline__ void load4(float (&v)[4], const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

// For 16-bit types.
template <typename T>
__device__ __forceinline__ void load4(float (&v)[4], const T* from) {
    struct alignas(8) Four {
        T values[4];
    };
    const Four four = *reinterpret_cast<const Four*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = to_float(four.values[i]);
}

inline int element_size(int dtype) { return dtype == ULR_F32 ? 4 : dtype == ULR_I64 ? 8 : 2; }

// Whether `elements` neighbours along the columns can be moved as one aligned access, wherever a multiple of
// `elements` starts.
inline bool moves_whole(const ulr_tensor& t, int elements) {
    const int64_t bytes = static_cast<int64_t>(elements) * element_size(t.dtype);
    return t.stride[2] == 1 && reinterpret_cast<uintptr_t>(t.data) % bytes == 0 &&
           (t.size[1] <= 1 || t.stride[1] % elements == 0) && (t.size[0] <= 1 || t.stride[0] % elements == 0);
}

// A scalar or one value a feature: an absent axis repeats.
template <typename T>
struct PerFeature {
    T* data;
    int64_t stride;

    PerFeature() = default;
    explicit PerFeature(const ulr_tensor& t)
        : data(static_cast<T*>(t.data)), stride(t.size[2] == 1 ? 0 : t.stride[2]) {}
    __device__ __forceinline__ float operator[](int64_t feature) const { return to_float(data[feature * stride]); }
};

// A buffer [rows, cols] to add to, of fp32 or of the inputs' dtype T.
template <typename T>
struct Buffer {
    void* data;
    bool wide;  // fp32
    int64_t row_stride, col_stride;

    Buffer() = default;
    explicit Buffer(const ulr_tensor& t)
        : data(t.data),
          wide(t.dtype == ULR_F32),
          row_stride(t.stride[1]),
          col_stride(t.size[2] == 1 ? 0 : t.stride[2]) {}

    // The same elements of a buffer `floats` further on, which is fp32 if `floats` is not 0.
    __device__ __forceinline__ Buffer shifted(int64_t floats) const {
        Buffer result = *this;
        result.data = static_cast<float*>(data) + floats;
        return result;
    }

    __device__ __forceinline__ void add(int64_t row, int64_t col, float value) const {
        const int64_t at = row * row_stride + col * col_stride;
        if (wide) {
            static_cast<float*>(data)[at] += value;
        } else {
            T& element = static_cast<T*>(data)[at];
            element = from_float<T>(to_float(element) + value);
        }
    }
};

// Eight neighbours; `out` is aligned to 16 bytes.
__device__ __forceinline__ void store8(float* out, const float (&v)[8]) {
    store4(out, {v[0], v[1], v[2], v[3]});
    store4(out + 4, {v[4], v[5], v[6], v[7]});
}

__device__ __forceinline__ void store8(__nv_bfloat16* out, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(out) =
        make_uint4(word_of(__floats2bfloat162_rn(v[0], v[1])), word_of(__floats2bfloat162_rn(v[2], v[3])),
                   word_of(__floats2bfloat162_rn(v[4], v[5])), word_of(__floats2bfloat162_rn(v[6], v[7])));
}

__device__ __forceinline__ void store8(__half* out, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(out) =
        make_uint4(word_of(__floats2half2_rn(v[0], v[1])), word_of(__floats2half2_rn(v[2], v[3])),
                   word_of(__floats2half2_rn(v[4], v[5])), word_of(__floats2half2_rn(v[6], v[7])));
}

__device__ __forceinline__ void load8(float (&v)[8], const float* from) {
    const float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

template <typename T>
__device__ __forceinline__ void load8(float (&v)[8], const T* from) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    T elements[8];
    memcpy(elements, &words, sizeof words);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(elements[i]);
}

// The output of a linear layer, [copies, rows, cols].
template <typename T>
struct Output {
    using Element = T;
    T* data;
    int64_t rows, cols;
    int64_t copy_stride, row_stride, col_stride;
    bool whole;  // each octet of columns of the whole noise lies inside or outside, and can be stored at once

    Output() = default;
    Output(const ulr_tensor& t, int64_t col_offset)
        : data(static_cast<T*>(t.data)),
          rows(t.size[1]),
          cols(t.size[2]),
          copy_stride(t.stride[0]),
          row_stride(t.stride[1]),
          col_stride(t.stride[2]),
          whole(cols % 8 == 0 && col_offset % 8 == 0 && moves_whole(t, 16 / sizeof(T))) {}

    __device__ __forceinline__ int64_t place(int64_t row) const { return row * row_stride; }
};

// Columns col ... col + 7 of a row of an output, an octet of the whole noise. Missing ones are skipped.
template <typename Out>
class OutputOctet {
  public:
    using T = typename Out::Element;
    __device__ __forceinline__ OutputOctet(const Out& out, int64_t row, int64_t col)
        : out_(out),
          at_(out.data + out.place(row) + col * out.col_stride),
          first_(static_cast<int>(max(-col, int64_t{0}))),
          last_(row < out.rows ? static_cast<int>(min(out.cols - col, int64_t{8})) : 0) {}

    // The start of a copy's octet; the next copy's is out.copy_stride further.
    __device__ __forceinline__ T* of(int64_t copy) const { return at_ + copy * out_.copy_stride; }

    // Whole: whether out.whole holds. As a constant it leaves one predicate and one address.
    template <typename Whole>
    __device__ __forceinline__ void store(T* to, const float (&values)[8], Whole whole) const {
        if (whole) {
            if (first_ < last_) store8(to, values);
        } else {
            const int64_t stride = opaque(out_.col_stride);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i >= first_ && i < last_) to[i * stride] = from_float<T>(values[i]);
        }
    }

  private:
    const Out& out_;
    T* const at_;
    const int first_, last_;
};

}  // namespace ulr

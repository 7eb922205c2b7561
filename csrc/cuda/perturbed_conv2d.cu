// perturbed_conv2d: the product of perturbed_product.cuh. Rows are the output's pixels, columns its channels; the inner
// axis follows a weight's row in memory, channel by channel and kernel place by kernel place, which is the order of its
// noise.
#include "conv.cuh"
#include "dispatch.cuh"
#include "perturbed_product.cuh"

namespace ulr {
namespace {

// Places of the inner axis.
struct Kernel {
    Divisor places, width;
};
struct KernelPlace {
    uint32_t channel, y, x;

    __device__ __forceinline__ KernelPlace(const Kernel& kernel, uint32_t k) : x(k) {
        channel = kernel.places.take(x);
        y = kernel.width.take(x);
    }
};

// Offsets of a row's elements; a weight and an image have fewer than 2^31 elements: see fits.
struct KernelStrides {
    int channel, y, x;

    __device__ __forceinline__ int offset(const KernelPlace& at) const {
        return static_cast<int>(at.channel) * channel + static_cast<int>(at.y) * y + static_cast<int>(at.x) * x;
    }
};
KernelStrides strides_of(const ulr_tensor& t) {
    return {static_cast<int>(t.stride[2]), static_cast<int>(t.stride[3]), static_cast<int>(t.stride[4])};
}

// One copy's images as a row of inputs for each output pixel.
template <typename T>
struct Windows {
    using Element = T;
    const T* data;
    int64_t rows, cols;
    int64_t image_stride, group_stride;
    KernelStrides strides;  // of the image
    int height, width;
    int stride_y, stride_x, top, left, dilation_y, dilation_x;
    Divisor pixels, row_pixels;  // of the output: an image's, a line's
    Kernel kernel;
};

// The weight [O, I / groups, kh, kw], with a row for each output channel.
template <typename T>
struct Filters {
    using Element = T;
    Matrix<T> dense;  // its `whole`: the rows lie in one piece, and chunks of 16 bytes can be copied as they are
    KernelStrides strides;
    Kernel kernel;
};

struct FilterMask {
    const uint8_t* data;
    int64_t row_stride;
    KernelStrides strides;
    Kernel kernel;

    __device__ __forceinline__ bool at(int64_t row, int64_t col) const {
        return data == nullptr ||
               data[row * row_stride + strides.offset(KernelPlace(kernel, static_cast<uint32_t>(col)))] != 0;
    }
};

// load_tile of tile.cuh for rows of windows. An address is the sum of a row's offset and a place's offset.
template <int tile_rows, int row_bytes, int threads, typename T, typename Order>
__device__ __forceinline__ void load_tile(char* tile, const Windows<T>& m, int64_t row, int64_t col, Order order) {
    constexpr int kChunks = row_bytes / 16, kElements = 16 / sizeof(T), kRowsAtOnce = threads / kChunks;
    constexpr int kRowsOfThread = tile_rows / kRowsAtOnce;
    static_assert(threads % kChunks == 0 && tile_rows % kRowsAtOnce == 0);
    const int thread = opaque(static_cast<int>(threadIdx.x)), chunk = thread % kChunks;
    const uint32_t first = static_cast<uint32_t>(col) + chunk * kElements;
    int64_t corner[kRowsOfThread];  // of a row's window
    int y[kRowsOfThread], x[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
        const int64_t r = row + order(thread / kChunks + i * kRowsAtOnce);
        uint32_t pixel = static_cast<uint32_t>(r);
        const uint32_t image = m.pixels.take(pixel), line = m.row_pixels.take(pixel);
        y[i] =
            r < m.rows ? static_cast<int>(line) * m.stride_y - m.top : m.height;  // where no place is inside the image
        x[i] = static_cast<int>(pixel) * m.stride_x - m.left;
        corner[i] = image * m.image_stride + int64_t{y[i]} * m.strides.y + int64_t{x[i]} * m.strides.x;
    }
    uint4 found[kRowsOfThread];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        const KernelPlace at(m.kernel, first + e);
        const int down = static_cast<int>(at.y) * m.dilation_y, right = static_cast<int>(at.x) * m.dilation_x;
        const int offset = static_cast<int>(at.channel) * m.strides.channel + down * m.strides.y + right * m.strides.x;
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            const bool inside = first + e < m.cols &&
                                static_cast<uint32_t>(y[i] + down) < static_cast<uint32_t>(m.height) &&
                                static_cast<uint32_t>(x[i] + right) < static_cast<uint32_t>(m.width);
            reinterpret_cast<T*>(&found[i])[e] = inside ? m.data[corner[i] + offset] : from_float<T>(0.0f);
        }
    }
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i)
        *reinterpret_cast<uint4*>(tile + chunk_offset<row_bytes>(thread / kChunks + i * kRowsAtOnce, chunk)) = found[i];
}

// load_tile of tile.cuh for a weight.
template <int tile_rows, int row_bytes, int threads, typename T, typename Order>
__device__ __forceinline__ void load_tile(char* tile, const Filters<T>& m, int64_t row, int64_t col, Order order) {
    if (m.dense.whole) return load_tile<tile_rows, row_bytes, threads>(tile, m.dense, row, col, order);
    constexpr int kChunks = row_bytes / 16, kElements = 16 / sizeof(T), kRowsAtOnce = threads / kChunks;
    const int thread = opaque(static_cast<int>(threadIdx.x)), chunk = thread % kChunks;
    const uint32_t first = static_cast<uint32_t>(col) + chunk * kElements;
#pragma unroll 1
    for (int tile_row = thread / kChunks; tile_row < tile_rows; tile_row += kRowsAtOnce) {
        const int64_t r = row + order(tile_row);
        T* const to = reinterpret_cast<T*>(tile + chunk_offset<row_bytes>(tile_row, chunk));
#pragma unroll 1
        for (int e = 0; e < kElements; ++e) {
            const int64_t place = r * m.dense.row_stride + m.strides.offset(KernelPlace(m.kernel, first + e));
            to[e] = r < m.dense.rows && first + e < m.dense.cols ? m.dense.data[place] : from_float<T>(0.0f);
        }
    }
}

template <typename Element>
struct PerturbedConvolution {
    using T = Element;
    using X = Windows<T>;
    using Weight = Filters<T>;
    using Y = Images<T>;
    using Mask = FilterMask;
    template <Kind kind>
    using Source = AnyRank<kind>;
    static constexpr bool kGroups = true;

    __device__ __forceinline__ static X input(X x, int64_t shift, uint32_t group) {
        x.data += shift + group * x.group_stride;
        return x;
    }
    __device__ __forceinline__ static Weight weights(Weight weight, int64_t first, int64_t features) {
        weight.dense.data += first * weight.dense.row_stride;
        weight.dense.rows = features;
        return weight;
    }
};

template <typename T, Kind kind, bool pairs>
__global__ void __launch_bounds__(kThreads, 1) perturbed_conv2d_kernel(const Perturbed<PerturbedConvolution<T>> p) {
    perturbed_product<PerturbedConvolution<T>, kind, pairs>(p);
}

// tensors: y [C, B, O, H', W'], x [1 or C, B, I, H, W], weight, bias [1 or C, 1, O] or absent, sigma, mask uint8 as the
// weight or absent. numbers: those of conv.cuh, then the noise's rank, 0: full.
enum { kY, kX, kWeight, kBias, kSigma, kMask };
enum { kNoiseRank = kTileChannels + 1 };

template <typename T>
Filters<T> filters_of(const ulr_tensor& t, const Kernel& kernel) {
    Matrix<T> dense;
    dense.data = static_cast<const T*>(t.data);
    dense.rows = t.size[1], dense.cols = t.size[2] * t.size[3] * t.size[4];
    dense.row_stride = t.stride[1], dense.col_stride = 1;
    constexpr int64_t kElements = 16 / sizeof(T);
    dense.whole = (t.size[4] == 1 || t.stride[4] == 1) && (t.size[3] == 1 || t.stride[3] == t.size[4]) &&
                  (t.size[2] == 1 || t.stride[2] == t.size[3] * t.size[4]) && dense.row_stride % kElements == 0 &&
                  reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
    return {dense, strides_of(t), kernel};
}

template <typename T, bool pairs>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const int64_t* n = launch.numbers;
    const ulr_tensor &y = t[kY], &x = t[kX], &weight = t[kWeight];
    const Kernel kernel{Divisor(weight.size[3] * weight.size[4]), Divisor(weight.size[4])};
    const auto number = [&](int which) { return static_cast<int>(n[which]); };
    Perturbed<PerturbedConvolution<T>> p{
        noise,
        {static_cast<const T*>(x.data), y.size[1] * y.size[3] * y.size[4],
         weight.size[2] * weight.size[3] * weight.size[4], x.stride[1], weight.size[2] * x.stride[2], strides_of(x),
         static_cast<int>(x.size[3]), static_cast<int>(x.size[4]), number(kStrideY), number(kStrideX), number(kTop),
         number(kLeft), number(kDilationY), number(kDilationX), Divisor(y.size[3] * y.size[4]), Divisor(y.size[4]),
         kernel},
        filters_of<T>(weight, kernel),
        x.size[0] == 1 ? 0 : x.stride[0],
        PerFeature<T>(t[kBias]),
        t[kBias].size[0] == 1 ? 0 : t[kBias].stride[0],
        static_cast<const float*>(t[kSigma].data),
        {static_cast<const uint8_t*>(t[kMask].data), t[kMask].stride[1], strides_of(t[kMask]), kernel},
        Images<T>(y, 0),
        n[kNoiseRank],
        n[kNoiseRank] ? low_rank_scale(n[kNoiseRank]) : 0.0f,
        0,
        0,
        0,
        0,
        0};
    if (!fits(p.y.rows, x, weight)) return ULR_BAD_ARGUMENT;
    return launch_perturbed<pairs>(p, y.size[0], n[kGroups], launch, perturbed_conv2d_kernel<T, Kind::kQuantile, pairs>,
                                   perturbed_conv2d_kernel<T, Kind::kSigns, pairs>);
}

}  // namespace
}  // namespace ulr

extern "C" int ulr_cuda_perturbed_conv2d(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                         const ulr_launch* launch) {
    if (tensors[ulr::kY].size[1] == 0) return ULR_OK;  // no images
    return ulr::by_dtype(tensors[ulr::kX].dtype, [&](auto type) {
        using T = typename decltype(type)::T;
        return noise->antithetic ? ulr::run<T, true>(*noise, tensors, *launch)
                                 : ulr::run<T, false>(*noise, tensors, *launch);
    });
}

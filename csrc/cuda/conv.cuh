// A convolution as a product: its operands and output, with the same interface as a linear layer's (linear.cuh).
//
// Rows are the output's pixels (image, y, x), columns its channels. The inner axis goes through the kernel's taps, and
// within a tap through the input channels of a tile of output channels: all of them, or, with groups, those of the
// groups in the tile, where each column's weights outside its own group are zero.
#pragma once

#include "tile.cuh"

namespace ulr {

// Division of numbers below 2^31 by one that is known before the launch: a product and a shift.
struct Divisor {
    uint32_t value, factor, shift;

    explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)), factor(0), shift(0) {
        if (value <= 1) return;
        uint32_t bits = 0;
        while ((uint64_t{1} << bits) < value) ++bits;
        shift = bits - 1;
        factor = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + value - 1) / value);
    }
    __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
        return value == 1 ? n : static_cast<uint32_t>(uint64_t{n} * factor >> 32) >> shift;
    }
    // n becomes the remainder.
    __device__ __forceinline__ uint32_t take(uint32_t& n) const {
        const uint32_t q = quotient(n);
        n -= q * value;
        return q;
    }
};

// The ops' numbers, in this order. Tile channels: the largest number of input channels of a tile of output channels.
enum {
    kStrideY,
    kStrideX,
    kTop,
    kLeft,
    kDilationY,
    kDilationX,
    kGroups,
    kTransposed,
    kKernelY,
    kKernelX,
    kTileChannels,
    kSplits,  // the gradient's alone
};

// The numbers of the convolution that all operands use.
struct Window {
    int stride_y, stride_x, top, left, dilation_y, dilation_x;
    bool transposed;
    Divisor taps_x;    // kernel's width
    Divisor channels;  // input channels of a tap in the inner axis
    uint32_t taps;
    int group_inputs, group_outputs;

    Window(const int64_t* numbers, int64_t inputs, int64_t outputs)
        : stride_y(static_cast<int>(numbers[kStrideY])),
          stride_x(static_cast<int>(numbers[kStrideX])),
          top(static_cast<int>(numbers[kTop])),
          left(static_cast<int>(numbers[kLeft])),
          dilation_y(static_cast<int>(numbers[kDilationY])),
          dilation_x(static_cast<int>(numbers[kDilationX])),
          transposed(numbers[kTransposed] != 0),
          taps_x(numbers[kKernelX]),
          channels(numbers[kTileChannels]),
          taps(static_cast<uint32_t>(numbers[kKernelY] * numbers[kKernelX])),
          group_inputs(static_cast<int>(inputs / numbers[kGroups])),
          group_outputs(static_cast<int>(outputs / numbers[kGroups])) {}

    // The first input channel of a tile of output channels from `feature` on.
    __device__ __forceinline__ int first_channel(int64_t feature) const {
        return static_cast<int>(max(feature, int64_t{0})) / group_outputs * group_inputs;
    }
    uint32_t inner() const { return taps * channels.value; }
};

// A place of the inner axis.
struct Tap {
    int dy, dx;  // added to an output pixel's place in the input: kernel place x dilation - padding
    uint32_t ky, kx, channel;

    __device__ __forceinline__ Tap(const Window& window, uint32_t k) : channel(k) {
        kx = window.channels.take(channel);
        ky = window.taps_x.take(kx);
        dy = static_cast<int>(ky) * window.dilation_y - window.top;
        dx = static_cast<int>(kx) * window.dilation_x - window.left;
    }
};

// One copy's images as rows of patches: the input of each output pixel, tap by tap, channel by channel.
template <typename T>
struct Patches {
    using Element = T;
    const T* data;
    int64_t rows, cols;
    int64_t image_stride;
    int channel_stride, y_stride, x_stride;  // an image has fewer than 2^31 elements: see fits
    int channels, height, width;             // of the images, channels from `data` on
    Divisor pixels, row_pixels;              // of the output: an image's, a line's
    Window window;
    bool whole;  // 16-byte chunks can be copied as they are

    Patches(const ulr_tensor& t, const Window& window, int64_t out_height, int64_t out_width)
        : data(static_cast<const T*>(t.data)),
          rows(t.size[1] * out_height * out_width),
          cols(window.inner()),
          image_stride(t.stride[1]),
          channel_stride(static_cast<int>(t.stride[2])),
          y_stride(static_cast<int>(t.stride[3])),
          x_stride(static_cast<int>(t.stride[4])),
          channels(static_cast<int>(t.size[2])),
          height(static_cast<int>(t.size[3])),
          width(static_cast<int>(t.size[4])),
          pixels(out_height * out_width),
          row_pixels(out_width),
          window(window),
          whole(channel_stride == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0) {
        constexpr int64_t kElements = 16 / sizeof(T);
        for (const int64_t step : {t.size[0] > 1 ? t.stride[0] : 0, image_stride, t.stride[3], t.stride[4],
                                   int64_t{window.group_inputs}, int64_t{channels}})
            whole = whole && step % kElements == 0;
    }

    // The offset from `data` of output pixel `row`'s input pixel at a tap; -1: outside the image.
    __device__ __forceinline__ int64_t place(uint32_t row, const Tap& tap) const {
        const uint32_t image = pixels.take(row), line = row_pixels.take(row);
        int y = static_cast<int>(line), x = static_cast<int>(row);
        bool exists = true;
        if (window.transposed) {
            y -= tap.dy, x -= tap.dx;
            exists = y >= 0 && x >= 0 && y % window.stride_y == 0 && x % window.stride_x == 0;
            y /= window.stride_y, x /= window.stride_x;
        } else {
            y = y * window.stride_y + tap.dy, x = x * window.stride_x + tap.dx;
        }
        exists = exists && static_cast<uint32_t>(y) < static_cast<uint32_t>(height) &&
                 static_cast<uint32_t>(x) < static_cast<uint32_t>(width);
        return exists ? image * image_stride + y * y_stride + x * x_stride : -1;
    }
};

// The patches of one copy, from a tile's first channel on. It holds few numbers, so that the others stay in place.
template <typename T>
struct TilePatches {
    using Element = T;
    const Patches<T>& all;
    const T* data;
    int channels;
    int64_t cols;
};

// The weight as a row of factors for each output channel.
template <typename T>
struct Taps {
    using Element = T;
    const T* data;
    int64_t rows, cols;
    int output_stride, input_stride, y_stride, x_stride;  // a weight has fewer than 2^31 elements: see fits
    int first_channel, channels;                          // of the tile's inputs; all there are
    Window window;
    bool whole;  // 16-byte chunks can be copied as they are

    // [O, I / groups, kh, kw], or, transposed, [I, O / groups, kh, kw].
    Taps(const ulr_tensor& t, const Window& window, int64_t inputs, int64_t outputs)
        : data(static_cast<const T*>(t.data)),
          rows(outputs),
          cols(window.inner()),
          output_stride(static_cast<int>(t.stride[window.transposed ? 2 : 1])),
          input_stride(static_cast<int>(t.stride[window.transposed ? 1 : 2])),
          y_stride(static_cast<int>(t.stride[3])),
          x_stride(static_cast<int>(t.stride[4])),
          channels(static_cast<int>(inputs)),
          window(window),
          whole(input_stride == 1 && reinterpret_cast<uintptr_t>(t.data) % 16 == 0) {
        constexpr int64_t kElements = 16 / sizeof(T);
        for (const int step : {output_stride, y_stride, x_stride, window.group_inputs})
            whole = whole && step % kElements == 0;
    }

    // Whether an output channel has a weight for a channel of the inputs from `first_channel` on; `place`: its offset.
    __device__ __forceinline__ bool meets(int64_t output, int first_channel, const Tap& tap, int& place) const {
        const int group = static_cast<int>(output) / window.group_outputs;
        const int input = first_channel + static_cast<int>(tap.channel);
        if (input >= channels || input / window.group_inputs != group) return false;
        const int o = static_cast<int>(output) - (window.transposed ? group * window.group_outputs : 0);
        const int i = input - (window.transposed ? 0 : group * window.group_inputs);
        place = o * output_stride + i * input_stride + static_cast<int>(tap.ky) * y_stride +
                static_cast<int>(tap.kx) * x_stride;
        return true;
    }
};

// The weights of a tile's output channels, from the tile's first input channel on.
template <typename T>
struct TileTaps {
    using Element = T;
    const Taps<T>& all;
    int first_channel;
    int64_t cols;
};

// load_tile of tile.cuh for rows of patches. Whole chunks and single elements share the same code, so that the compiler
// holds the window's numbers in registers once.
template <int tile_rows, int row_bytes, int threads, typename T, typename Order>
__device__ __forceinline__ void load_tile(char* tile, const TilePatches<T>& m, int64_t row, int64_t col, Order order) {
    constexpr int kChunks = row_bytes / 16, kElements = 16 / sizeof(T), kRowsAtOnce = threads / kChunks;
    static_assert(threads % kChunks == 0);
    const int thread = opaque(static_cast<int>(threadIdx.x)), chunk = thread % kChunks;
    const int first = static_cast<int>(col) + chunk * kElements;
    if (first / 64 * 64 >= m.cols) return;
    const int step = m.all.whole ? kElements : 1;
#pragma unroll 1
    for (int tile_row = thread / kChunks; tile_row < tile_rows; tile_row += kRowsAtOnce) {
        const int64_t r = row + order(tile_row);
        char* const to = tile + chunk_offset<row_bytes>(tile_row, chunk);
#pragma unroll 1
        for (int i = 0; i < kElements; i += step) {
            const Tap tap(m.all.window, static_cast<uint32_t>(first + i));
            const int left = m.channels - static_cast<int>(tap.channel);
            const bool counts = r >= 0 && r < m.all.rows && first + i < m.cols && left > 0;
            const int64_t place = counts ? m.all.place(static_cast<uint32_t>(r), tap) : -1;
            const T* const from =
                place >= 0 ? m.data + place + static_cast<int>(tap.channel) * m.all.channel_stride : nullptr;
            if (m.all.whole)
                cp_async16(to, from != nullptr ? from : m.data, from != nullptr ? 16 : 0);
            else
                reinterpret_cast<T*>(to)[i] = from != nullptr ? *from : from_float<T>(0.0f);
        }
    }
}

// load_tile of tile.cuh for a convolution's weights.
template <int tile_rows, int row_bytes, int threads, typename T, typename Order>
__device__ __forceinline__ void load_tile(char* tile, const TileTaps<T>& m, int64_t row, int64_t col, Order order) {
    constexpr int kChunks = row_bytes / 16, kElements = 16 / sizeof(T), kRowsAtOnce = threads / kChunks;
    const int thread = opaque(static_cast<int>(threadIdx.x)), chunk = thread % kChunks;
    const int first = static_cast<int>(col) + chunk * kElements;
    if (first / 64 * 64 >= m.cols) return;
    const int step = m.all.whole ? kElements : 1;
#pragma unroll 1
    for (int tile_row = thread / kChunks; tile_row < tile_rows; tile_row += kRowsAtOnce) {
        const int64_t r = row + order(tile_row);
        char* const to = tile + chunk_offset<row_bytes>(tile_row, chunk);
#pragma unroll 1
        for (int i = 0; i < kElements; i += step) {
            int place = 0;
            const bool counts =
                r >= 0 && r < m.all.rows && first + i < m.cols &&
                m.all.meets(r, m.first_channel, Tap(m.all.window, static_cast<uint32_t>(first + i)), place);
            if (m.all.whole)
                cp_async16(to, m.all.data + (counts ? place : 0), counts ? 16 : 0);
            else
                reinterpret_cast<T*>(to)[i] = counts ? m.all.data[place] : from_float<T>(0.0f);
        }
    }
}

// The output [copies, images, O, H', W'], whose pixels follow one another in memory, as rows of channels.
template <typename T>
struct Images {
    using Element = T;
    T* data;
    int64_t rows, cols;
    int64_t copy_stride, image_stride, row_stride, col_stride;
    Divisor pixels;
    bool whole;  // each octet of columns of the whole noise lies inside or outside, and can be stored at once

    Images(const ulr_tensor& t, int64_t col_offset)
        : data(static_cast<T*>(t.data)),
          rows(t.size[1] * t.size[3] * t.size[4]),
          cols(t.size[2]),
          copy_stride(t.stride[0]),
          image_stride(t.stride[1]),
          row_stride(t.stride[4]),
          col_stride(t.stride[2]),
          pixels(t.size[3] * t.size[4]),
          whole(col_stride == 1 && row_stride == cols && cols % 8 == 0 && col_offset % 8 == 0 &&
                reinterpret_cast<uintptr_t>(t.data) % 16 == 0) {}

    __device__ __forceinline__ int64_t place(int64_t row) const {
        uint32_t pixel = static_cast<uint32_t>(row);
        const uint32_t image = pixels.take(pixel);
        return image * image_stride + pixel * row_stride;
    }
};

template <typename Element>
struct Convolution {
    using T = Element;
    using X = Patches<T>;
    using Weight = Taps<T>;
    using Y = Images<T>;
    static constexpr int kFeatures = 64;  // of a tile of the forward

    // The parts of a copy's input and of the weight for a tile of output channels from `first_feature` on.
    __device__ __forceinline__ static TilePatches<T> input(const X& x, int64_t shift, int64_t first_feature) {
        const int first = x.window.first_channel(first_feature);
        return {x, x.data + shift + first * x.channel_stride, x.channels - first, x.cols};
    }
    __device__ __forceinline__ static TileTaps<T> weights(const Weight& weight, int64_t first_feature) {
        return {weight, weight.window.first_channel(first_feature), weight.cols};
    }
};

// Whether 32 bits suffice for rows, and for places within an image and within a weight.
inline bool fits(int64_t rows, const ulr_tensor& x, const ulr_tensor& weight) {
    const auto reach = [](const ulr_tensor& t, int first_axis) {
        int64_t last = 0;
        for (int axis = first_axis; axis < ULR_IMAGE_AXES; ++axis) last += (t.size[axis] - 1) * t.stride[axis];
        return t.data == nullptr ? 0 : last;
    };
    constexpr int64_t kMost = int64_t{1} << 31;
    return rows < kMost && reach(x, 2) < kMost && reach(weight, 1) < kMost;
}

}  // namespace ulr

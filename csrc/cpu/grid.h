// Tensors [copies, a, columns, b, c] whose rows are (a, b, c); ops/_axes.py brings any tensor into this form.
#pragma once

#include "pass.h"

namespace ulr {
inline namespace ULR_ISA {

// Reads and writes blocks of rows x columns of one copy. In the caller's memory (scratch, values) a block's rows follow
// one another at `pitch`, a multiple of kLanes, whatever the tensor's strides.
class Grid {
  public:
    explicit Grid(const ulr_tensor& t) : t_(t) {}

    bool given() const { return t_.data != nullptr; }
    int64_t copies() const { return t_.size[0]; }
    int64_t rows() const { return t_.size[1] * t_.size[3] * t_.size[4]; }
    int64_t cols() const { return t_.size[2]; }
    // Whether the rows' last axis is the one to move along: neighbours in memory, as in channel-first tensors.
    bool along_rows() const { return t_.stride[2] != 1 && t_.size[2] > 1 && t_.stride[4] == 1; }

    // scratch[r][c] = element (row + r, col + c) as fp32.
    void load(int64_t copy, int64_t row, int64_t rows, int64_t col, int64_t cols, float* scratch, int64_t pitch) const {
        switch (t_.dtype) {
            case ULR_F32:
                return load_as<float>(copy, row, rows, col, cols, scratch, pitch);
            case ULR_BF16:
                return load_as<Bf16>(copy, row, rows, col, cols, scratch, pitch);
            default:
                return load_as<Half>(copy, row, rows, col, cols, scratch, pitch);
        }
    }

    // Element (row + r, col + c) = value(r, c), the lanes from column c on; `scratch` is used on the way.
    template <typename Value>
    void store(int64_t copy, int64_t row, int64_t rows, int64_t col, int64_t cols, float* scratch, int64_t pitch,
               Value value) const {
        switch (t_.dtype) {
            case ULR_F32:
                return store_as<float>(copy, row, rows, col, cols, scratch, pitch, value);
            case ULR_BF16:
                return store_as<Bf16>(copy, row, rows, col, cols, scratch, pitch, value);
            default:
                return store_as<Half>(copy, row, rows, col, cols, scratch, pitch, value);
        }
    }

  private:
    // body(p, r, n): rows r ... r + n - 1 of the block lie at p and then t_.stride[4] apart.
    template <typename T, typename Body>
    inline __attribute__((always_inline)) void runs(int64_t copy, int64_t row, int64_t rows, int64_t col,
                                                    Body body) const {
        T* first = static_cast<T*>(t_.data) + copy * t_.stride[0] + col * t_.stride[2];
        for (int64_t done = 0; done < rows;) {
            const int64_t c = (row + done) % t_.size[4], rest = (row + done) / t_.size[4];
            const int64_t n = std::min(t_.size[4] - c, rows - done);
            body(first + rest / t_.size[3] * t_.stride[1] + rest % t_.size[3] * t_.stride[3] + c * t_.stride[4], done,
                 n);
            done += n;
        }
    }

    template <typename T>
    void load_as(int64_t copy, int64_t row, int64_t rows, int64_t col, int64_t cols, float* scratch,
                 int64_t pitch) const {
        runs<T>(copy, row, rows, col, [&](const T* p, int64_t first, int64_t n) __attribute__((always_inline)) {
            float* to = scratch + first * pitch;
            if (!along_rows()) {
                for (int64_t r = 0; r < n; ++r)
                    by_lanes(cols, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
                        ULR_ISA::store(to + r * pitch + c,
                                       read(p + r * t_.stride[4] + c * t_.stride[2], t_.stride[2], lanes));
                    });
                return;
            }
            for (int64_t c = 0; c < cols; ++c)
                by_lanes(n, [&](int64_t r, int64_t lanes) __attribute__((always_inline)) {
                    float line[kLanes];
                    ULR_ISA::store(line, load_part(p + r + c * t_.stride[2], lanes));
                    for (int64_t i = 0; i < lanes; ++i) to[(r + i) * pitch + c] = line[i];
                });
        });
    }

    template <typename T, typename Value>
    void store_as(int64_t copy, int64_t row, int64_t rows, int64_t col, int64_t cols, float* scratch, int64_t pitch,
                  Value value) const {
        runs<T>(copy, row, rows, col, [&](T* p, int64_t first, int64_t n) __attribute__((always_inline)) {
            if (!along_rows()) {
                for (int64_t r = 0; r < n; ++r)
                    by_lanes(cols, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
                        write(p + r * t_.stride[4] + c * t_.stride[2], t_.stride[2], value(first + r, c), lanes);
                    });
                return;
            }
            for (int64_t r = 0; r < n; ++r)
                for (int64_t c = 0; c < cols; c += kLanes) ULR_ISA::store(scratch + r * pitch + c, value(first + r, c));
            for (int64_t c = 0; c < cols; ++c)
                by_lanes(n, [&](int64_t r, int64_t lanes) __attribute__((always_inline)) {
                    float line[kLanes] = {};
                    for (int64_t i = 0; i < lanes; ++i) line[i] = scratch[(r + i) * pitch + c];
                    store_part(p + r + c * t_.stride[2], ULR_ISA::load(line), lanes);
                });
        });
    }

    // n elements at any stride, and back.
    template <typename T>
    static F read(const T* from, int64_t stride, int64_t n) {
        if (stride == 1) return load_part(from, n);
        T line[kLanes] = {};
        for (int64_t i = 0; i < std::min<int64_t>(n, kLanes); ++i) line[i] = from[i * stride];
        return load_part(line, kLanes);
    }
    template <typename T>
    static void write(T* to, int64_t stride, F values, int64_t n) {
        if (stride == 1) return store_part(to, values, n);
        T line[kLanes];
        store_part(line, values, kLanes);
        for (int64_t i = 0; i < std::min<int64_t>(n, kLanes); ++i) to[i * stride] = line[i];
    }

    const ulr_tensor& t_;
};

}  // namespace ULR_ISA
}  // namespace ulr

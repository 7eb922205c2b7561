// Tensors [copies, a, columns, b, c] whose rows are (a, b, c); ops/_axes.py brings any tensor into this form.
#pragma once

#include "element.cuh"

namespace ulr {

template <typename T>
struct Grid {
    T* data;
    int64_t rows, cols;
    int64_t copies, copy_stride, col_stride;
    int64_t a_stride, b_stride, c_stride;
    uint32_t b_size, c_size;
    bool whole;       // each quad of columns of the whole noise lies inside or outside, and can be moved at once
    bool along_rows;  // neighbours in memory are rows, as in channel-first tensors

    Grid(const ulr_tensor& t, int64_t col_offset)
        : data(static_cast<T*>(t.data)),
          rows(t.size[1] * t.size[3] * t.size[4]),
          cols(t.size[2]),
          copies(t.size[0]),
          copy_stride(t.size[0] == 1 ? 0 : t.stride[0]),
          col_stride(t.stride[2]),
          a_stride(t.stride[1]),
          b_stride(t.stride[3]),
          c_stride(t.stride[4]),
          b_size(static_cast<uint32_t>(t.size[3])),
          c_size(static_cast<uint32_t>(t.size[4])),
          whole(col_stride == 1 && cols % 4 == 0 && col_offset % 4 == 0 && copy_stride % 4 == 0 && a_stride % 4 == 0 &&
                b_stride % 4 == 0 && c_stride % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0),
          along_rows(col_stride != 1 && c_stride == 1) {}
};

// Columns col ... col + 3 of a row, a quad of the whole noise. Missing ones are skipped.
template <typename T>
class GridQuad {
  public:
    __device__ __forceinline__ GridQuad(const Grid<T>& grid, uint32_t row, int64_t col) : grid_(grid) {
        const uint32_t c = row % grid.c_size, rest = row / grid.c_size;
        at_ = grid.data + rest / grid.b_size * grid.a_stride + rest % grid.b_size * grid.b_stride + c * grid.c_stride +
              col * grid.col_stride;
        first_ = static_cast<int>(max(-col, int64_t{0}));
        last_ = static_cast<int>(min(grid.cols - col, int64_t{4}));
    }

    __device__ __forceinline__ void load(float (&values)[4], int64_t copy) const {
        const T* from = at_ + copy * grid_.copy_stride;
        if (grid_.whole) {
            load4(values, from);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                values[i] = i >= first_ && i < last_ ? to_float(from[i * grid_.col_stride]) : 0.0f;
        }
    }

    __device__ __forceinline__ void store(int64_t copy, const float (&values)[4]) const {
        T* to = at_ + copy * grid_.copy_stride;
        if (grid_.whole) {
            store4(to, values);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (i >= first_ && i < last_) to[i * grid_.col_stride] = from_float<T>(values[i]);
        }
    }

  private:
    const Grid<T>& grid_;
    T* at_;
    int first_, last_;
};

// The quads of all rows, in an order in which neighbouring threads have neighbouring memory.
struct Quads {
    int64_t rows, quads;  // quads of a row
    int64_t first;        // in the whole noise
    int shift;            // columns of the first quad that lie before column 0
    bool along_rows;

    template <typename T>
    Quads(const Grid<T>& grid, int64_t col_offset)
        : rows(grid.rows),
          quads((col_offset % 4 + grid.cols + 3) / 4),
          first(col_offset / 4),
          shift(static_cast<int>(col_offset % 4)),
          along_rows(grid.along_rows) {}

    int64_t count() const { return rows * quads; }
    __device__ __forceinline__ uint32_t row(int64_t index) const {
        return static_cast<uint32_t>(along_rows ? index % rows : index / quads);
    }
    __device__ __forceinline__ uint32_t quad(int64_t index) const {
        return static_cast<uint32_t>(along_rows ? index / rows : index % quads);
    }
};

}  // namespace ulr

// noise: fills fp32 [1, rows, cols], packed rows of unit stride.
#include <algorithm>

#include "dispatch.h"
#include "parallel.h"
#include "pass.h"
#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {

constexpr int64_t kGrain = 8;  // tiles of a thread at a time: 2^14 values, enough to be worth waking it

int noise(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    const ulr_tensor& out = tensors[0];
    const int64_t rows = out.size[1], cols = out.size[2];
    if (!rows || !cols) return ULR_OK;
    auto* values = static_cast<float*>(out.data);
    const int64_t width = std::min(cols, kTileColumns);
    const int64_t height = std::min(rows, Tile::capacity(*spec, width));
    const int64_t across = (cols + width - 1) / width, down = (rows + height - 1) / height;
    parallel(where->threads, across * down, kGrain, [&](int64_t first, int64_t last) {
        Tile tile(*spec);
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = i / across * height, col = i % across * width;
            const Extent at{spec->draw, spec->row_offset + row,       spec->col_offset + col,
                            1,          std::min(height, rows - row), std::min(width, cols - col)};
            tile.use(at, [&](auto noise) __attribute__((always_inline)) {
                for (int64_t r = 0; r < at.rows; ++r) {
                    const auto eps = noise(0, r);
                    float* to = values + (row + r) * out.stride[1] + col;
                    by_lanes(at.cols, [&](int64_t c, int64_t n)
                                          __attribute__((always_inline)) { store_part(to + c, eps(c), n); });
                }
            });
        }
    });
    return ULR_OK;
}

}  // namespace ULR_ISA
}  // namespace ulr

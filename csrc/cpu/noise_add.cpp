// noise_add: y[c] = x[c] + sigma * eps_c.
#include <algorithm>

#include "dispatch.h"
#include "grid.h"
#include "parallel.h"
#include "tile.h"

namespace ulr {
inline namespace ULR_ISA {
namespace {

enum Argument {
    kY,      // [C, a, N, b, c]
    kX,      // likewise, or with one copy that all share
    kSigma,  // [1, 1, N], fp32
};

constexpr int64_t kChannelColumns = 32;    // of a tile of a channel-first tensor: few, so that its rows are many
constexpr int64_t kWorthWaking = 1 << 14;  // values that a thread should make at a time

}  // namespace

int noise_add(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    const Grid y(tensors[kY]), x(tensors[kX]);
    const int64_t rows = y.rows(), cols = y.cols(), copies = y.copies();
    if (!rows || !cols) return ULR_OK;
    const bool antithetic = spec->antithetic, shared = x.copies() == 1;
    const int64_t draws = antithetic ? copies / 2 : copies;
    const int64_t width = std::min(cols, y.along_rows() ? kChannelColumns : kTileColumns);
    const int64_t pitch = (width + kLanes - 1) / kLanes * kLanes;
    const int64_t fits = std::min(Tile::capacity(*spec, width), kTileFloats / pitch);
    const int64_t height = std::min(rows, fits), depth = std::min(draws, std::max<int64_t>(1, fits / height));
    const auto pieces = [](int64_t extent, int64_t size) { return (extent + size - 1) / size; };
    const int64_t across = pieces(cols, width), down = pieces(rows, height), deep = pieces(draws, depth);

    struct Unit {
        explicit Unit(const ulr_noise_spec& spec) : tile(spec) {}
        Tile tile;
        alignas(64) float sigma[kTileColumns + kLanes];
        alignas(64) float clean[kTileFloats + kLanes];
        alignas(64) float scratch[kTileFloats + kLanes];
    };
    const int64_t grain = kWorthWaking / (width * height * depth) + 1;
    parallel(where->threads, across * down * deep, grain, [&](int64_t first, int64_t last) {
        Unit unit(*spec);
        const U sign = set(0x80000000u);
        for (int64_t i = first; i < last; ++i) {
            // Draws change fastest, so that the copies' shared x stays in the cache.
            const int64_t draw = i % deep * depth, row = i / deep % down * height, col = i / deep / down * width;
            const int64_t m = std::min(height, rows - row), n = std::min(width, cols - col);
            const int64_t d_end = std::min(depth, draws - draw);
            load_sigma(tensors[kSigma], col, n, pitch, unit.sigma);
            unit.tile.make({spec->draw + draw, spec->row_offset + row, spec->col_offset + col, d_end, m, n});
            if (shared) x.load(0, row, m, col, n, unit.clean, pitch);
            for (int64_t d = 0; d < d_end; ++d) {
                for (int64_t half = 0; half <= (antithetic ? 1 : 0); ++half) {
                    const int64_t copy = draw + d + half * draws;
                    if (!shared) x.load(copy, row, m, col, n, unit.clean, pitch);
                    const U flip = half ? sign : set(0u);
                    y.store(copy, row, m, col, n, unit.scratch, pitch,
                            [&](int64_t r, int64_t c) __attribute__((always_inline)) {
                                const F eps = as_float(bits(load(unit.tile.row(d, r) + c)) ^ flip);
                                return fma(load(unit.sigma + c), eps, load(unit.clean + r * pitch + c));
                            });
                }
            }
        }
    });
    return ULR_OK;
}

}  // namespace ULR_ISA
}  // namespace ulr

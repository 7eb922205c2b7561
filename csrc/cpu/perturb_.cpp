// perturb_: t <- round(fma(scale, eps, t)) over a list of tensors.
#include "dispatch.h"
#include "parameters.h"
#include "pass.h"

namespace ulr {
inline namespace ULR_ISA {

enum PerturbTensor { kPerturbKeys, kScale, kPerturbFirst };

template <typename T>
void perturb_tiles(const ulr_noise_spec& spec, const Parameter& p, int64_t first, int64_t last, F scale,
                   bool stochastic) {
    ParameterNoise noise(spec, p);
    Rounding<T> rounding(spec, p, stochastic);
    // Memory is idle while noise is made, so the next tile is prefetched line by line while this one is written: all
    // at once would have to wait. A prefetch beyond the tensor's end does nothing.
    const bool ahead = side_by_side(p.tensors[0]);
    for (int64_t i = first; i < last; ++i) {
        const Extent tile = p.tile(i), at = p.whole(tile, spec.draw);
        rounding.make(at);
        noise.use(at, [&](auto row) __attribute__((always_inline)) {
            for (int64_t r = 0; r < tile.rows; ++r) {
                Columns<T> columns(p.tensors[0], tile.row + r, tile.col, tile.cols);
                T* to = columns.data();
                const auto eps = row(r);
                by_lanes(tile.cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                    if (ahead) __builtin_prefetch(to + c + kTileFloats, 1);
                    rounding.store(to + c, fma(scale, eps(c), load_part(to + c, n)), r, c, n);
                });
            }
        });
    }
}

int perturb_(const ulr_noise_spec* spec, const ulr_tensor* tensors, const ulr_launch* where) {
    const F scale = set(*static_cast<const float*>(tensors[kScale].data));
    const bool stochastic = where->numbers[kStochastic] != 0;
    const Parameters list(*spec, tensors + kPerturbFirst, 1, where->tensors - kPerturbFirst, where->numbers + kFirst);
    list.for_each(where->threads, [&](const Parameter& p, int64_t first, int64_t last) {
        with_elements(p.tensors->dtype, [&](auto element) {
            perturb_tiles<decltype(element)>(*spec, p, first, last, scale, stochastic);
        });
    });
    return ULR_OK;
}

}  // namespace ULR_ISA
}  // namespace ulr

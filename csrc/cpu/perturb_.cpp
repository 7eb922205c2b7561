// perturb_: t <- round(fma(scale, eps, t)) over a list of tensors.
#include "dispatch.h"
#include "parameters.h"
#include "pass.h"

namespace ulr {
inline namespace ULR_ISA {

enum PerturbTensor { kPerturbKeys, kScale, kPerturbFirst };

// The elements of a tile, while the one before it gets its noise.
template <typename T>
void prefetch(const ulr_tensor& t, const Extent& tile) {
    for (int64_t r = 0; r < tile.rows; ++r)
        prefetch_bytes(at<T>(t, tile.row + r, 0, 0) + tile.col, tile.cols * static_cast<int64_t>(sizeof(T)));
}

template <typename T>
void perturb_tiles(const ulr_noise_spec& spec, const Parameter& p, int64_t first, int64_t last, F scale,
                   bool stochastic) {
    ParameterNoise noise(spec, p);
    Rounding<T> rounding(spec, p, stochastic);
    // Signs are made faster than memory answers. Other noise takes longer, and there prefetching costs a fifth.
    const bool ahead = spec.dist == ULR_RADEMACHER && side_by_side(p.tensors[0]);
    for (int64_t i = first; i < last; ++i) {
        const Extent tile = p.tile(i), at = p.whole(tile, spec.draw);
        if (ahead && i + 1 < last) prefetch<T>(p.tensors[0], p.tile(i + 1));
        noise.make(at);
        rounding.make(at);
        for (int64_t r = 0; r < tile.rows; ++r) {
            Columns<T> columns(p.tensors[0], tile.row + r, tile.col, tile.cols);
            T* to = columns.data();
            const float* eps = noise.row(r);
            by_lanes(tile.cols, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                rounding.store(to + c, fma(scale, load(eps + c), load_part(to + c, n)), r, c, n);
            });
        }
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

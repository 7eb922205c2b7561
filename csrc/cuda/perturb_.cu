// perturb_: t <- round(fma(scale, eps, t)) over a list of tensors.
#include "parameters.cuh"

namespace ulr {
namespace {

struct Perturb {
    ListNoise how;
    const float* scale;
    ParameterTable<1> table;
};

template <Kind kind, bool low_rank>
__global__ void __launch_bounds__(kListThreads, kind == Kind::kSigns && !low_rank ? 4 : 0)
    perturb_kernel(const __grid_constant__ Perturb p) {
    const float scale = *p.scale;
    const uint32_t draw = static_cast<uint32_t>(p.how.noise.draw);
    for_each_unit<kind, low_rank>(
        p.table, p.how,
        [&](const auto& noise, auto& eps, uint32_t group, uint32_t octet) { noise.make(eps, group, octet, draw); },
        [&](const auto&, const RowOctet&, float (&values)[8], const float (&eps)[8]) {
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] = fmaf(scale, eps[i], values[i]);
        });
}

template <bool low_rank>
int launch_perturb(Perturb p, const ulr_tensor* tensors, const ulr_launch& launch, int first) {
    const auto kernel = kind_of(p.how.noise) == Kind::kSigns ? perturb_kernel<Kind::kSigns, low_rank>
                                                             : perturb_kernel<Kind::kQuantile, low_rank>;
    return for_each_table<1, low_rank>(tensors + first, 1, launch.tensors - first, launch.numbers + kFirst,
                                       [&](const ParameterTable<1>& table, int64_t blocks) {
                                           p.table = table;
                                           return launch_kernel(kernel, blocks, dim3(kListThreads), 0, launch, p);
                                       });
}

}  // namespace
}  // namespace ulr

// tensors: keys (one for each tensor), scale [], and the list, each as [rows, a, b, c, columns].
extern "C" int ulr_cuda_perturb_(const ulr_noise_spec* noise, const ulr_tensor* tensors, const ulr_launch* launch) {
    using namespace ulr;
    enum { kKeys, kScale, kList };
    Perturb p{};
    p.how = list_noise(*noise, *launch);
    p.scale = static_cast<const float*>(tensors[kScale].data);
    if (const int code = launch_perturb<false>(p, tensors, *launch, kList)) return code;
    return p.how.rank ? launch_perturb<true>(p, tensors, *launch, kList) : ULR_OK;
}

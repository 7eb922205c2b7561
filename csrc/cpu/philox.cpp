// philox4x32 and fold_in: the primitives below the noise. Small inputs; one at a time is fast enough.
#include "ulr/philox.h"

#include "dispatch.h"

// counter [1, M, 4] and key [1, 1, 2], int64 that hold words; out [1, M, 4].
ULR_EXPORT int ulr_cpu_philox4x32(const ulr_noise_spec*, const ulr_tensor* tensors, const ulr_launch*) {
    const ulr_tensor &out = tensors[0], &counter = tensors[1], &key = tensors[2];
    const auto* in = static_cast<const int64_t*>(counter.data);
    const auto* words = static_cast<const int64_t*>(key.data);
    auto* result = static_cast<int64_t*>(out.data);
    const auto low = static_cast<uint64_t>(words[0]), high = static_cast<uint64_t>(words[key.stride[2]]);
    const ulr::KeySchedule schedule(static_cast<int64_t>(low | high << 32));
    for (int64_t i = 0; i < out.size[1]; ++i) {
        ulr::Words w;
        for (int j = 0; j < 4; ++j) w.w[j] = static_cast<uint32_t>(in[i * counter.stride[1] + j * counter.stride[2]]);
        w = ulr::philox4x32(w, schedule);
        for (int j = 0; j < 4; ++j) result[i * out.stride[1] + j * out.stride[2]] = w.w[j];
    }
    return ULR_OK;
}

// key and data, int64, with out's sizes (stride 0 where they broadcast); out: up to three axes.
ULR_EXPORT int ulr_cpu_fold_in(const ulr_noise_spec*, const ulr_tensor* tensors, const ulr_launch*) {
    const ulr_tensor &out = tensors[0], &key = tensors[1], &data = tensors[2];
    const auto at = [](const ulr_tensor& t, int64_t i, int64_t j, int64_t k) {
        return static_cast<int64_t*>(t.data) + i * t.stride[0] + j * t.stride[1] + k * t.stride[2];
    };
    for (int64_t i = 0; i < out.size[0]; ++i)
        for (int64_t j = 0; j < out.size[1]; ++j)
            for (int64_t k = 0; k < out.size[2]; ++k)
                *at(out, i, j, k) = ulr::fold_in(*at(key, i, j, k), *at(data, i, j, k));
    return ULR_OK;
}

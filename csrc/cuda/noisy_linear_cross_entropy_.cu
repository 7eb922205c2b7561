// A classifier's head is an MLP of one layer: the same launch (noisy_mlp_step.cu).
#include "ulr/api.h"

extern "C" int ulr_cuda_noisy_mlp_step(const ulr_noise_spec*, const ulr_tensor*, const ulr_launch*);

extern "C" int ulr_cuda_noisy_linear_cross_entropy_(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                                    const ulr_launch* launch) {
    return ulr_cuda_noisy_mlp_step(noise, tensors, launch);
}

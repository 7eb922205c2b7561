// Sums over orthogonal draws (docs/noise.md): the sum of w[c] eps(draw + c) over a block of `size` draws, the first one
// a multiple of `size`, is eps of the first draw times entry slot % size of the Walsh-Hadamard transform of w.
#pragma once

#include "ulr/api.h"

namespace ulr {

// Transforms the weights [1, copies, samples] of each sample into `sums`, contiguous fp32 [blocks, samples, size], in
// one launch. Nothing where `sums` is absent.
int launch_walsh_sums(const ulr_noise_spec& noise, const ulr_tensor& weights, const ulr_tensor& sums,
                      const ulr_launch& launch);

}  // namespace ulr

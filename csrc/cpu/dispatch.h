// Declarations of dispatch.cpp for the rest of the library.
#pragma once

#include "ulr/api.h"

#define ULR_EXPORT extern "C" __attribute__((visibility("default")))

// The launchers that exist once per instruction set, as ulr::<set>::<name>.
#define ULR_CPU_LAUNCHERS(X, set) \
    X(set, combine_)              \
    X(set, low_rank_linear)       \
    X(set, noise)                 \
    X(set, noise_add)             \
    X(set, noise_dot)             \
    X(set, noise_score)           \
    X(set, noisy_channels)        \
    X(set, noisy_linear)          \
    X(set, noisy_mlp)             \
    X(set, perturb_)              \
    X(set, perturbed_linear)      \
    X(set, perturbed_weight)

// Chooses the form of a kernel for a call: the type of its elements and the kind of its noise, as constants.
#pragma once

#include "noise.cuh"

namespace ulr {

template <typename Element>
struct Type {
    using T = Element;
};

// run(Type<T>{}) for the elements of a dtype.
template <typename Run>
int by_dtype(int dtype, Run run) {
    switch (dtype) {
        case ULR_F32:
            return run(Type<float>{});
        case ULR_BF16:
            return run(Type<__nv_bfloat16>{});
        case ULR_F16:
            return run(Type<__half>{});
        default:
            return ULR_BAD_ARGUMENT;
    }
}

// run(k), where k.value is the kind of noise.
template <typename Run>
int by_kind(const ulr_noise_spec& noise, Run run) {
    switch (kind_of(noise)) {
        case Kind::kQuantile:
            return run(std::integral_constant<Kind, Kind::kQuantile>{});
        case Kind::kSobol:
            return run(std::integral_constant<Kind, Kind::kSobol>{});
        default:
            return run(std::integral_constant<Kind, Kind::kSigns>{});
    }
}

}  // namespace ulr

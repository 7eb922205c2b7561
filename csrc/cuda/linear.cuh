// A linear layer's operands and output.
#pragma once

#include "tile.cuh"

namespace ulr {

template <typename Element>
struct Linear {
    using T = Element;
    using X = Matrix<T>;
    using Weight = Matrix<T>;
    using Y = Output<T>;
    static constexpr int kFeatures = 128;  // of a tile of the forward

    // The parts of a copy's input and of the weight for a tile of features: every feature sums over all inputs.
    __device__ __forceinline__ static Matrix<T> input(X x, int64_t shift, int64_t) {
        x.data += shift;
        return x;
    }
    __device__ __forceinline__ static const Matrix<T>& weights(const Weight& weight, int64_t) { return weight; }
};

}  // namespace ulr

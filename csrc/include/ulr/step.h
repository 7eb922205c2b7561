// The step of combine_ from a sum of noise: its numbers, in the order of roundings of docs/noise.md.
#pragma once

#include <math.h>

#include "ulr/api.h"
#include "ulr/distributions.h"

namespace ulr {
inline namespace ULR_ISA {

enum class Rule { kSum, kMomentum, kAdam };

// The integers of the two ops on lists; rank 0 is full rank. After kFirst come kTensorNumbers for each tensor, whose
// own rank is 0 where it is no matrix.
enum StepNumber { kStochastic, kRule, kWeightDecay, kMomentumFactor, kBeta1, kBeta2, kEpsilon, kListRank, kFirst };
enum TensorNumber { kRowOffset, kColOffset, kRank, kWidth, kTensorNumbers };

constexpr int64_t kRoundingStream = 3;  // folded into a parameter's key; 1 and 2 are the factors of low-rank noise
constexpr int64_t kRowFactorStream = 1, kColFactorStream = 2;

struct StepNumbers {
    float decay, rate;                         // both negative: their products are added
    float momentum, beta1, beta2, new1, new2;  // new: 1 - beta
    float root, epsilon;
};

// base^exponent by squaring, from the lowest bit of the exponent up.
ULR_HD float power(float base, int64_t exponent) {
    float result = 1.0f;
    for (; exponent > 0; exponent >>= 1) {
        if (exponent & 1) result *= base;
        base *= base;
    }
    return result;
}

// `lr` and `step` may be NULL.
ULR_HD StepNumbers step_numbers(const int64_t* numbers, const float* lr, const int64_t* step) {
    const float rate = lr ? *lr : 0.0f;
    StepNumbers n;
    n.decay = -(rate * number_of(numbers[kWeightDecay]));
    n.rate = -rate;
    n.momentum = number_of(numbers[kMomentumFactor]);
    n.beta1 = number_of(numbers[kBeta1]);
    n.beta2 = number_of(numbers[kBeta2]);
    n.new1 = 1.0f - n.beta1;
    n.new2 = 1.0f - n.beta2;
    n.root = 1.0f;
    n.epsilon = number_of(numbers[kEpsilon]);
    if (static_cast<Rule>(numbers[kRule]) == Rule::kAdam) {
        n.rate = -(rate / (1.0f - power(n.beta1, *step)));
        n.root = sqrtf(1.0f - power(n.beta2, *step));
    }
    return n;
}

// 1 / sqrt(rank).
inline float low_rank_scale(int64_t rank) { return static_cast<float>(1.0 / sqrt(static_cast<double>(rank))); }

}  // namespace ULR_ISA
}  // namespace ulr

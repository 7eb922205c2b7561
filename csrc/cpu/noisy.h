// What the passes over the noise of noisy layers take: noisy_linear.cpp where a row's columns lie side by side,
// noisy_channels.cpp where a channel's pixels do.
#pragma once

#include <stdint.h>

namespace ulr {

// Copies are given as draws: [D, R, N]. With antithetic noise each draw has a second copy, with the noise negated, in
// tensors of its own (kMinus...). Whichever tensors are absent is not computed.
enum NoisyArgument {
    kY,
    kMinusY,
    kBase,  // the clean product and bias, in y's dtype or fp32; [1, R, N] where the draws share it; may be y itself
    kMinusBase,        // absent: the draws' second copies share kBase
    kSigma,            // [N], fp32
    kLossWeight,       // [D, R / positions], fp32
    kMinusLossWeight,  // likewise
    kScores,           // fp32 loss_weight * score / sigma; [1, R, N]: summed over all copies, else [D, R, N]
    kMinusScores,      // the second copies', where they are not summed
    kBiasSums,         // fp32 [N] += loss_weight * score / sigma, summed over copies and rows
    kLogSigmaSums,     // fp32 [N] += loss_weight * (eps * score - 1), likewise
};

constexpr int64_t kWorthWaking = 1 << 14;  // values that a thread should make at a time

}  // namespace ulr

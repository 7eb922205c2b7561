// Arguments of the passes over the noise of noisy layers: noisy_linear.cpp, for contiguous columns of a row, and
// noisy_channels.cpp, for contiguous pixels of a channel.
#pragma once

#include <stdint.h>

namespace ulr {

// Copies are given as draws: [D, R, N]. With antithetic noise each draw has a second copy, with the noise negated, in
// tensors of its own (kMinus...). Absent tensors are not computed.
enum NoisyArgument {
    kY,
    kMinusY,
    kBase,  // the clean product and bias, in y's dtype or fp32; [1, R, N] where the draws share it; may be y itself
    kMinusBase,        // absent: the second copies of draws share kBase
    kSigma,            // [N], fp32
    kLossWeight,       // fp32 [D, weights]; each is that of R / weights rows, which follow one another
    kMinusLossWeight,  // likewise
    kScores,           // fp32 loss_weight * score / sigma; [1, R, N]: summed over all copies, else [D, R, N]
    kMinusScores,      // the second copies', where they are not summed
    kBiasSums,         // fp32 [N] += loss_weight * score / sigma, summed over copies and rows
    kLogSigmaSums,     // fp32 [N] += loss_weight * (eps * score - 1), likewise
};

constexpr int64_t kWorthWaking = 1 << 14;  // values that a thread should make at a time

}  // namespace ulr

// Names of the numbers of noisy_mlp_step.
#pragma once

namespace ulr {

constexpr int kMostLayers = 64;

// In the order of ulr_kernels/ops/_losses.py.
enum class Activation { kRelu, kTanh, kSigmoid, kStep };
enum class Loss { kCrossEntropy, kSquared, kZeroOne };
constexpr int kIgnored = -100;  // the class of rows whose cross-entropy is 0

}  // namespace ulr

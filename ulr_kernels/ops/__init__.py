"""The ops. One file each: schema, check (which is also the fake), reference, cost.

`noisy_*` add noise to a layer's outputs, `perturbed_*` to its weights.
"""

from ulr_kernels.ops.combine_ import combine_
from ulr_kernels.ops.foreach_noisy_linear_grad_ import foreach_noisy_linear_grad_
from ulr_kernels.ops.noise import fold_in, noise, noise_like, philox4x32
from ulr_kernels.ops.noise_add import noise_add
from ulr_kernels.ops.noise_dot import noise_dot
from ulr_kernels.ops.noise_score import noise_score
from ulr_kernels.ops.noisy_conv2d import noisy_conv2d
from ulr_kernels.ops.noisy_conv2d_grad_ import noisy_conv2d_grad_
from ulr_kernels.ops.noisy_conv2d_recompute_ import noisy_conv2d_recompute_
from ulr_kernels.ops.noisy_linear import noisy_linear
from ulr_kernels.ops.noisy_linear_grad_ import noisy_linear_grad_
from ulr_kernels.ops.noisy_linear_recompute_ import noisy_linear_recompute_
from ulr_kernels.ops.noisy_mlp_step import noisy_mlp_step
from ulr_kernels.ops.perturb_ import perturb_
from ulr_kernels.ops.perturbed_conv2d import perturbed_conv2d
from ulr_kernels.ops.perturbed_embedding import perturbed_embedding
from ulr_kernels.ops.perturbed_linear import perturbed_linear
from ulr_kernels.ops.scale_shift_grad_ import scale_shift_grad_

__all__ = [
    "combine_",
    "fold_in",
    "noise",
    "noise_add",
    "scale_shift_grad_",
    "noise_like",
    "noise_dot",
    "noise_score",
    "noisy_conv2d",
    "noisy_conv2d_grad_",
    "noisy_conv2d_recompute_",
    "noisy_linear",
    "noisy_linear_grad_",
    "foreach_noisy_linear_grad_",
    "noisy_linear_recompute_",
    "noisy_mlp_step",
    "perturb_",
    "perturbed_conv2d",
    "perturbed_embedding",
    "perturbed_linear",
    "philox4x32",
]

"""The cuda back end: what its launchers (csrc/cuda) are handed for each op, and when they can run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ulr_kernels.backends import _native

NEEDED = (8, 0)  # compute capability: cp.async and the mma.sync shapes of the kernels
FEATURES_OF_A_BLOCK = 32  # kGradFeatures in csrc/cuda/gradient.cuh

# The noise and the tensors of a launch, in the order of the enum beside the launcher. The tensors are kept, not just
# their addresses: some are made here.
Arguments = tuple[tuple | None, tuple[Tensor | None, ...]]


def _philox4x32(out: Tensor, counter: Tensor, key: Tensor) -> Arguments:
    return None, (out.view(-1, 4), counter.reshape(-1, 4), key)


def _fold_in(out: Tensor, key: Tensor, data: Tensor) -> Arguments:
    shape = out.shape if out.dim() <= 3 else (out.numel(),)
    return None, tuple(t.expand(out.shape).reshape(shape) for t in (out, key, data))


def _noise(out: Tensor, key: Tensor, shape: list[int], dist: str, sampler: str, positions: int, *at: int) -> Arguments:
    cols = shape[-1] if shape else 1
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + cols)
    return spec, (out.view(-1, cols) if out.numel() else out.view(0, 0),)


def _noisy_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    copies: int,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    width = at[-1] + y.shape[-1]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=width, antithetic=antithetic)
    return spec, (y, x, weight, bias, sigma)


def _partials(grad_log_sigma: Tensor | None, features: int) -> Tensor | None:
    """Where blocks leave their parts of a grad_log_sigma that is one number, to be added in a fixed order."""
    if grad_log_sigma is None or grad_log_sigma.dim():
        return None
    blocks = features // FEATURES_OF_A_BLOCK + 2  # offsets may cut the first and the last one
    return torch.empty(blocks, dtype=torch.float32, device=grad_log_sigma.device)


def _noisy_linear_grad_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    buffer = grad_weight if grad_weight is not None else grad_bias
    assert buffer is not None  # the op's check has seen to it
    features = buffer.shape[0]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + features, antithetic=antithetic)
    partials = _partials(grad_log_sigma, features)
    return spec, (grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, partials)


def _noisy_linear_replay_(
    y: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_weight: Tensor,
    *rest,
) -> Arguments:
    spec, gradient = _noisy_linear_grad_(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, *rest)
    *buffers, _, _, sigma, partials = gradient
    return spec, (y, *buffers, x, weight, bias, loss_weight, sigma, partials)


ARGUMENTS: dict[str, Callable[..., Arguments]] = {
    "philox4x32": _philox4x32,
    "fold_in": _fold_in,
    "noise": _noise,
    "noisy_linear": _noisy_linear,
    "noisy_linear_grad_": _noisy_linear_grad_,
    "noisy_linear_replay_": _noisy_linear_replay_,
}


def provider(op: str, device: str) -> Callable | str:
    """The function that runs `op` on `device`, or the sentence that says why there is none."""
    if device != "cuda":
        return "it runs on a CUDA device"
    library = _native.library("cuda")
    if isinstance(library, str):
        return library
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
    capability = torch.cuda.get_device_capability()
    if capability < NEEDED:
        return f"it needs compute capability {NEEDED[0]}.{NEEDED[1]}, this device has {capability[0]}.{capability[1]}"
    if op not in ARGUMENTS:
        return "it has no kernel for this op"
    launcher, arguments = _native.launcher("cuda", op), ARGUMENTS[op]

    def run(*args) -> None:
        spec, tensors = arguments(*args)
        views = tuple(None if t is None else _native.view(t) for t in tensors)
        where = next(t for t in tensors if t is not None).device
        launcher(spec, views, 1, where.index, torch.cuda.current_stream(where).cuda_stream)

    return run

"""The right result of each op, in fp64 and as plain as its definition: shared with no implementation.

Only the noise is taken from the contract, whose own tests pin it down. Each function returns, per output, the value and
its magnitude: the sum of the absolute values of the terms that make it, from which rounding errors are bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels import noise_contract


def noise(shape, key, *, draw=0, col_offset=0, device=None, **spec):
    """The block of noise that `ulr.noise` is asked for."""
    shape = (shape,) if isinstance(shape, int) else shape
    rows, cols = torch.Size(shape[:-1]).numel(), (shape[-1] if len(shape) else 1)
    key = torch.tensor(noise_contract.signed64(key)) if isinstance(key, int) else key.cpu()
    eps = noise_contract.noise_grid(rows, cols, torch.tensor([draw]), key, col_offset=col_offset, **spec)
    return eps.view(shape)


def signed_noise(copies, rows, cols, key, antithetic, draw, **spec) -> Tensor:
    """fp64 `[C, R, N]`: copy c uses draw + c, or, antithetic, draw + c mod C/2, negated in the second half."""
    period = copies // 2 if antithetic else copies
    eps = [noise((rows, cols), key, draw=draw + c % period, **spec) for c in range(copies)]
    return torch.stack([e if c < period else -e for c, e in enumerate(eps)]).double()


def per_copy(x: Tensor, copies: int) -> Tensor:
    x = x.cpu().double()
    return x if x.dim() == 3 else x.expand(copies, *x.shape)


def noisy_linear(x, weight, bias, sigma, key, *, copies=1, antithetic=False, draw=0, **spec):
    rows, features = x.shape[-2], weight.shape[0]
    eps = signed_noise(copies, rows, features, key, antithetic, draw, **spec)
    sigma = torch.as_tensor(sigma).cpu().double()
    weight, bias = weight.cpu().double(), (torch.zeros(features) if bias is None else bias.cpu()).double()
    x = per_copy(x, copies)
    y = x @ weight.T + bias + sigma * eps
    return [(y, x.abs() @ weight.T.abs() + bias.abs() + (sigma * eps).abs())]


def noisy_linear_grad_(
    grad_weight,
    grad_bias,
    x,
    loss_weight,
    sigma,
    key,
    *,
    antithetic=False,
    draw=0,
    dist="normal",
    positions=1,
    grad_log_sigma=None,
    **spec,
):
    copies, rows = loss_weight.shape[0], x.shape[-2]
    features = grad_weight.shape[0] if grad_weight is not None else grad_bias.shape[0]
    eps = signed_noise(copies, rows, features, key, antithetic, draw, dist=dist, positions=positions, **spec)
    score = eps if dist != "laplace" else torch.copysign(torch.tensor(2.0).double().sqrt(), eps)
    sigma = torch.as_tensor(sigma).cpu().double()
    loss = loss_weight.cpu().double().repeat_interleave(positions, 1)[:, :, None]
    s = loss * score / sigma
    x = per_copy(x, copies)

    def added(buffer, value, magnitude):
        before = buffer.cpu().double()
        return before + value, before.abs() + magnitude

    results = []
    if grad_weight is not None:
        product, magnitude = (torch.einsum("crn,crk->nk", a, b) for a, b in ((s, x), (s.abs(), x.abs())))
        results.append(added(grad_weight, product, magnitude))
    if grad_bias is not None:
        results.append(added(grad_bias, s.sum((0, 1)), s.abs().sum((0, 1))))
    if grad_log_sigma is not None:
        t = loss * (eps * score - 1)
        over = (0, 1) if grad_log_sigma.dim() else (0, 1, 2)
        results.append(added(grad_log_sigma, t.sum(over), t.abs().sum(over)))
    return results


def noisy_linear_recompute_(grad_weight, grad_bias, x, weight, bias, loss_weight, sigma, key, **kwargs):
    forward = {k: v for k, v in kwargs.items() if k != "grad_log_sigma"}
    y = noisy_linear(x, weight, bias, sigma, key, copies=loss_weight.shape[0], **forward)
    return y + noisy_linear_grad_(grad_weight, grad_bias, x, loss_weight, sigma, key, **kwargs)


def tolerance(value: Tensor, magnitude: Tensor, dtype: torch.dtype, inputs: torch.dtype, terms: int) -> Tensor:
    """The rounding error allowed: fp32 sums of `terms` terms in any order, operands rounded once to `inputs` where that
    is a half type, and the result rounded twice to its `dtype`."""
    single = torch.finfo(torch.float32).eps
    half = torch.finfo(inputs).eps if inputs != torch.float32 else 0.0
    return 2 * torch.finfo(dtype).eps * value.abs() + (half + single * (terms + 8)) * magnitude + 1e-30


# --- parameters ------------------------------------------------------------------------------------------------------


def parameter_noise(shape, key, rank, row_offset=0, col_offset=0, **spec) -> Tensor:
    """fp64, of a parameter's shape: rows shape[0], columns the rest; E = A B^T / sqrt(r) where it is a matrix."""
    rows, cols = (shape[0], torch.Size(shape[1:]).numel()) if len(shape) > 1 else (1, torch.Size(shape).numel())
    if rank is None or len(shape) < 2:
        at = {"row_offset": row_offset, "col_offset": col_offset, "positions": noise_contract.ALL_ROWS}
        return noise((rows, cols), key, **at, **spec).double().view(shape)
    spec.pop("width", None)
    a = noise((rank, rows), noise_contract.fold_in(key, 1), col_offset=row_offset, **spec).double()
    b = noise((rank, cols), noise_contract.fold_in(key, 2), col_offset=col_offset, **spec).double()
    return (a.T @ b / rank**0.5).view(shape)


def combined_noise(tensors, keys, coefficients, *, draw=0, rank=None, row_offset=(), col_offset=(), width=(), **spec):
    """For each tensor sum_p c_p eps(draw + p), fp64, and the sum of its terms' absolute values."""
    for i, tensor in enumerate(tensors):
        value, magnitude = torch.zeros(2, *tensor.shape, dtype=torch.float64).unbind()
        places = {"row_offset": row_offset, "col_offset": col_offset, "width": width}
        at = {name: numbers[i] if numbers else 0 for name, numbers in places.items()}
        for p, c in enumerate(coefficients):
            term = float(c) * parameter_noise(tensor.shape, int(keys[i]), rank, draw=draw + p, **at, **spec)
            value, magnitude = value + term, magnitude + term.abs()
        yield value, magnitude

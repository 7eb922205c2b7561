"""How well the estimated gradient points along the true one, layer by layer, next to what theory says.

For one sample with d noise coordinates in a layer and M effective copies (the copies, or half of them where
antithetic), the cosine is close to (1 + (d + 1) / M)^(-1/2). Over a batch the errors of the samples are independent
while their gradients partly agree. With the coherence k = |sum of the gradients|^2 / sum of |gradient|^2 that makes it
(1 + (d + 1) / (M k))^(-1/2). This holds for layer-wise injection; under joint injection the noise of the other layers
adds to the error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ulr_kernels import contract
from ulr_kernels.estimators import ULR
from ulr_kernels.recipes.settings import Settings

_NOISE = contract.site_id("ulr_kernels.recipes.cosines")  # keeps this noise apart from the training's
_ROWS_AT_ONCE = 8  # gradients per row are as large as the model

Loss = Callable[[Tensor, Tensor], Tensor]


def measure(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Loss, settings: Settings, draw: int) -> dict[str, dict]:
    """Figures of each linear layer on one batch. Leaves the model's gradients empty, all else as it was.

    Args:
        x, y: a batch.
        loss_fn: one loss per row.
        settings: whose estimator is measured.
        draw: numbers the measurement; each has noise of its own.

    Returns:
        By the layer's name: `cosine` (measured), `law` (for this batch), `law_per_sample`, `coherence`, `coordinates`,
        `copies`; the laws for layer-wise injection only.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model.eval()
    model.zero_grad()
    seed = contract.fold_in(contract.fold_in(settings.seed, _NOISE), draw)
    ULR(model, seed=seed, **settings.estimator).backward(x, y, loss_fn)
    estimates = {name: _flat_gradient(layer) for name, layer in layers.items()}
    model.zero_grad()
    loss_fn(model(x), y).mean().backward()
    truths = {name: _flat_gradient(layer) for name, layer in layers.items()}
    model.zero_grad()
    squares = _sum_of_squares_per_row(model, x, y, loss_fn)
    figures = {}
    for name, layer in layers.items():
        truth, estimate = truths[name], estimates[name]
        parts = [part for part in squares if part.rpartition(".")[0] == name]
        coherence = (len(x) * truth.norm()).square() / sum(squares[part] for part in parts)
        copies = settings.copies if isinstance(settings.copies, int) else settings.copies[name]
        figures[name] = {
            "cosine": nn.functional.cosine_similarity(truth, estimate, dim=0).item(),
            "coherence": coherence.item(),
            "coordinates": layer.out_features,
            "copies": copies,
        }
        if settings.injection == "layerwise":
            figures[name]["law"] = law(layer.out_features, copies, settings.antithetic, coherence.item())
            figures[name]["law_per_sample"] = law(layer.out_features, copies, settings.antithetic)
    return figures


def law(coordinates: int, copies: int, antithetic: bool, coherence: float = 1.0) -> float:
    """The cosine that theory expects of a layer; `coherence` 1 is a single sample."""
    effective = copies / 2 if antithetic else copies
    return (1 + (coordinates + 1) / (effective * coherence)) ** -0.5 if coherence > 0 else 0.0


def _flat_gradient(layer: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in layer.parameters(recurse=False) if p.grad is not None])


def _sum_of_squares_per_row(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Loss) -> dict[str, Tensor]:
    """By parameter: the sum over the rows of the squared norm of that row's own gradient."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of_row(values: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        return loss_fn(functional_call(model, values, (row[None],)), target[None]).sum()

    def squares(row: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {name: g.square().sum() for name, g in grad(loss_of_row)(parameters, row, target).items()}

    return {name: rows.sum() for name, rows in vmap(squares, chunk_size=_ROWS_AT_ONCE)(x, y).items()}

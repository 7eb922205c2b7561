"""What autograd says about a model's layers on one batch, and the cosine that it predicts for the estimator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels.estimators.batch import Batch, LossFunction, apply, repeat
from ulr_kernels.estimators.evaluation import evaluation
from ulr_kernels.estimators.meeting import Meeting
from ulr_kernels.estimators.ulr import ULR
from ulr_kernels.nn.call import Call

# E[score^2] and E[score^2 eps^2]; E[eps^2] and E[score eps] are 1.
MOMENTS = {"normal": (1.0, 3.0), "laplace": (2.0, 2.0), "rademacher": (1.0, 1.0)}
EXACT, PROBES = 64, 16  # coordinates of a sample up to which the Jacobian is computed; random directions beyond


class Watch(Meeting):
    """Keeps each call of a trained layer with its output, for autograd."""

    def __init__(self, layers: Mapping[int, str], parameters: Iterable[Tensor], inputs: Any) -> None:
        super().__init__(layers, parameters, inputs)
        self.calls: list[tuple[str, Call, Tensor]] = []

    def met(self, call: Call) -> tuple[Tensor, int]:
        output = call.clean()
        layer = self.trained_layer(call)
        if layer is not None:
            self.calls.append((layer, call, output))
        return output, 0


class Terms(NamedTuple):
    """Of one sample and one layer, with g the gradient of its outputs and J the Jacobian of these in the parameters.

    Attributes:
        g: |g|^2.
        j: |J|^2, Frobenius's norm.
        projected: |J^T g|^2.
        diagonal: sum over the outputs of g_j^2 |J_j|^2.
    """

    g: float
    j: float
    projected: float
    diagonal: float


class Truth:
    """Autograd of the clean mean loss: gradients by layer, and what the law needs from each call.

    Args:
        estimator: one that has looked at such a batch.

    Attributes:
        parameters: the trained parameters of each layer, by its name, in the order of the calls; then those with noise.
        calls: of each layer with noise on outputs, with the gradient of the output; empty where autograd has none.
        gradients: of each layer, fp64, flat; only where there is one.
        losses: of the samples.
    """

    def __init__(self, estimator: ULR, x: Any, y: Any, loss_fn: LossFunction) -> None:
        self.samples = Batch(x, y).samples
        self.parameters: dict[str, list[Tensor]] = {}
        self.calls: dict[str, list[tuple[Call, Tensor]]] = {}
        self.gradients: dict[str, Tensor] = {}
        inputs = repeat(x, 1)
        watch = Watch(estimator.layers, estimator.followed, inputs)
        with evaluation(estimator.model), torch.enable_grad():
            with watch:
                outputs = apply(estimator.model, inputs)
            losses = loss_fn(outputs, repeat(y, 1))
        self.losses = losses.detach().double()
        for name, call, _ in watch.calls:
            known = self.parameters.setdefault(name, [])
            known += [p for p in call.parameters if p.requires_grad and not any(p is other for other in known)]
        for parameter in estimator.weights.values():
            self.parameters.setdefault(estimator.layers[id(parameter)], []).append(parameter)
        if not losses.requires_grad:
            return
        flat = [p for parameters in self.parameters.values() for p in parameters]
        # The graphs behind tensors that are computed from parameters are needed again.
        of = [out for *_, out in watch.calls] + flat
        found = torch.autograd.grad(losses.mean(), of, allow_unused=True, retain_graph=True)
        for (name, call, output), gradient in zip(watch.calls, found, strict=False):
            gradient = torch.zeros_like(output) if gradient is None else gradient
            self.calls.setdefault(name, []).append((call, gradient))
        of_parameters = iter(found[len(watch.calls) :])
        for name, parameters in self.parameters.items():
            gradients = [next(of_parameters) for _ in parameters]
            if all(g is not None and torch.isfinite(g).all() for g in gradients) and any(g.any() for g in gradients):
                self.gradients[name] = torch.cat([g.flatten().double() for g in gradients])

    def loss_change(self, name: str) -> Tensor:
        """|g|^2 of each sample."""
        squares = (gradient.double().square().reshape(self.samples, -1).sum(1) for _, gradient in self.calls[name])
        return torch.stack(list(squares)).sum(0)

    def terms(self, name: str) -> Iterator[Terms]:
        """Of each sample."""
        signs = torch.Generator("cpu").manual_seed(0)
        for sample in range(self.samples):
            outputs, gradients = [], []
            for call, gradient in self.calls[name]:
                outputs.append(call.local(sample, self.samples))
                gradients.append(gradient.unflatten(0, (self.samples, -1))[sample])
            yield self._terms(outputs, gradients, self.parameters[name], signs)

    @staticmethod
    def _terms(
        outputs: list[Tensor], gradients: list[Tensor], parameters: list[Tensor], signs: torch.Generator
    ) -> Terms:
        def square(*directions: Tensor) -> float:
            """|J^T direction|^2."""
            found = torch.autograd.grad(outputs, parameters, directions, retain_graph=True, allow_unused=True)
            return sum(float(part.double().square().sum()) for part in found if part is not None)

        def signed() -> list[Tensor]:
            return [(torch.randint(2, g.shape, generator=signs, device="cpu") * 2.0 - 1).to(g) for g in gradients]

        g = sum(float(gradient.double().square().sum()) for gradient in gradients)
        projected = square(*gradients)
        if sum(gradient.numel() for gradient in gradients) <= EXACT:
            j = diagonal = 0.0
            for which, gradient in enumerate(gradients):
                for index in range(gradient.numel()):
                    unit = [torch.zeros_like(other, memory_format=torch.contiguous_format) for other in gradients]
                    unit[which].view(-1)[index] = 1
                    of_unit = square(*unit)
                    j += of_unit
                    diagonal += of_unit * float(gradient.reshape(-1)[index]) ** 2
            return Terms(g, j, projected, diagonal)
        probes = [signed() for _ in range(PROBES)]  # E[|J^T u|^2] = |J|^2 for random signs u
        j = sum(square(*probe) for probe in probes) / PROBES
        weighed = [[u * gradient for u, gradient in zip(probe, gradients, strict=True)] for probe in probes]
        return Terms(g, j, projected, sum(square(*each) for each in weighed) / PROBES)


def law(estimator: ULR, name: str, truth: Truth) -> float:
    """The cosine for small sigma, from the output gradients g and Jacobians J of the layer.

    One direction's estimate is (g . eps) J^T score, whose variance, for independent coordinates with the moments
    s = E[score^2] and m = E[score^2 eps^2], is s |g|^2 |J|^2 + |J^T g|^2 + (m - s - 2) sum_j g_j^2 |J_j|^2. Noise on
    outputs is each sample's own; on weights it is all samples', and J the identity.
    """
    settings, sigma = estimator.settings, estimator.sigma(estimator.riders.get(name, name))
    s, m = MOMENTS[settings.dist]
    copies = settings.copies_of(name)
    directions = copies / 2 if settings.antithetic else float(copies)
    if not settings.antithetic and settings.baseline == "mean" and copies > 1:
        directions -= 1  # one is spent on the mean
    centred = settings.antithetic or (settings.baseline != "none" and not (settings.baseline == "mean" and copies == 1))
    gradient = float(truth.gradients[name].square().sum())
    if settings.noise_of(name) == "weights":
        terms = iter([Terms(gradient, truth.gradients[name].numel(), gradient, gradient)])
        losses = truth.losses.mean(0, keepdim=True)
    else:
        terms, losses = truth.terms(name), truth.losses / truth.samples
    others = _of_others(estimator, name, truth, losses)
    variance = 0.0
    for here, elsewhere, loss in zip(terms, others.tolist(), losses.tolist(), strict=True):
        variance += (
            s * (here.g + elsewhere / _mean_square(sigma)) * here.j + here.projected + (m - s - 2) * here.diagonal
        )
        if not centred:
            variance += s * loss**2 * here.j / _mean_square(sigma)
    return (1 + variance / (directions * gradient)) ** -0.5


def _of_others(estimator: ULR, name: str, truth: Truth, losses: Tensor) -> Tensor:
    """The variance of each loss by the noise of other layers in the same pass."""
    result = torch.zeros_like(losses)
    if estimator.settings.injection != "joint":
        return result
    for other in truth.parameters:
        if other not in (name, estimator.riders.get(name)) and other not in estimator.riders:
            of_weights = estimator.settings.noise_of(other) == "weights"
            change = truth.gradients[other].square().sum() if of_weights else truth.loss_change(other)
            result += _mean_square(estimator.sigma(other)) * change
    return result


def _mean_square(sigma: float | Tensor) -> float:
    return float(torch.as_tensor(sigma).square().mean())

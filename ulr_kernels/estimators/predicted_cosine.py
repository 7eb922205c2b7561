"""Autograd's gradients of a model's layers on one batch, and the cosine that they predict for the estimator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels.estimators.ulr import ULR
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.nn.batch import Batch, LossFunction, repeat
from ulr_kernels.nn.call import Call, leaves_of
from ulr_kernels.nn.eval_mode import eval_mode
from ulr_kernels.nn.interceptor import LayerInterceptor
from ulr_kernels.nn.module_state import ModuleState

# E[score^2] and E[score^2 eps^2]; E[eps^2] and E[score eps] are 1.
MOMENTS = {"normal": (1.0, 3.0), "laplace": (2.0, 2.0), "rademacher": (1.0, 1.0)}
EXACT = 64  # coordinates of a sample up to which its Jacobian is computed
PROBES = 256  # random directions beyond: in all samples together, since their sum is what counts


class CallRecorder(LayerInterceptor):
    """Keeps each call of a trained layer with its output, for autograd."""

    keeps_graphs = True

    def __init__(self, view: ModelView, inputs: Any) -> None:
        super().__init__(view.layers, view.followed, inputs)
        self.calls: list[tuple[str, Call, Tensor]] = []

    def on_layer_call(self, call: Call) -> tuple[Tensor, int]:
        output = call.clean()
        layer = self.trained_layer(call)
        if layer is not None:
            self.calls.append((layer, call, output))
        return output, 0


class Terms(NamedTuple):
    """Numbers of one sample in one layer, with g the gradient of its outputs and J their Jacobian in the parameters."""

    g: float  # |g|^2
    j: float  # |J|^2, Frobenius's norm
    projected: float  # |J^T g|^2
    diagonal: float  # sum over the outputs of g_j^2 |J_j|^2


class AutogradReference:
    """Autograd of the mean loss without noise: gradients by layer, and those of each call's output.

    Args:
        view: of the model.

    Attributes:
        parameters: the trained parameters of each layer, by its name, in the order of the calls; then those with noise.
        calls: of each layer with noise on outputs, with the output's gradient; empty where autograd has none.
        gradients: of each layer, fp64, flat; only where there is one.
        losses: of the samples.
        loss_parameters: the trained parameters of the loss that are not the model's.
    """

    def __init__(self, view: ModelView, x: Any, y: Any, loss_fn: LossFunction) -> None:
        self.samples = Batch(x, y).samples
        self.parameters: dict[str, list[Tensor]] = {}
        self.calls: dict[str, list[tuple[Call, Tensor]]] = {}
        self.gradients: dict[str, Tensor] = {}
        inputs = repeat(x, 1)
        recorder = CallRecorder(view, inputs)
        with eval_mode(view.model), torch.enable_grad():
            state = ModuleState(view.model)
            outputs = recorder.run(view.model, inputs, state)
            losses = loss_fn(outputs, repeat(y, 1))
            state.restore()
        self.losses = losses.detach().double()
        self.loss_parameters = list({id(p): p for p in leaves_of(losses) if id(p) not in view.names}.values())
        for name, call, _ in recorder.calls:
            known = self.parameters.setdefault(name, [])
            known += [p for p in call.parameters if p.requires_grad and not any(p is other for other in known)]
        for name, layer in view.noised_layers.items():
            self.parameters.setdefault(layer, []).append(view.noised[name])
        if not losses.requires_grad:
            return
        flat = [p for parameters in self.parameters.values() for p in parameters]
        # `of_sample` needs the graphs from tensors computed from parameters again.
        of = [out for *_, out in recorder.calls] + flat
        found = torch.autograd.grad(losses.mean(), of, allow_unused=True, retain_graph=True)
        for (name, call, output), gradient in zip(recorder.calls, found, strict=False):
            gradient = torch.zeros_like(output) if gradient is None else gradient
            self.calls.setdefault(name, []).append((call, gradient))
        of_parameters = iter(found[len(recorder.calls) :])
        for name, parameters in self.parameters.items():
            gradients = [next(of_parameters) for _ in parameters]
            if all(g is not None and torch.isfinite(g).all() for g in gradients) and any(g.any() for g in gradients):
                self.gradients[name] = torch.cat([g.flatten().double() for g in gradients])

    def coordinates(self, name: str) -> int:
        """The numbers of noise of a sample in a call of a layer, or of a layer's weights."""
        if name in self.calls:
            return self.calls[name][0][1].numel() // self.samples
        return self.gradients[name].numel()

    def loss_change(self, name: str) -> Tensor:
        """|g|^2 of each sample."""
        squares = (gradient.double().square().reshape(self.samples, -1).sum(1) for _, gradient in self.calls[name])
        return torch.stack(list(squares)).sum(0)

    def terms(self, name: str) -> Iterator[Terms]:
        """The terms of each sample."""
        signs = torch.Generator("cpu").manual_seed(0)
        probes = max(2, -(-PROBES // self.samples))
        for sample in range(self.samples):
            outputs, gradients = [], []
            for call, gradient in self.calls[name]:
                outputs.append(call.of_sample(sample, self.samples))
                gradients.append(gradient.unflatten(0, (self.samples, -1))[sample])
            yield self._terms(outputs, gradients, self.parameters[name], probes, signs)

    @staticmethod
    def _terms(
        outputs: list[Tensor],
        gradients: list[Tensor],
        parameters: list[Tensor],
        probes: int,
        signs: torch.Generator,
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
        directions = [signed() for _ in range(probes)]  # E[|J^T u|^2] = |J|^2 for random signs u
        j = sum(square(*each) for each in directions) / probes
        weighed = [[u * gradient for u, gradient in zip(each, gradients, strict=True)] for each in directions]
        return Terms(g, j, projected, sum(square(*each) for each in weighed) / probes)


def predicted_cosine(estimator: ULR, shared_noise: Mapping[str, str], name: str, reference: AutogradReference) -> float:
    """The cosine of an estimate and the gradient for small sigma, from a layer's output gradients g and Jacobians J.

    One direction's estimate is (g . eps) J^T score, whose variance, for independent coordinates with the moments
    s = E[score^2] and m = E[score^2 eps^2], is s |g|^2 |J|^2 + |J^T g|^2 + (m - s - 2) sum_j g_j^2 |J_j|^2. Noise on
    outputs is each sample's own; on weights it is all samples', and J the identity.
    """
    settings, sigma = estimator.settings, estimator.sigma(shared_noise.get(name, name))
    s, m = MOMENTS[settings.dist]
    copies = settings.copies_of(name)
    directions = copies / 2 if settings.antithetic else float(copies)
    if not settings.antithetic and settings.baseline == "mean" and copies > 1:
        directions -= 1  # one is spent on the mean
    centred = settings.antithetic or (settings.baseline != "none" and not (settings.baseline == "mean" and copies == 1))
    gradient = float(reference.gradients[name].square().sum())
    if settings.noise_of(name) == "weights":
        terms = iter([Terms(gradient, reference.gradients[name].numel(), gradient, gradient)])
        losses = reference.losses.mean(0, keepdim=True)
    else:
        terms, losses = reference.terms(name), reference.losses / reference.samples
    others = _of_others(estimator, shared_noise, name, reference, losses)
    variance = 0.0
    for here, elsewhere, loss in zip(terms, others.tolist(), losses.tolist(), strict=True):
        variance += (
            s * (here.g + elsewhere / _mean_square(sigma)) * here.j + here.projected + (m - s - 2) * here.diagonal
        )
        if not centred:
            variance += s * loss**2 * here.j / _mean_square(sigma)
    noises = sum(len(reference.calls.get(o, (1,))) for o in reference.parameters if _same_pass(estimator, name, o))
    if settings.sampler_of(noises) == "hadamard":  # coordinates of one slot, modulo the directions, are not orthogonal
        units = reference.coordinates(name)
        variance *= max(0.0, units - directions) / max(1, units - 1)
    return (1 + variance / (directions * gradient)) ** -0.5


def _of_others(
    estimator: ULR, shared_noise: Mapping[str, str], name: str, reference: AutogradReference, losses: Tensor
) -> Tensor:
    """The variance of each loss by the noise of other layers in the same pass."""
    result = torch.zeros_like(losses)
    for other in reference.parameters:
        own = other in (name, shared_noise.get(name)) or other in shared_noise
        if not own and _same_pass(estimator, name, other):
            of_weights = estimator.settings.noise_of(other) == "weights"
            change = reference.gradients[other].square().sum() if of_weights else reference.loss_change(other)
            result += _mean_square(estimator.sigma(other)) * change
    return result


def _same_pass(estimator: ULR, layer: str, other: str) -> bool:
    """Whether one pass has the noise of both layers."""
    settings, modules = estimator.settings, estimator.view.recurrent
    if settings.injection == "joint" or layer == other:
        return True
    same_module = layer in modules and modules[layer] == modules.get(other)
    on_weights = settings.noise_of(layer) == settings.noise_of(other) == "weights"
    return same_module and on_weights and settings.copies_of(layer) == settings.copies_of(other)


def _mean_square(sigma: float | Tensor) -> float:
    return float(torch.as_tensor(sigma).square().mean())

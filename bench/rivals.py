"""The rivals: the same results by other means.

The layer-wise likelihood ratio method as its authors' public code runs it (arXiv 2305.08960): the batch is repeated at
the network's input, the noise of the noised layer is drawn at the size of its output, negated for the second half, kept
until the loss is known, and contracted with the kept, repeated input by einsum; each copy's loss is taken relative to
that of a clean pass. Their gradient of the noise scale is left out here, as the rows compute none.

A tensor of one row per copy and sample has copy c of the whole batch contiguous: row c * batch + sample.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulr_kernels import products

PACKAGES = {"torcheggroll": "torcheggroll", "eggroll-es": "eggroll", "EvoX": "evox"}  # rival -> its module


def installed(module: str) -> bool:
    """Whether a package is there (`make bench` installs all); what needs it is left out otherwise."""
    return importlib.util.find_spec(module) is not None


Loss = Callable[[Tensor, Tensor], Tensor]  # outputs, targets -> one loss per row


def generator(device: torch.device | str) -> torch.Generator:
    """A generator of the rivals' own, so that torch's global one is left alone."""
    return torch.Generator(device).manual_seed(0)


def randn_like(like: Tensor, rows: int, source: torch.Generator) -> Tensor:
    return torch.randn(rows, like.shape[-1], generator=source, device=like.device, dtype=like.dtype)


def antithetic_randn(like: Tensor, source: torch.Generator) -> Tensor:
    """Noise of `like`'s shape; the second half of the rows is the first, negated."""
    half = randn_like(like, like.shape[0] // 2, source)
    return torch.cat([half, -half])


# --- forward ---------------------------------------------------------------------------------------------------------


class RivalAbsent(RuntimeError):
    """This machine cannot run the rival; the message says why."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The noiseless product by oneDNN, the fastest kernel that torch carries on a CPU with AVX-512.

    Raises:
        RivalAbsent: oneDNN has no product of this dtype here, as bf16 on a CPU without AVX-512.
    """
    if not products.supports(x.dtype):
        raise RivalAbsent(f"oneDNN multiplies no {str(x.dtype).removeprefix('torch.')} on this CPU")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def repeat_input(x: Tensor, weight: Tensor, bias: Tensor, sigma: float, copies: int, source: torch.Generator) -> Tensor:
    """One product over the repeated batch, then noise: `[C, R, N]`."""
    clean = F.linear(x.repeat(copies, 1), weight, bias)
    return (clean + sigma * randn_like(clean, clean.shape[0], source)).view(copies, x.shape[0], -1)


def repeat_product(
    x: Tensor, weight: Tensor, bias: Tensor, sigma: float, copies: int, source: torch.Generator
) -> Tensor:
    """One product over the batch, repeated afterwards, then noise: `[C, R, N]`."""
    clean = F.linear(x, weight, bias)
    return clean + sigma * randn_like(clean, copies * x.shape[0], source).view(copies, x.shape[0], -1)


def compilable(x: Tensor, weight: Tensor, bias: Tensor, sigma: float, copies: int) -> Tensor:
    """`repeat_product` in the form that torch.compile fuses best: a generator object would break its graph."""
    clean = F.linear(x, weight, bias)
    return clean + sigma * torch.randn(copies, *clean.shape, device=x.device, dtype=x.dtype)


def perturbed(weight: Tensor, sigma: float, source: torch.Generator) -> Tensor:
    """A perturbed copy of a weight, from which the rivals of the perturbed ops compute."""
    return weight + sigma * torch.randn(weight.shape, generator=source, device=weight.device, dtype=weight.dtype)


def fitness(y: Tensor) -> Tensor:
    """One number for each member of a population from its outputs `[P, R, N]`."""
    return y.flatten(1).square().mean(1)


# --- gradient --------------------------------------------------------------------------------------------------------


def authors_gradient(repeated: Tensor, eps: Tensor, loss_weight: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The einsum over the repeated batch `[C * R, K]` with the kept noise `[C * R, N]`: weight, bias."""
    loss = loss_weight.reshape(-1, 1)
    weight = torch.einsum("ni,nj->ji", repeated * loss, eps) / sigma
    bias = torch.einsum("ni,nj->j", loss, eps) / sigma
    return weight, bias


def reduced_gradient(x: Tensor, eps: Tensor, loss_weight: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The kept noise, summed over copies first, then one product with the unrepeated batch `[R, K]`."""
    weighted = (loss_weight.unsqueeze(-1) * eps.view(*loss_weight.shape, -1)).sum(0) / sigma
    return weighted.T @ x, weighted.sum(0)


def paired_gradient(x: Tensor, half: Tensor, loss_weight: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """`reduced_gradient` by someone who keeps only the first half `[C / 2 * R, N]` of the antithetic noise."""
    first, second = loss_weight.chunk(2)
    return reduced_gradient(x, half, first - second, sigma)


# --- convolution -----------------------------------------------------------------------------------------------------


def conv_noise(like: Tensor, last: bool, source: torch.Generator) -> Tensor:
    """Noise of `like`'s shape, channels last where `last` is set."""
    noise = torch.empty_like(like, memory_format=torch.channels_last if last else torch.contiguous_format)
    return noise.normal_(generator=source)


def repeat_conv_input(x: Tensor, weight: Tensor, bias: Tensor, sigma: float, copies: int, source) -> Tensor:
    """One convolution of the repeated batch, then noise: `[C * B, O, H, W]`."""
    clean = F.conv2d(x.repeat(copies, 1, 1, 1), weight, bias, padding=1)
    last = clean.is_contiguous(memory_format=torch.channels_last)
    return clean + sigma * conv_noise(clean, last, source)


def repeat_conv_product(x: Tensor, weight: Tensor, bias: Tensor, sigma: float, copies: int, source) -> Tensor:
    """One convolution of the batch, repeated afterwards, then noise: `[C * B, O, H, W]`."""
    clean = F.conv2d(x, weight, bias, padding=1).repeat(copies, 1, 1, 1)
    last = clean.is_contiguous(memory_format=torch.channels_last)
    return clean + sigma * conv_noise(clean, last, source)


def _conv_weight_gradient(x: Tensor, by_output: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.Size((by_output.shape[1], x.shape[1], 3, 3))
    return torch.nn.grad.conv2d_weight(x, shape, by_output, padding=1), by_output.sum((0, 2, 3))


def repeated_conv_gradient(repeated: Tensor, eps: Tensor, loss_weight: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The weight's gradient of the repeated batch with the kept noise in place of the output's: weight, bias."""
    return _conv_weight_gradient(repeated, eps * (loss_weight.reshape(-1, 1, 1, 1) / sigma))


def reduced_conv_gradient(x: Tensor, eps: Tensor, loss_weight: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The kept noise, summed over copies first, then one product with the unrepeated batch."""
    weighted = (loss_weight[..., None, None, None] * eps.unflatten(0, loss_weight.shape)).sum(0) / sigma
    return _conv_weight_gradient(x, weighted)


def paired_conv_gradient(x: Tensor, half: Tensor, loss_weight: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """`reduced_conv_gradient` by someone who keeps only the first half of the antithetic noise."""
    first, second = loss_weight.chunk(2)
    return reduced_conv_gradient(x, half, first - second, sigma)


# --- a whole step ----------------------------------------------------------------------------------------------------


class NoisyLinear(nn.Linear):
    """A linear layer that keeps its input and its noise until its gradient is computed."""

    def noised(self, x: Tensor, sigma: float, source: torch.Generator) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        self.kept = x, antithetic_randn(out, source)
        return out + sigma * self.kept[1]

    def collect(self, loss: Tensor, sigma: float) -> None:
        """Gradients of the mean loss from `loss` `[C * R]`, one per row of what was kept."""
        x, eps = self.kept
        del self.kept
        self.weight.grad, self.bias.grad = authors_gradient(x, eps, loss / loss.numel(), sigma)


def mlp(sizes: tuple[int, ...], linear: type[nn.Linear] = nn.Linear, seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between; the same parameters for the same seed, whatever the class of the layers."""
    source = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        with torch.random.fork_rng(devices=[]):
            layer = linear(inputs, outputs)
        for parameter in layer.parameters():
            bound = 1 / math.sqrt(inputs)
            nn.init.uniform_(parameter, -bound, bound, generator=source)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class NoisyConv2d(nn.Conv2d):
    """A 3 x 3 convolution that does the same."""

    def noised(self, x: Tensor, sigma: float, source: torch.Generator) -> Tensor:
        out = F.conv2d(x, self.weight, self.bias, padding=1)
        half = conv_noise(out[: len(out) // 2], out.is_contiguous(memory_format=torch.channels_last), source)
        self.kept = x, torch.cat([half, -half])
        return out + sigma * self.kept[1]

    def collect(self, loss: Tensor, sigma: float) -> None:
        x, eps = self.kept
        del self.kept
        self.weight.grad, self.bias.grad = repeated_conv_gradient(x, eps, loss / loss.numel(), sigma)


def as_noisy(model: nn.Sequential) -> nn.Sequential:
    """A copy of a model whose layers keep what they need."""
    model = copy.deepcopy(model)
    for module in model:
        module.__class__ = {nn.Linear: NoisyLinear, nn.Conv2d: NoisyConv2d}.get(type(module), type(module))
    return model


@torch.no_grad()
def authors_step(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    loss_fn: Loss,
    sigma: float,
    copies: int | Sequence[int],
    source: torch.Generator,
    at_once: int | None = None,
) -> Tensor:
    """Gradients of every noisy layer of the model, one noised pass of the whole network for each; the clean loss.

    `copies`: of every layer, or layer by layer; `at_once`: how many of them the network is given at a time.
    """
    clean = loss_fn(model(x), y)
    layers = [module for module in model if isinstance(module, NoisyLinear | NoisyConv2d)]
    for layer, count in zip(layers, [copies] * len(layers) if isinstance(copies, int) else copies, strict=True):
        gradients = []
        for chunk in range(0, count, at_once or count):
            repeats = min(at_once or count, count - chunk)
            h = x.repeat(repeats, *(1 for _ in x.shape[1:]))
            for module in model:
                h = layer.noised(h, sigma, source) if module is layer else module(h)
            layer.collect(loss_fn(h, y.repeat(repeats)) - clean.repeat(repeats), sigma)
            gradients.append([p.grad * (repeats / count) for p in layer.parameters()])
        for parameter, *parts in zip(layer.parameters(), *gradients, strict=True):
            parameter.grad = sum(parts)
    return clean.mean()


def plain_step(parameters: Sequence[Tensor], x: Tensor, y: Tensor, sigma: float, copies: int) -> list[Tensor]:
    """Gradients of the MLP of these weights and biases, in turn, by someone who takes care: a layer's clean product is
    made once, the copies begin with its noise, which is summed over them before the gradient's product. A function that
    torch.compile takes whole."""
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    inputs, h = [x], x
    for weight, bias in layers:
        h = F.linear(h, weight, bias)
        inputs.append(h.relu())
    clean = F.cross_entropy(h, y, reduction="none")
    gradients = []
    for number, (weight, bias) in enumerate(layers):
        y_clean = F.linear(inputs[number], weight, bias)
        half = torch.randn(copies // 2, *y_clean.shape, device=x.device, dtype=x.dtype)
        eps = torch.cat([half, -half])
        h = y_clean + sigma * eps
        for later in layers[number + 1 :]:
            h = F.linear(h.relu(), *later)
        losses = F.cross_entropy(h.flatten(0, 1), y.repeat(copies), reduction="none").view(copies, -1)
        scores = (((losses - clean) / losses.numel()).unsqueeze(-1) * eps).sum(0) / sigma
        gradients += [scores.T @ inputs[number], scores.sum(0)]
    return gradients


def backprop_step(model: nn.Sequential, x: Tensor, y: Tensor, loss_fn: Loss) -> Tensor:
    """Backpropagation on the same batch: not the same estimate, for orientation only."""
    model.zero_grad()
    loss = loss_fn(model(x), y).mean()
    loss.backward()
    return loss.detach()


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def mezo_step(model: torch.nn.Module, loss: Callable[[], Tensor], lr: float, eps: float, seed: int) -> float:
    """A step of MeZO (arXiv 2305.17333, algorithm 1) as its authors' public code takes it.

    The noise of every tensor is drawn anew from the seed in each of three passes that perturb the weights in place
    (plus, minus twice, back) and in the one that updates them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def perturb(scale: float) -> None:
        source = torch.Generator(parameters[0].device).manual_seed(seed)
        for p in parameters:
            z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype, generator=source)
            p.data = p.data + scale * z * eps

    perturb(1)
    plus = loss().item()
    perturb(-2)
    minus = loss().item()
    perturb(1)
    slope = (plus - minus) / (2 * eps)
    perturb(-lr * slope / eps)
    return slope

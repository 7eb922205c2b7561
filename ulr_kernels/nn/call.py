"""The base of all layer types' calls: the tensors that they read, the noise on their output, the gradient buffers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import ops


class Noise(NamedTuple):
    """The noise of one call. Copy c uses draw + c; sample i has the rows of sample first + i."""

    sigma: float | Tensor  # the scale, a number or fp32 `[features]` or `[]`
    key: Tensor  # int64 `[]`
    copies: int  # antithetic ones come as two halves
    antithetic: bool
    dist: str
    sampler: str
    draw: int = 0
    first: int = 0


class DerivedParameter(NamedTuple):
    """A parameter, or a tensor that is computed from parameters and constants alone: a transpose, a slice, a lookup
    of positions, a normalised weight. Autograd's graph leads from it to the parameters.
    """

    tensor: Tensor  # the parameter, or the tensor computed from parameters
    parameters: tuple[Tensor, ...]  # the model's parameters that it was computed from
    rows: bool = False  # it was expanded to one row for each sample
    stopped: bool = False  # it was computed under no_grad: a constant for functions outside of that


class KnownLosses(NamedTuple):
    """The result of a first pass for a call: loss weights as in `add_gradient`, and the learnt ln sigma or None.

    guide: the gradient of the output to add, as in `add_output_gradient`; None where there is none.
    delta: the whole gradient of the output, to use where all copies share the inputs; None: it is not known.
    """

    loss_weight: Tensor
    log_sigma: Tensor | None
    guide: Tensor | None = None
    delta: Tensor | None = None


class NoiseSite(NamedTuple):
    """The noise of a call's output, from which it can be made again."""

    noise: Noise
    grid: tuple[int, ...]  # the output's shape as rows and columns
    shape: torch.Size  # the shape of one copy of the output
    feature_dim: int
    spec: dict[str, Any]  # further arguments of the ops
    shared: bool  # the inputs are the same in all copies

    def dot(self, x: Tensor, copies: int) -> Tensor:
        """sigma <eps_c, x> of each sample, fp32 `[copies, samples]`, for x of one copy's shape."""
        how = {"copies": copies, "feature_dim": self.feature_dim, **self.spec}
        return ops.noise_dot(x.reshape(self.grid), self.noise.sigma, self.noise.key, **how)

    def score(self, loss_weight: Tensor) -> Tensor:
        """The sum over copies of loss_weight * score / sigma, fp32 of one copy's shape."""
        how = {"feature_dim": self.feature_dim, **self.spec}
        return ops.noise_score(self.grid, loss_weight, self.noise.sigma, self.noise.key, **how).view(self.shape)


ParametersOf = Callable[[Any], DerivedParameter | None]  # the parameters that a tensor was computed from


class Call:
    """One call of a layer v = phi(x; theta), as a reader found it in the model's forward.

    A layer type defines phi (`forward`) and how a score becomes gradients (`add_gradient`). It may also make the noised
    output by an op of its own (`_noised`), and output and gradients in one (`_noised_with_gradient`). Inputs and
    outputs have their samples on the first axis.

    Attributes:
        inputs: the tensors that depend on the samples, which the gradient needs.
        given: the same, before copies of them were made for a function in place.
        derived: the parameters, and tensors computed from parameters, that it reads.
        parameters: the model's own parameters in the call, the one that names it first; empty if it has none.
        feature_dim: the axis of the output that counts the noise's columns; all others, in order, are its rows.
        additive: the output is a sum with the first input: v = x + phi(theta).
        time: the time step of a recurrent layer, from 0 in the order of its steps; None in any other layer.
        expands_rows: the output is a parameter with a row for each sample, so the number of inputs is that of the rows.
        generic: no layer type reads this function; its output and derivative have to be checked.
        add_together: adds the gradients of many calls, `add_together([(call, loss_weight), ...], draw)`; None: each
            call adds its own.
    """

    feature_dim = -1
    additive = expands_rows = generic = False
    time: int | None = None
    add_together: Callable[[list[tuple[Any, Tensor]], int], None] | None = None

    def __init__(self, inputs: tuple[Tensor, ...], derived: tuple[DerivedParameter | None, ...]) -> None:
        self.inputs = self.given = inputs
        self._versions = tuple(x._version for x in inputs)
        self.derived = tuple(each for each in derived if each is not None)
        device = inputs[0].device.type
        self._autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        known = {id(p): p for each in self.derived for p in each.parameters}
        self.parameters = tuple(known.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        """The layer's output for inputs of the same kind, of any number of samples."""
        raise NotImplementedError

    def _as_called(self) -> contextlib.AbstractContextManager:
        """Autocast as the model had it at the call, for the gradient, which comes later."""
        device = self.inputs[0].device.type
        if bool(self._autocast) == torch.is_autocast_enabled(device):
            return contextlib.nullcontext()
        return torch.autocast(device, self._autocast or None, enabled=bool(self._autocast))

    def of_sample(self, sample: int, samples: int) -> Tensor:
        """One sample's output, with autograd's graph to the parameters and to nothing else."""
        with torch.enable_grad():
            return self.forward(*(x.detach().unflatten(0, (samples, -1))[sample] for x in self.inputs))

    def clean(self) -> Tensor:
        """The layer's output."""
        return self.forward(*self.inputs)

    def noised(
        self,
        noise: Noise,
        samples: int,
        x_copies: int,
        *,
        shared: bool,
        silent: bool = False,
        known: KnownLosses | None = None,
    ) -> Tensor:
        """The layer's output with noise, copy-major: `[copies * samples, ...]`.

        Args:
            noise: the noise to add.
            samples: how many one copy has.
            x_copies: how many copies the inputs hold: 1, or all of them.
            shared: the inputs are the same in all copies.
            silent: add no noise, as another branch of the residual sum adds it or nothing reads the output; the
                gradient uses it.
            known: the losses, if a first pass has found them: the gradients are added now.

        Returns:
            All copies; if `silent`, as many as the inputs hold.
        """
        self.noise, self._samples, self._shared = noise, samples, shared
        self._operands = tuple(x[: x.shape[0] // x_copies] for x in self.inputs) if shared else self.inputs
        delta = known.delta if known is not None and shared else None
        at_once = known if delta is None else None
        if silent:
            y = self.clean()
            self._shape = torch.Size((y.shape[0] // x_copies, *y.shape[1:]))
            if at_once is not None:
                self.add_gradient(at_once.loss_weight, noise.draw, at_once.log_sigma)
        else:
            y = self._noised() if at_once is None else self._noised_with_gradient(at_once)
            self._shape = y.shape[1:]
            y = y.flatten(0, 1)
        if known is not None and (own := delta if delta is not None else known.guide) is not None:
            self.add_output_gradient(own)
        return y

    def _noised(self) -> Tensor:
        """`[copies, samples of one copy, ...]`."""
        noise, y = self.noise, self.forward(*self._operands)
        if not self._shared:
            y = y.unflatten(0, (noise.copies, -1))
        self._shape = y.shape if self._shared else y.shape[1:]
        return ops.noise_add(
            y if len(self._shape) > 1 else y.unsqueeze(-1),
            noise.sigma,
            noise.key,
            feature_dim=self.feature_dim,
            copies=noise.copies,
            shared=self._shared,
            draw=noise.draw,
            **self._spec(self._positions),
        ).view(noise.copies, *self._shape)

    def _noised_with_gradient(self, known: KnownLosses) -> Tensor:
        """`_noised()`, and the gradients from the same noise."""
        y = self._noised()
        self._shape = y.shape[1:]
        self.add_gradient(known.loss_weight, self.noise.draw, known.log_sigma)
        return y

    def _spec(self, positions: int, loss_weight: Tensor | None = None) -> dict[str, Any]:
        """The noise arguments of an op, the same in a forward and in its gradient.

        Where rows have weights of their own, an op takes each row for a sample: the noise is the same, except for those
        samplers whose coordinates depend on a sample's rows.
        """
        noise = self.noise
        by_row = noise.sampler == "iid" and loss_weight is not None and loss_weight.shape[1] > self._samples
        return {
            "antithetic": noise.antithetic,
            "dist": noise.dist,
            "sampler": noise.sampler,
            "positions": 1 if by_row else positions,
            "row_offset": noise.first * positions,
        }

    def _gradient_spec(
        self, spec: dict[str, Any], draw: int, loss_weight: Tensor, log_sigma: Tensor | None
    ) -> dict[str, Any]:
        """The arguments of an op that adds gradients, beside the buffers and the operands; `spec`: by `_spec`."""
        buffer = None if log_sigma is None else gradient_buffer(log_sigma)
        noise = {"loss_weight": loss_weight, "sigma": self.noise.sigma, "key": self.noise.key, "draw": draw}
        return spec | noise | {"grad_log_sigma": buffer}

    @property
    def _grid(self) -> tuple[int, ...]:
        """The shape of one copy of the output; one number for each sample is one column."""
        return self._shape if len(self._shape) > 1 else (*self._shape, 1)

    @property
    def _positions(self) -> int:
        """Rows of noise for each sample of the output."""
        return self._shape.numel() // self._grid[self.feature_dim] // self._samples

    def check_unchanged(self) -> None:
        """Raise if an input, which the gradient needs, was modified in place since."""
        for x, version in zip(self.inputs, self._versions, strict=True):
            if x._version != version:
                raise RuntimeError(
                    "ulr.ULR: the input of a layer must not be modified in place after the layer has read it "
                    f"(its gradient needs it), got an input {list(x.shape)} that was"
                )

    @property
    def shared(self) -> bool:
        """Whether the inputs were the same in all copies: one copy is kept, and serves for any number of them."""
        return self._shared

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        """Add the likelihood-ratio gradient of this call to `.grad` of its trained parameters.

        Args:
            loss_weight: fp32 `[copies, samples]`, or `[copies, samples * rows]` where a sample's rows of noise differ.
            draw: of the first copy.
            log_sigma: the learnt ln sigma, which gets its gradient too, or None.
        """
        raise NotImplementedError

    def add_output_gradient(self, gradient: Tensor) -> None:
        """Add J^T gradient to `.grad` of this call's trained parameters; of copies with own inputs the mean.

        `gradient`: fp32, of the shape of one copy's output.
        """
        trained = [each.tensor for each in self.derived if each.tensor.requires_grad]
        if not self._shared:
            gradient = gradient.expand(self.noise.copies, *gradient.shape).flatten(0, 1) / self.noise.copies
        with gradient_buffers(*self.derived) as given:
            with torch.enable_grad(), self._as_called():
                y = self.forward(*self._operands)
            found = torch.autograd.grad(y, trained, gradient.to(y.dtype), allow_unused=True)
            buffers = (buffer for buffer in given if buffer is not None)
            for buffer, part in zip(buffers, found, strict=True):
                if part is not None:
                    buffer.add_(part)

    def site(self) -> NoiseSite:
        """The noise of this call, once it has been added."""
        spec = self._spec(self._positions)
        return NoiseSite(self.noise, self._grid, self._shape, self.feature_dim, spec, self._shared)

    def _scores(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
        """Yield loss_weight * score / sigma, fp32, which takes the place of the output's gradient, and its inputs.

        One sum over all copies where they share the inputs; else one for each copy.
        """
        self._add_log_sigma(loss_weight, draw, log_sigma)
        noise, spec = self.noise, self._spec(self._positions, loss_weight) | {"feature_dim": self.feature_dim}
        if self._shared:
            score = ops.noise_score(self._grid, loss_weight, noise.sigma, noise.key, draw=draw, **spec)
            yield score.view(self._shape), *self._operands
            return
        copies = loss_weight.shape[0]
        by_copy = [x.unflatten(0, (copies, -1)) for x in self._operands]
        draws = copies // 2 if noise.antithetic else copies
        spec["antithetic"] = False
        for c in range(copies):
            weight = loss_weight[c : c + 1]
            score = ops.noise_score(
                self._grid, -weight if c >= draws else weight, noise.sigma, noise.key, draw=draw + c % draws, **spec
            )
            yield score.view(self._shape), *(x[c] for x in by_copy)

    def _add_log_sigma(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        if log_sigma is None:
            return
        spec = self._gradient_spec(self._spec(self._positions, loss_weight), draw, loss_weight, log_sigma)
        like = loss_weight.new_empty(()).expand(self._grid)
        ops.scale_shift_grad_(None, None, like, feature_dim=self.feature_dim, **spec)


class _Sums(threading.local):
    """The gradients of a block, by id(parameter): the parameter, and its sum so far or None."""

    def __init__(self) -> None:
        self.unfinished: dict[int, list] = {}


_sums = _Sums()
HALF_DTYPES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def finished_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Add all gradients of the block to `.grad` as torch does: at its end, as one sum.

    Parameters of narrow dtypes have fp32 sums, which are rounded once. Tensor hooks (`Tensor.register_hook`) get the
    sum, and those of `register_post_accumulate_grad_hook` run after it was added. If the block raises, nothing that
    such a parameter would get is added.
    """
    outer, _sums.unfinished = _sums.unfinished, {}
    also_finished(parameters)
    try:
        yield
        for parameter, total in _sums.unfinished.values():
            if total is not None:
                _finish(parameter, total)
    finally:
        _sums.unfinished = outer


def also_finished(parameters: Iterable[Tensor]) -> None:
    """Make the gradients of more parameters part of a block of `finished_gradients`, in which this is called."""
    for p in parameters:
        if p.requires_grad and (p.dtype in HALF_DTYPES or p._backward_hooks or _post_accumulate_hooks(p)):
            _sums.unfinished.setdefault(id(p), [p, None])


@contextlib.contextmanager
def without_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A block in which `torch.autograd.grad` does not run hooks of parameters: they get the finished gradient alone."""
    hooked = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for p, _ in hooked:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, hooks in hooked:
            p._backward_hooks = hooks


def _post_accumulate_hooks(parameter: Tensor) -> Mapping[int, Callable]:
    return parameter._post_accumulate_grad_hooks or {}


def _finish(parameter: Tensor, total: Tensor) -> None:
    for hook in (parameter._backward_hooks or {}).values():
        total = total.to(parameter.dtype)
        changed = hook(total)
        total = total if changed is None else changed
    if parameter.grad is None:
        parameter.grad = total.to(parameter.dtype)
    else:
        parameter.grad.copy_(parameter.grad + total)
    for hook in _post_accumulate_hooks(parameter).values():
        hook(parameter)


def gradient_buffer(parameter: Tensor) -> Tensor:
    """The tensor to add gradients to: `.grad`, or a parameter's sum in `finished_gradients`; zeros at first."""
    unfinished = _sums.unfinished.get(id(parameter))
    if unfinished is not None:
        if unfinished[1] is None:
            unfinished[1] = _zeros_like(parameter)
        return unfinished[1]
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float32 if tensor.dtype in HALF_DTYPES else tensor.dtype)


@contextlib.contextmanager
def gradient_buffers(*derived: DerivedParameter | None) -> Iterator[list[Tensor | None]]:
    """Buffers to add gradients to; None where nothing is trained.

    A parameter's buffer is its `.grad`. The buffer of a tensor computed from parameters is passed on to them at the
    end, by autograd through that computation, which involves no sample.
    """
    buffers: list[Tensor | None] = []
    for each in derived:
        if each is None or not each.tensor.requires_grad:
            buffers.append(None)
        elif each.tensor.is_leaf:
            buffers.append(gradient_buffer(each.tensor))
        else:
            buffers.append(_zeros_like(each.tensor))
    yield buffers
    for each, buffer in zip(derived, buffers, strict=True):
        if each is not None and buffer is not None and not each.tensor.is_leaf:
            backward_to_parameters(each.tensor, each.parameters, buffer)


def backward_to_parameters(tensor: Tensor, parameters: tuple[Tensor, ...], gradient: Tensor) -> None:
    """Pass a gradient of a tensor on to `.grad` of the parameters that it was computed from."""
    trained = [p for p in parameters if p.requires_grad]
    found = torch.autograd.grad(tensor, trained, gradient.to(tensor.dtype), retain_graph=True, allow_unused=True)
    for parameter, part in zip(trained, found, strict=True):
        if part is not None:
            gradient_buffer(parameter).add_(part)


def leaves_of(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves of a tensor's graph."""
    nodes, known = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        nodes += [following for following, _ in node.next_functions]

"""Evolution strategies in an inference engine: a worker perturbs, restores and updates the weights that it serves."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ulr_kernels import noise_contract, ops
from ulr_kernels.errors import fail
from ulr_kernels.nn.names import parameter_names


class Shard(NamedTuple):
    """Some rows of a worker's tensor that are a part of a whole parameter.

    Attributes:
        name: of the whole parameter, by which it has its noise.
        row, col: the place of the part's first element in the whole parameter `[rows, the other axes flattened]`; a
            vector is one row.
        start, stop: the part's rows in the worker's tensor, of a vector its elements; all of them, if `stop` is None.
    """

    name: str
    row: int = 0
    col: int = 0
    start: int = 0
    stop: int | None = None


class ServedWeights:
    """The parameters of a worker's model, whose noise is that of the whole model.

    A member of a population is a seed. Its noise at an element is a function of the seed, of the whole parameter's
    name, and of the element's place there, so that tensor-parallel workers agree bit for bit with one worker that has
    the whole model, and no two parameters have the same noise.

        served = ServedWeights(model)
        for seed in seeds:
            served.perturb(seed, sigma)
            rewards.append(evaluate(model))
            served.restore()
        served.update(seeds, coefficients)

    Args:
        model: in fp32, bf16 or fp16. Its parameters are written in place.
        shards: name of a parameter of `model` -> the parts that it consists of, in the order of their rows: one for a
            column-parallel or row-parallel weight, one for each of the weights that an engine has merged into one
            tensor. A parameter that is not there is whole.
        dist: of the noise: "normal", "laplace" or "rademacher".

    Raises:
        ValueError: an argument breaks these rules.
    """

    def __init__(
        self, model: nn.Module, shards: Mapping[str, Sequence[Shard]] | None = None, *, dist: str = "normal"
    ) -> None:
        if dist not in noise_contract.DISTRIBUTIONS:
            _fail("dist", f"be one of {', '.join(noise_contract.DISTRIBUTIONS)}", repr(dist))
        names, shards = parameter_names(model), dict(shards or {})
        if unknown := sorted(shards.keys() - set(names.values())):
            _fail("shards", "have names of the model's parameters", ", ".join(unknown))
        self._dist = dist
        self._parts: list[Tensor] = []  # views of the parameters
        self._shards: list[Shard] = []
        for parameter in model.parameters():
            name, tensor = names[id(parameter)], parameter.detach()
            end = 0
            for shard in shards.get(name, [Shard(name)]):
                stop = len(tensor) if shard.stop is None else shard.stop
                if not end <= shard.start < stop <= len(tensor):
                    _fail("shards", f"have parts of the {len(tensor)} rows of {name}, one after the other", shard)
                self._parts.append(tensor[shard.start : stop])
                self._shards.append(shard)
                end = stop
        self._saved: list[Tensor] | None = None

    @torch.no_grad()
    def perturb(self, seed: int, sigma: float) -> None:
        """Add `sigma * eps(seed)` to the weights; what they were is kept, in as much memory as they take.

        Args:
            seed: in [-2^63, 2^64).
            sigma: any finite number; a negative one is the other member of an antithetic pair.

        Raises:
            ValueError: an argument breaks these rules, or the weights are perturbed already; nothing is written.
        """
        if self._saved is not None:
            _fail("perturb", "be called after restore", "weights that are perturbed")
        keys = self._keys(seed)
        _check_number("sigma", sigma)
        saved = [part.clone() for part in self._parts]
        rows, cols = self._places()
        ops.perturb_(self._parts, keys, float(sigma), dist=self._dist, row_offset=rows, col_offset=cols)
        self._saved = saved

    @torch.no_grad()
    def restore(self) -> None:
        """Make the weights what they were before `perturb`, bit for bit; nothing happens if they are not perturbed."""
        if self._saved is not None:
            for part, saved in zip(self._parts, self._saved, strict=True):
                part.copy_(saved)
            self._saved = None

    @torch.no_grad()
    def update(self, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """Add `sum_i coefficients[i] * eps(seeds[i])` to the weights.

        The sum is one of fp32, in the order of the seeds, and is rounded once to the weights' dtype. One part of the
        weights at a time is held in fp32.

        Raises:
            ValueError: numbers of seeds and coefficients differ, a value breaks its rule, or the weights are perturbed;
                nothing is written.
        """
        if self._saved is not None:
            _fail("update", "be called after restore", "weights that are perturbed")
        if len(seeds) != len(coefficients):
            _fail("coefficients", f"have one number for each of {len(seeds)} seeds", len(coefficients))
        for coefficient in coefficients:
            _check_number("coefficients", coefficient)
        keys = [self._keys(seed) for seed in seeds]
        for i, (part, row, col) in enumerate(zip(self._parts, *self._places(), strict=True)):
            total = part.to(torch.float32, copy=True)
            for key, coefficient in zip(keys, coefficients, strict=True):
                ops.perturb_([total], [key[i]], float(coefficient), dist=self._dist, row_offset=[row], col_offset=[col])
            part.copy_(total)

    def _keys(self, seed: int) -> list[int]:
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
            _fail("seed", "be an integer in [-2^63, 2^64)", repr(seed))
        return [noise_contract.fold_in(seed, noise_contract.site_id(shard.name)) for shard in self._shards]

    def _places(self) -> tuple[list[int], list[int]]:
        return [shard.row for shard in self._shards], [shard.col for shard in self._shards]


class WorkerExtension:
    """A mixin for an engine's worker: the three methods of `ServedWeights`, to be called by name on all workers.

    vLLM takes such a class by its `worker_extension_cls`, and calls `collective_rpc("perturb", args=(seed, sigma))`;
    its model is `self.model_runner.model`. This has been tested on plain torch modules split over two processes, and
    not in vLLM itself.
    """

    model_runner: Any

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        """The parts of the worker's tensors, as `ServedWeights` takes them; to be overridden where they are shards."""
        return {}

    @functools.cached_property
    def served_weights(self) -> ServedWeights:
        """The weights of the worker's model."""
        return ServedWeights(self.model_runner.model, self.shards())

    def perturb(self, seed: int, sigma: float) -> None:
        """As `ServedWeights.perturb`."""
        self.served_weights.perturb(seed, sigma)

    def restore(self) -> None:
        """As `ServedWeights.restore`."""
        self.served_weights.restore()

    def update(self, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """As `ServedWeights.update`."""
        self.served_weights.update(seeds, coefficients)


def _check_number(argument: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _fail(argument, "be finite", repr(value))


def _fail(argument: str, rule: str, value: object) -> None:
    fail(argument, rule, value, "ulr.optim.ServedWeights")

"""The settings of the estimator and their rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ulr_kernels import noise_contract
from ulr_kernels.baselines import BASELINES
from ulr_kernels.estimators.allocation import ALLOCATIONS
from ulr_kernels.ops.noisy_mlp_step import INJECTIONS

MEMORIES = ("keep", "replay")
NOISES = ("logits", "weights")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `ulr.ULR` takes beside the model and the seed; described there."""

    sigma: float | Mapping[str, float] = 0.1
    copies: int | Mapping[str, int] = 32
    antithetic: bool = True
    injection: str = "layerwise"
    noise: str | Mapping[str, str] = "logits"
    dist: str = "normal"
    sampler: str = "iid"
    baseline: str = "mean"
    learn_sigma: bool = False
    max_rows: int | None = None
    memory: str = "keep"
    allocation: str = "even"

    def __post_init__(self) -> None:
        for argument, allowed in (
            ("injection", INJECTIONS),
            ("dist", noise_contract.DISTRIBUTIONS),
            ("sampler", noise_contract.SAMPLERS),
            ("baseline", BASELINES),
            ("memory", MEMORIES),
            ("allocation", ALLOCATIONS),
        ):
            if getattr(self, argument) not in allowed:
                fail(argument, f"be {' or '.join(map(repr, allowed))}", repr(getattr(self, argument)))
        for argument in ("antithetic", "learn_sigma"):
            if not isinstance(getattr(self, argument), bool):
                fail(argument, "be True or False", repr(getattr(self, argument)))
        for noise in _values(self.noise):
            if noise not in NOISES:
                fail("noise", "be 'logits' or 'weights', or a mapping from layer names to such", repr(noise))
        for sigma in _values(self.sigma):
            if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
                fail("sigma", "be a finite number above 0, or a mapping from layer names to such", repr(sigma))
        for copies in _values(self.copies):
            if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
                fail("copies", "be an integer above 0, or a mapping from layer names to such", repr(copies))
            if self.antithetic and copies % 2:
                fail("copies", "be even where antithetic is True", copies)
        if self.max_rows is not None and (
            isinstance(self.max_rows, bool) or not isinstance(self.max_rows, int) or self.max_rows < 1
        ):
            fail("max_rows", "be None or an integer above 0", repr(self.max_rows))
        if self.max_rows is not None and self.max_rows < self.by_draw:
            fail("max_rows", "have room for a pair of copies of a sample where antithetic is True", self.max_rows)
        if self.injection == "joint" and isinstance(self.copies, Mapping):
            fail("copies", "be one number where injection is 'joint' (all layers share one pass)", dict(self.copies))
        if self.dist == "rademacher" and self.learn_sigma:
            fail("learn_sigma", "be False where dist is 'rademacher', which has no density", True)
        if self.dist == "rademacher" and self.sampler == "sobol":
            fail("sampler", "be 'iid' where dist is 'rademacher'", repr(self.sampler))
        if self.injection == "joint" and self.allocation != "even":
            fail(
                "allocation", "be 'even' where injection is 'joint', as one pass tells the next", repr(self.allocation)
            )
        if self.baseline == "none" and self.allocation != "even":
            fail(
                "allocation",
                "be 'even' where baseline is 'none' (the loss itself is then noise)",
                repr(self.allocation),
            )
        self._check_sobol_baseline()
        if "weights" in _values(self.noise):
            if self.learn_sigma:
                fail("learn_sigma", "be False where noise is 'weights'", True)
            if self.sampler == "sobol":
                fail("sampler", "be 'iid' where noise is 'weights'", repr(self.sampler))

    def _check_sobol_baseline(self) -> None:
        """Sobol's copies are stratified, so the other copies know about this one's noise.

        In the limit the scores of all copies sum to 0, and with them the sum over c of b_c * score_c is no longer 0 on
        average: the mean of the others scales the estimate by about C / (C - 1). In an antithetic pair that shares the
        layer's input the baseline cancels exactly; it does not for ln sigma (whose factor is even in the noise), nor
        where the inputs of a pair differ, as under joint injection.
        """
        if self.sampler != "sobol" or self.baseline != "mean":
            return
        if not self.antithetic:
            fail("baseline", "be 'clean' (or antithetic=True) where sampler is 'sobol': a mean is biased", "'mean'")
        if self.learn_sigma or self.injection == "joint":
            why = "sigma is learnt" if self.learn_sigma else "injection is 'joint'"
            fail("baseline", f"be 'clean' where sampler is 'sobol' and {why}: a mean is biased", "'mean'")

    @property
    def by_draw(self) -> int:
        """Copies that one draw makes."""
        return 2 if self.antithetic else 1

    def sigma_of(self, layer: str) -> float:
        return self._required("sigma", layer)

    def copies_of(self, layer: str) -> int:
        return self._required("copies", layer)

    def noise_of(self, layer: str) -> str:
        """Layers that a mapping does not name have noise on their outputs."""
        return self._of("noise", layer) or "logits"

    def _of(self, argument: str, layer: str) -> Any:
        """The setting of a layer, None without any."""
        value = getattr(self, argument)
        return of_layer(value, layer) if isinstance(value, Mapping) else value

    def _required(self, argument: str, layer: str) -> Any:
        value = self._of(argument, layer)
        if value is None:
            rule = f"have an entry for every trained layer, also for {layer!r} ('' stands for all others)"
            fail(argument, rule, dict(getattr(self, argument)))
        return value

    def check_names(self, layers: set[str]) -> None:
        """Raise if a mapping names neither a layer of the model nor a module that has some."""
        for argument in ("sigma", "copies", "noise"):
            value = getattr(self, argument)
            if isinstance(value, Mapping) and (unknown := unknown_names(value, layers)):
                fail(argument, f"name layers of the model ({', '.join(sorted(layers))})", ", ".join(unknown))

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}


def of_layer(values: Mapping[str, Any], layer: str) -> Any:
    """The value of a layer: that of its own name, or of the smallest module that has one; None without any."""
    return next((values[name] for name in _and_modules(layer) if name in values), None)


def unknown_names(values: Mapping[str, Any], layers: set[str]) -> list[str]:
    """Those that are neither a layer's nor a module's that has some."""
    return sorted(set(values) - {name for layer in layers for name in _and_modules(layer)})


def _and_modules(layer: str) -> Iterator[str]:
    """A layer's name, and those of the modules that it is in, up to '', the model."""
    yield layer
    while layer:
        layer = layer.rpartition(".")[0]
        yield layer


def _values(setting: Any) -> list:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]


def fail(argument: str, rule: str, value: object, owner: str = "ulr.ULR") -> NoReturn:
    raise ValueError(f"{owner}: '{argument}' must {rule}, got {value}")

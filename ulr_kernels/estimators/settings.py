"""The settings of the estimator and their rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from ulr_kernels import noise_contract
from ulr_kernels.baselines import BASELINES
from ulr_kernels.errors import fail
from ulr_kernels.estimators.allocation import ALLOCATIONS
from ulr_kernels.nn.names import unknown_names, value_of_layer
from ulr_kernels.ops.noisy_mlp_step import INJECTIONS

MEMORIES = ("keep", "recompute")
NOISES = ("outputs", "weights")
GUIDES = (None, "feedback", "function")
SUPPORTS = ("all", "active")
SAMPLERS = (*noise_contract.SAMPLERS, "auto")
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "dist": "rademacher",
        "sampler": "auto",
        "antithetic": False,
        "baseline": "clean",
        "guide": "feedback",
        "support": "active",
    }
}
"""By name: settings that replace the defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `ulr.ULR` except model and seed, which describes them.

    Raises:
        RuleError: a value breaks its rule.
    """

    sigma: float | Mapping[str, float] = 0.1
    copies: int | Mapping[str, int] = 32
    antithetic: bool = False
    injection: str = "layerwise"
    noise: str | Mapping[str, str] = "outputs"
    dist: str = "normal"
    sampler: str = "iid"
    baseline: str = "mean"
    learn_sigma: bool = False
    max_rows: int | None = None
    memory: str = "keep"
    allocation: str = "even"
    guide: str | None = None
    support: str = "all"

    @classmethod
    def of_preset(cls, preset: str | None, given: Mapping[str, Any]) -> Settings:
        """The given settings; a preset replaces those that are the defaults."""
        if preset is None:
            return cls(**given)
        if preset not in PRESETS:
            fail("preset", f"be None or {' or '.join(map(repr, PRESETS))}", repr(preset))
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        replaced = {name: value for name, value in PRESETS[preset].items() if given[name] == defaults[name]}
        return cls(**{**given, **replaced})

    def __post_init__(self) -> None:
        for argument, allowed in (
            ("injection", INJECTIONS),
            ("dist", noise_contract.DISTRIBUTIONS),
            ("sampler", SAMPLERS),
            ("baseline", BASELINES),
            ("memory", MEMORIES),
            ("allocation", ALLOCATIONS),
            ("support", SUPPORTS),
        ):
            if getattr(self, argument) not in allowed:
                fail(argument, f"be {' or '.join(map(repr, allowed))}", repr(getattr(self, argument)))
        for argument in ("sigma", "copies", "max_rows"):
            object.__setattr__(self, argument, _of_python(getattr(self, argument)))
        for argument in ("antithetic", "learn_sigma"):
            if not isinstance(getattr(self, argument), bool):
                fail(argument, "be True or False", repr(getattr(self, argument)))
        for noise in _values(self.noise):
            if noise not in NOISES:
                fail("noise", "be 'outputs' or 'weights', or a mapping from layer names to such", repr(noise))
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
        if self.max_rows is not None and self.max_rows < self.copies_per_draw:
            fail("max_rows", "have room for a pair of copies of a sample where antithetic is True", self.max_rows)
        if self.injection == "joint" and isinstance(self.copies, Mapping):
            fail("copies", "be one number where injection is 'joint' (all layers share one pass)", dict(self.copies))
        if self.dist == "rademacher" and self.learn_sigma:
            fail("learn_sigma", "be False where dist is 'rademacher', which has no density", True)
        if self.dist == "rademacher" and self.sampler == "sobol":
            fail("sampler", "be 'iid', 'hadamard' or 'auto' where dist is 'rademacher'", repr(self.sampler))
        if self.dist != "rademacher" and self.sampler in ("hadamard", "auto"):
            fail("dist", f"be 'rademacher' where sampler is {self.sampler!r}", repr(self.dist))
        if self.allocation != "even":
            got = repr(self.allocation)
            if self.injection == "joint":
                fail("allocation", "be 'even' where injection is 'joint', as one pass tells the next", got)
            if self.baseline == "none":
                fail("allocation", "be 'even' where baseline is 'none' (the loss itself is then noise)", got)
        if self.guide not in GUIDES:
            fail("guide", "be None, 'feedback' or a function of outputs and targets", repr(self.guide))
        if self.support == "active" and self.learn_sigma:
            fail("support", "be 'all' where sigma is learnt, from the noise of all elements", "'active'")
        self._check_dependent_copies()
        if "weights" in _values(self.noise):
            if self.learn_sigma:
                fail("learn_sigma", "be False where noise is 'weights'", True)
            if self.sampler == "sobol":
                fail("sampler", "be 'iid', 'hadamard' or 'auto' where noise is 'weights'", repr(self.sampler))

    def _check_dependent_copies(self) -> None:
        """Raise where a mean over copies is biased because one copy depends on the others.

        The scores of a Sobol or Hadamard sequence of copies sum to about 0, and with them the sum over c of b_c *
        score_c is no longer 0 on average: the mean of the others scales the estimate by about C / (C - 1). Where all
        of Hadamard's copies have the same sign, it leaves nothing. In an antithetic pair that shares the layer's input
        the baseline cancels exactly; it does not for ln sigma (whose factor is even in the noise), nor where the inputs
        of a pair differ, as under joint injection.
        """
        if self.sampler == "iid" or self.baseline != "mean":
            return
        of = f"sampler is {self.sampler!r}"
        if not self.antithetic:
            fail("baseline", f"be 'clean' (or antithetic=True) where {of}: a mean is biased", "'mean'")
        if self.learn_sigma or self.injection == "joint":
            why = "sigma is learnt" if self.learn_sigma else "injection is 'joint'"
            fail("baseline", f"be 'clean' where {of} and {why}: a mean is biased", "'mean'")

    def sampler_of(self, noises: int) -> str:
        """The sampler of a pass with so many noises: a layer has one in each of its calls, a parameter has one."""
        if self.sampler != "auto":
            return self.sampler
        return "hadamard" if noises == 1 else "iid"

    @property
    def copies_per_draw(self) -> int:
        """The number of copies that one draw makes."""
        return 2 if self.antithetic else 1

    def sigma_of(self, layer: str) -> float:
        """The noise scale of a layer. Raises `RuleError` if a mapping has none."""
        return self._required("sigma", layer)

    def copies_of(self, layer: str) -> int:
        """The copies of a layer's pass. Raises `RuleError` if a mapping has none."""
        return self._required("copies", layer)

    def noise_of(self, layer: str) -> str:
        """Where a layer has noise, "outputs" or "weights"; on outputs if a mapping does not name it."""
        return self._of("noise", layer) or "outputs"

    def _of(self, argument: str, layer: str) -> Any:
        """The setting of a layer, or None."""
        value = getattr(self, argument)
        return value_of_layer(value, layer) if isinstance(value, Mapping) else value

    def _required(self, argument: str, layer: str) -> Any:
        value = self._of(argument, layer)
        if value is None:
            rule = f"have an entry for every trained layer, also for {layer!r} ('' stands for all others)"
            fail(argument, rule, dict(getattr(self, argument)))
        return value

    def check_names(self, layers: set[str]) -> None:
        """Raise `RuleError` if a mapping has a name that is neither a layer's nor that of a module with layers."""
        for argument in ("sigma", "copies", "noise"):
            value = getattr(self, argument)
            if isinstance(value, Mapping) and (unknown := unknown_names(value, layers)):
                fail(argument, f"name layers of the model ({', '.join(sorted(layers))})", ", ".join(unknown))

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, mappings as dicts."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}


def _of_python(setting: Any) -> Any:
    """NumPy's numbers as those of Python."""
    if isinstance(setting, Mapping):
        return {name: _of_python(value) for name, value in setting.items()}
    if isinstance(setting, Real) and not isinstance(setting, bool):
        return int(setting) if isinstance(setting, Integral) else float(setting)
    return setting


def _values(setting: Any) -> list:
    return list(setting.values()) if isinstance(setting, Mapping) else [setting]

"""One step's change of the weights, made of a few numbers, which a log of a run holds and replay needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from ulr_kernels import noise_contract, ops
from ulr_kernels.nn.shards import shard

FP32 = torch.finfo(torch.float32)
SKIPPED = "skipped"  # name of the state that counts the updates which left a parameter out, if there are any


@dataclasses.dataclass(frozen=True)
class Group:
    """The numbers of a parameter group in one step. They count as fp32: rounded once, to nearest.

    Attributes:
        lr: learning rate.
        sigma: scale of the probes' noise (MeZO's eps), > 0.
        weight_decay: the weights lose lr * weight_decay of themselves (decoupled, as in AdamW).
        momentum: in the place of the rule's, or of the first of its betas; None: the rule's.
    """

    lr: float
    sigma: float
    weight_decay: float = 0.0
    momentum: float | None = None


@dataclasses.dataclass(frozen=True)
class Update:
    """One step: the gradient estimate of group g is the sum over p of coefficients[p] / groups[g].sigma * eps(draw p).

    Attributes:
        step: its number, from 0.
        key: `fold_in(seed, step)`; every parameter's key is made of it.
        coefficients: fp32 `[draws]`, on the device of the losses; reading them is what synchronises.
        groups: one for each parameter group of the rule.
        still: names of the parameters that stay as they are, with their state: frozen or not used in this step.
    """

    step: int
    key: int
    coefficients: Tensor
    groups: tuple[Group, ...]
    still: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """The part that all updates of a run share: the parameters, the noise, and how a gradient becomes a step.

    Attributes:
        names: of the parameters of each group, as `ulr_kernels.nn.names.parameter_names` has them.
        dist: of the noise.
        sampler: of the noise, "iid" or "hadamard".
        rank: of the noise of matrices; None for full rank. Vectors have a noise value of their own per element.
        momentum: b = momentum * b + g replaces g; 0 for none.
        betas: of Adam; None for none.
        adam_eps: what Adam adds to the square root.
        stochastic: weights in bf16 are rounded at random, without bias, so that steps below their last place count.
        padding: names of tables, each with the row of padding, which stays as it is.
    """

    names: tuple[tuple[str, ...], ...]
    dist: str = "normal"
    rank: int | None = None
    momentum: float = 0.0
    betas: tuple[float, float] | None = None
    adam_eps: float = 1e-8
    stochastic: bool = False
    padding: tuple[tuple[str, int], ...] = ()
    sampler: str = "iid"

    def __post_init__(self) -> None:
        def fail(argument: str, rule: str) -> NoReturn:
            raise ValueError(f"ulr.optim: '{argument}' must {rule}, got {getattr(self, argument)!r}")

        if self.dist not in noise_contract.DISTRIBUTIONS:
            fail("dist", f"be one of {', '.join(noise_contract.DISTRIBUTIONS)}")
        if self.sampler not in ("iid", "hadamard"):
            fail("sampler", "be 'iid' or 'hadamard'")
        if self.sampler == "hadamard" and self.dist != "rademacher":
            fail("dist", "be 'rademacher' where sampler is 'hadamard'")
        if self.sampler == "hadamard" and self.rank is not None:
            fail("rank", "be None where sampler is 'hadamard'")
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, Integral) or self.rank < 1
        ):
            fail("rank", "be an integer above 0, or None")
        if not _number(self.momentum) or not 0 <= self.momentum < 1:
            fail("momentum", "be in [0, 1)")
        if self.betas is not None and not (
            isinstance(self.betas, Sequence)
            and len(self.betas) == 2
            and all(_number(beta) and 0 <= beta < 1 for beta in self.betas)
        ):
            fail("betas", "be two numbers in [0, 1), or None")
        if self.betas is not None and self.momentum:
            fail("momentum", "be 0 where betas are given")
        if not _number(self.adam_eps) or not 0 <= self.adam_eps < math.inf:
            fail("adam_eps", "be finite and at least 0")
        own = {
            "momentum": float(self.momentum),
            "adam_eps": float(self.adam_eps),
            "rank": None if self.rank is None else int(self.rank),
            "betas": None if self.betas is None else tuple(map(float, self.betas)),
        }
        for name, value in own.items():  # Python's numbers in the place of NumPy's
            object.__setattr__(self, name, value)

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Rule:
        """The rule of a dict from `dataclasses.asdict`, in which JSON may have made lists of tuples.

        Raises:
            TypeError: a name is unknown, or `names` or `betas` are no lists.
            ValueError: a value breaks the rules.
        """
        betas = fields["betas"]
        tuples = {name: tuple(map(tuple, fields[name])) for name in ("names", "padding") if name in fields}
        return cls(**{**fields, **tuples, "betas": None if betas is None else tuple(betas)})

    def state_names(self) -> tuple[str, ...]:
        """The names of the fp32 state tensors of each parameter."""
        if self.betas is not None:
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()

    def momentum_of(self, group: Group) -> float | None:
        """The momentum of a group in its step, or the first of its betas; None where the rule has neither."""
        own = self.momentum or None if self.betas is None else self.betas[0]
        return own if own is None or group.momentum is None else group.momentum

    def factor(self, group: Group) -> float:
        """The factor of a group's coefficients in its step.

        Raises:
            ValueError: a number of the group, or a product of them in a step, is not finite in fp32.
        """
        numbers = {
            "lr": group.lr,
            "sigma": group.sigma,
            "weight_decay": group.weight_decay,
            "1 / sigma": 1 / group.sigma,
            "lr / sigma": group.lr / group.sigma,
            "lr * weight_decay": group.lr * group.weight_decay,
        }
        for name, value in numbers.items():
            if not abs(value) <= FP32.max:
                raise ValueError(f"ulr.optim: '{name}' must be finite in fp32, got {group}")
        # Without optimiser state -lr is folded into the coefficients, so the sum of the noise is the update.
        return 1 / group.sigma if self.state_names() else -group.lr / group.sigma

    @torch.no_grad()
    def apply(
        self,
        update: Update,
        parameters: Mapping[str, Tensor],
        state: MutableMapping[str, MutableMapping[str, Tensor]],
    ) -> None:
        """Change the weights by an update, in one pass over each: bitwise the same on every back end and thread count.

        Args:
            update: of this run; they must be applied in their order.
            parameters: the model's, by name.
            state: of each parameter, by name; filled by the first update, empty before it.

        Raises:
            ValueError: the groups or names do not match, or a number is not finite in fp32 (those on a GPU are not
                read); nothing has been written.
        """
        if len(update.groups) != len(self.names):
            raise ValueError(
                f"ulr.optim: 'update' must have a group for each of {len(self.names)}, got {len(update.groups)}"
            )
        missing = [name for names in self.names for name in names if name not in parameters]
        if missing:
            raise ValueError(f"ulr.optim: 'parameters' must hold {missing[0]!r}, got {len(parameters)} others")
        steps = [self._coefficients(update.coefficients, group) for group in update.groups]
        still = set(update.still)
        padding = [_row(parameters[name], row) for name, row in self.padding if name not in still]
        before = [row.clone() for row in padding]
        for names, group, coefficients in zip(self.names, update.groups, steps, strict=True):
            moving = {name: parameters[name] for name in names if name not in still}
            for skipped, those in self._by_skipped(moving, state):
                for device, here in by_device(those):
                    step = update.step + 1 - skipped
                    self._apply(update, step, group, coefficients.to(device), here, device, parameters, state)
        for row, values in zip(padding, before, strict=True):
            row.copy_(values)
        if self.betas is not None:
            for name in update.still:
                own = state.setdefault(name, {})
                own[SKIPPED] = own.get(SKIPPED, torch.zeros((), dtype=torch.float32)) + 1

    def _by_skipped(
        self, parameters: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Parameters by the number of updates that left them out: Adam's correction counts those that did not."""
        if self.betas is None or not any(SKIPPED in own for own in state.values()):
            yield 0, dict(parameters)
            return
        found: dict[int, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            own = state.get(name, {})
            found.setdefault(int(own[SKIPPED]) if SKIPPED in own else 0, {})[name] = parameter
        yield from found.items()

    def _coefficients(self, coefficients: Tensor, group: Group) -> Tensor:
        """The coefficients of a group's noise in the sum that an op makes."""
        result = coefficients * torch.full_like(coefficients, self.factor(group))
        if result.device.type == "cpu" and not result.isfinite().all():
            raise ValueError(f"ulr.optim: coefficients / sigma must be finite in fp32, got {coefficients} in {group}")
        return result

    def _apply(
        self,
        update: Update,
        step: int,
        group: Group,
        coefficients: Tensor,
        names: tuple[str, ...],
        device: torch.device,
        parameters: Mapping[str, Tensor],
        state: MutableMapping[str, MutableMapping[str, Tensor]],
    ) -> None:
        """The parameters of one group on one device, in their update number `step`, from 1."""
        shards = [shard(parameters[name]) for name in names]
        states: dict[str, list[Tensor]] = {kind: [] for kind in self.state_names()}
        for name in names:
            own = state.setdefault(name, {})
            for kind, tensors in states.items():
                if kind not in own:
                    own[kind] = torch.zeros_like(parameters[name], dtype=torch.float32, requires_grad=False)
                tensors.append(shard(own[kind]).tensor)
        momentum = self.momentum_of(group) or 0.0
        ops.combine_(
            [part.tensor for part in shards],
            site_keys(update.key, names, device),
            coefficients,
            lr=group.lr,
            weight_decay=group.weight_decay,
            momentum=0.0 if self.betas else momentum,
            momentum_buffers=states.get("momentum_buffer", ()),
            betas=(momentum, self.betas[1]) if self.betas else (0.0, 0.0),
            epsilon=self.adam_eps,
            exp_avgs=states.get("exp_avg", ()),
            exp_avg_sqs=states.get("exp_avg_sq", ()),
            step=step if self.betas else None,
            dist=self.dist,
            sampler=self.sampler,
            rank=self.rank,
            stochastic=self.stochastic,
            row_offset=[part.row_offset for part in shards],
            col_offset=[part.col_offset for part in shards],
            width=[part.width for part in shards],
        )


def by_device(parameters: Mapping[str, Tensor]) -> Iterator[tuple[torch.device, tuple[str, ...]]]:
    """The names of parameters, by their device."""
    for device in dict.fromkeys(parameter.device for parameter in parameters.values()):
        yield device, tuple(name for name, parameter in parameters.items() if parameter.device == device)


def _row(parameter: Tensor, row: int) -> Tensor:
    """One row of a table, in its memory: `[0, ...]` where another rank holds it."""
    part = shard(parameter)
    own = row - part.row_offset
    return part.tensor[own : own + 1] if 0 <= own < len(part.tensor) else part.tensor[:0]


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@functools.lru_cache(maxsize=64)
def _sites(names: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([noise_contract.signed64(noise_contract.site_id(name)) for name in names], device=device)


def site_keys(step_key: int, names: tuple[str, ...], device: torch.device) -> Tensor:
    """int64 `[len(names)]`: the keys of parameters in a step."""
    return ops.fold_in(torch.full((), step_key, dtype=torch.int64, device=device), _sites(names, device))

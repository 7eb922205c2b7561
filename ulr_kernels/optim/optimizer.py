"""The base of the optimisers: it evaluates a step's probes, collects their losses, and applies the update."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, TypedDict

import torch
from torch import Tensor, nn

from ulr_kernels import noise_contract
from ulr_kernels.nn.batch import Batch, LossFunction, apply, repeat
from ulr_kernels.nn.eval_mode import eval_mode
from ulr_kernels.nn.module_state import ModuleState
from ulr_kernels.nn.names import padding_rows, parameter_names, unwrap
from ulr_kernels.nn.perturbed import NoisedParameter, PerturbedWeights, WeightDraws
from ulr_kernels.nn.shards import drop_gathered, is_sharded
from ulr_kernels.nn.threads import refuse_other_threads
from ulr_kernels.optim.generators import SameDraws
from ulr_kernels.optim.probes import Probe, ProbeBatch, Probed, group_probes
from ulr_kernels.optim.states import StateCheck
from ulr_kernels.optim.update import Group, Rule, Update, by_device, site_keys
from ulr_kernels.optim.workers import Workers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Closure = Callable[[], Any]  # one forward: the batch's loss, a scalar tensor or a number


class Common(TypedDict, total=False):
    """Arguments that all optimisers here take beside their own.

    Attributes:
        params: parameters of the model or groups of them, as torch's optimisers take them, each with its own lr,
            weight_decay and noise scale; by default all that the model trains now (`requires_grad`).
        weight_decay: decoupled, W <- W - lr * weight_decay * W; >= 0.
        momentum: b = momentum * b + g replaces the estimate g; 0 for none.
        betas: Adam's decays, which make Adam of g; None for none.
        adam_eps: what Adam adds to the square root; 1e-8.
        stochastic: weights in bf16 are rounded at random, without bias, so that steps below their last place count.
        sampler: of the noise: "iid", or with dist="rademacher" and full rank "hadamard": orthogonal signs, which cost a
            step one sign a weight however many probes it has (docs/noise.md).
        workers: the ranks that share the probes and micro-batches; None for one process.
    """

    params: Iterable[Any] | None
    weight_decay: float
    momentum: float
    betas: tuple[float, float] | None
    adam_eps: float
    stochastic: bool
    sampler: str
    workers: Workers | None


class ForwardOptimizer(torch.optim.Optimizer):
    """Base of the optimisers that probe weights with forward passes.

    A subclass defines `_probes`, `_coefficients_from`, SETTINGS and their rules. Each parameter group has its noise
    scale, under the name SCALE.
    """

    SCALE = "sigma"
    SETTINGS: tuple[str, ...] = ()  # attributes beside the rule that a run goes on with

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        scale: float,
        dist: str,
        rank: int | None,
        seed: int,
        common: Mapping[str, Any],
    ) -> None:
        self._check_seed(seed)
        if unknown := sorted(common.keys() - Common.__annotations__.keys()):
            raise TypeError(f"ulr.optim.{type(self).__name__}: got an unexpected argument {unknown[0]!r}")
        if not isinstance(model, nn.Module):  # other optimisers take parameters
            self._fail("model", "be a torch.nn.Module", type(model).__name__)
        self.model = unwrap(model)
        self.seed = int(seed)
        self.steps = 0
        self.last_update: Update | None = None
        settings = dict(common)
        self._flag("stochastic", settings.get("stochastic", False))
        params, self.workers = settings.pop("params", None), settings.pop("workers", None)
        defaults = {"lr": lr, self.SCALE: scale, "weight_decay": settings.pop("weight_decay", 0.0)}
        self._rule = Rule(names=(), dist=dist, rank=rank, **settings)
        self._names = parameter_names(self.model)
        self._padding = padding_rows(self.model)
        self._losses: list[Tensor] = []  # of the micro-batches so far
        self._forwards: list[list[int]] = []  # of each of them: the places of the probes of each forward
        self._used: set[str] = set()  # trained parameters that functions of the micro-batches so far have read
        self._warned: set[tuple[str, str]] = set()  # names of parameters, with what a warning has said of them
        self._checked_batches: set[tuple] = set()
        if self._rule.betas is not None:
            defaults["betas"] = self._rule.betas
        elif self._rule.momentum:
            defaults["momentum"] = self._rule.momentum
        if params is None:
            params = [p for p in self.model.parameters() if p.requires_grad]
            if not params:
                self._fail("model", "have a trained parameter (requires_grad)", "none")
        super().__init__(params, defaults)

    @classmethod
    def _fail(cls, argument: str, rule: str, value: object) -> NoReturn:
        raise ValueError(f"ulr.optim.{cls.__name__}: '{argument}' must {rule}, got {value}")

    @classmethod
    def _check_seed(cls, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64:
            cls._fail("seed", "be an integer in [-2^63, 2^64)", repr(seed))

    @classmethod
    def _count(cls, argument: str, value: int, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            cls._fail(argument, f"be an integer of at least {least}", repr(value))
        return int(value)

    @classmethod
    def _flag(cls, argument: str, value: bool) -> bool:
        if not isinstance(value, bool):
            cls._fail(argument, "be True or False", repr(value))
        return value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                self._fail("model", "have parameters with shapes (run one forward first)", "one without")
            if id(parameter) not in self._names:
                self._fail("params", "be parameters of the model", f"one of shape {list(parameter.shape)} that is not")
            if parameter.dtype not in DTYPES:
                self._fail(self._names[id(parameter)], "be float32, bfloat16 or float16", parameter.dtype)
            if self._rule.stochastic and parameter.dtype == torch.float16:
                self._fail("stochastic", "be False for float16", f"True for {self._names[id(parameter)]}")
        self._numbers(group)
        for name in ("lr", self.SCALE, "weight_decay", "momentum"):
            if isinstance(group.get(name), Real):  # NumPy's numbers could not be loaded from a state
                group[name] = float(group[name])
        if group.get("betas"):
            group["betas"] = tuple(map(float, group["betas"]))

    def _numbers(self, group: dict[str, Any]) -> Group:
        """The numbers of a parameter group, which schedulers and users may change at any time."""
        for argument, rule, good in (
            ("lr", "be finite and at least 0", lambda value: 0 <= value < math.inf),
            (self.SCALE, "be finite and above 0", lambda value: 0 < value < math.inf),
            ("weight_decay", "be finite and at least 0", lambda value: 0 <= value < math.inf),
        ):
            value = group[argument]
            if not isinstance(value, Real | Tensor) or isinstance(value, bool) or not good(value):
                self._fail(argument, rule, repr(value))
        numbers = Group(
            float(group["lr"]), float(group[self.SCALE]), float(group["weight_decay"]), self._momentum(group)
        )
        self._rule.factor(numbers)
        return numbers

    def _momentum(self, group: dict[str, Any]) -> float | None:
        """The momentum of a group, or its first beta, which schedulers may change too; None where the rule has none."""
        rule = self._rule
        for argument, own in (("momentum", rule.momentum), ("betas", rule.betas)):
            if group.get(argument) and not own:
                self._fail(argument, "be an argument of the optimiser where groups have their own", repr(own))
        if rule.betas is not None:
            first, *others = group.get("betas", rule.betas)
            argument = "betas"
            if others != [rule.betas[1]]:
                self._fail("betas", f"keep its second number, {rule.betas[1]}", repr(group["betas"]))
        elif rule.momentum:
            argument, first = "momentum", group.get("momentum", rule.momentum)
        else:
            return None
        if not isinstance(first, Real) or isinstance(first, bool) or not 0 <= float(first) < 1:
            self._fail(argument, "be in [0, 1)", repr(group[argument]))
        return float(first)

    # --- a subclass defines ------------------------------------------------------------------------------------------

    @classmethod
    def _check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Raise ValueError where one of SETTINGS breaks its rule."""
        raise NotImplementedError

    def _probes(self) -> Sequence[Probe]:
        """The evaluations of a step; where there is one at W itself, it comes first."""
        raise NotImplementedError

    def _reduce_losses(self, losses: Tensor) -> Tensor:
        """The part of fp32 losses `[probes, samples]` that a step needs and ranks exchange: one column, the means."""
        return losses.mean(1, keepdim=True)

    def _coefficients_from(self, losses: Tensor) -> Probed:
        """The loss and coefficients from reduced losses `[probes, columns]`, their mean over the micro-batches."""
        raise NotImplementedError

    # --- a step ------------------------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> int:
        """The number of losses that a step evaluates: how often it runs the model on its batch."""
        return len(self._probes())

    @property
    def rule(self) -> Rule:
        """The part that all updates of this run share; with them and the base weights it rebuilds the run."""
        names = tuple(tuple(self._names[id(p)] for p in group["params"]) for group in self.param_groups)
        padding = tuple((name, self._padding[name]) for group in names for name in group if name in self._padding)
        return dataclasses.replace(self._rule, names=names, padding=padding)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Evaluate the probes by `closure`, then update the weights.

        Args:
            closure: runs the model's forward and returns its loss: a scalar tensor or a number, differentiable or not.
                It is called once for each probe, with the model in eval mode (dropout off, BatchNorm's statistics
                left alone), on the same batch and with the same random numbers. It must run the model in its own
                thread and call no `backward()`. Without it the step uses what `accumulate` has collected.

        Returns:
            The loss, a scalar on its device, detached. It is that of the unperturbed weights where the method evaluates
            these, else the mean over the probes. Parameters that are frozen or that no forward has used stay as they
            are, with their state; a warning names the latter once.

        Raises:
            ValueError: a number, the closure or the model breaks a rule; nothing has been changed.
        """
        groups = tuple(map(self._numbers, self.param_groups))
        if closure is not None:
            self.accumulate(closure)
        if not self._losses:
            self._fail("closure", "be given where nothing was accumulated", None)
        parameters = {self._names[id(p)]: p for group in self.param_groups for p in group["params"]}
        unused = [name not in self._used or not p.requires_grad for name, p in parameters.items()]
        if self.workers is None:
            collected = torch.stack(self._losses)
        else:
            collected, unused = self.workers.exchange(self._losses, self._forwards, self.steps, unused)
        still = tuple(name for name, left_out in zip(parameters, unused, strict=True) if left_out)
        self._warn_of(still)
        losses = collected.mean(0)
        loss, coefficients = self._coefficients_from(losses)
        # An overflow in one probe voids the estimate: the weights stay as they are, and the caller gets the loss.
        largest = max(abs(self._rule.factor(group)) for group in groups)
        finite = (coefficients * max(largest, 1.0)).isfinite().all()
        coefficients = torch.where(finite, coefficients, 0)
        update = Update(self.steps, noise_contract.fold_in(self.seed, self.steps), coefficients, groups, still)
        self.apply(update)
        return loss

    @torch.no_grad()
    def accumulate(self, closure: Closure) -> Tensor:
        """Evaluate the probes of the coming step on one more micro-batch; the step uses the mean of their losses.

        Returns:
            The mean over the probes that this process evaluates, a scalar; NaN where other ranks have them all.
        """
        forwards = self._forwards_of(1)
        with self._micro_batch() as (state, draws, used):
            losses = torch.zeros(len(forwards), 1, dtype=torch.float32, device=self._device())
            for forward in self._own(forwards):
                with self._probing(state, draws, forward, used):
                    loss = self._call(closure)
                loss = torch.as_tensor(loss, dtype=torch.float32, device=self._device()).detach()
                if loss.numel() != 1:
                    self._fail("closure", "return one loss", list(loss.shape))
                for place in forward.places:
                    losses[place] = loss
        return self._collect(losses, forwards, self._check_used(used, state))

    @torch.no_grad()
    def accumulate_batch(self, x: Any, y: Any, loss_fn: LossFunction, chunk: int | None = None) -> Tensor:
        """`accumulate`, with many probes in one forward: their rows follow one another, each sees its own weights.

        Args:
            x: the model's input: a tensor, a tuple (positional arguments) or a dict (keyword arguments) of tensors with
                samples first.
            y: targets: a tensor, tuple or dict of tensors with samples first, or None.
            loss_fn: `loss_fn(outputs, targets)` -> the loss of each row, `[rows]`; need not be differentiable.
            chunk: probes in one forward, at least 1; all of them if None.

        Returns:
            The mean over the probes, a scalar.

        Raises:
            ValueError: a batch that breaks these rules, or a model whose rows cannot be separated (it must keep
                samples first wherever it uses a trained parameter); use `step(closure)` for such.
        """
        batch = Batch(x, y, f"ulr.optim.{type(self).__name__}")
        probes, forwards = self._probes(), self._forwards_of(chunk)

        def evaluate(forward: ProbeBatch) -> Tensor:
            """fp32 `[copies, samples]`: the losses of the probes of one forward."""
            copies = len(forward.places)
            with self._probing(state, draws, forward, used, batch.samples * copies) as perturbed:
                inputs = repeat(batch.x, copies)
                perturbed.mark_samples((inputs, batch.y))
                return batch.losses(apply(self.model, inputs), loss_fn, copies).to(self._device())

        with self._micro_batch() as (state, draws, used):
            rows = [torch.zeros(batch.samples, dtype=torch.float32, device=self._device())] * len(probes)
            for forward in self._own(forwards):
                found = evaluate(forward)
                for place, losses in zip(forward.places, found.unbind(), strict=True):
                    rows[place] = losses
                if len(forward.places) > 1 and batch.signature not in self._checked_batches:
                    self._check_apart(probes[forward.places[-1]], evaluate, found)
                    self._checked_batches.add(batch.signature)
        return self._collect(torch.stack(rows), forwards, self._check_used(used, state))

    @contextlib.contextmanager
    def _micro_batch(self) -> Iterator[tuple[ModuleState, SameDraws, _Used]]:
        """Eval mode, and what the forwards of a micro-batch share: the modules' state, random numbers, what is used."""
        with eval_mode(self.model):
            state = ModuleState(self.model)
            self._check_parameters(state)
            draws = SameDraws({p.device for group in self.param_groups for p in group["params"]})
            with refuse_other_threads(state.modules, f"ulr.optim.{type(self).__name__}"):
                yield state, draws, _Used()
        draws.finish()

    @contextlib.contextmanager
    def _probing(
        self, state: ModuleState, draws: SameDraws, forward: ProbeBatch, used: _Used, rows: int = 0
    ) -> Iterator[PerturbedWeights]:
        """The model as a forward of the coming step sees it; after it the model's modules are as before."""
        try:
            state.drop_caches()
            with draws.forward(), self._perturbed(forward.draws, forward.sign, rows) as perturbed:
                perturbed.on_generator = draws.note
                state.fill_caches()
                yield perturbed
        finally:
            state.restore()
        if forward.sign:
            used.add(perturbed.used)

    def _call(self, closure: Closure) -> Any:
        """The closure's loss, or an error that says what a closure here does not do."""
        try:
            return closure()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError(
                f"ulr.optim.{type(self).__name__}: 'closure' must run the forward alone and return its loss, without "
                f"backward(), got '{error}'"
            ) from error

    def _check_apart(self, probe: Probe, evaluate: Callable[[ProbeBatch], Tensor], losses: Tensor) -> None:
        """Raise if the last probe of a forward has other losses by itself than among others.

        It runs with the first batch of each shape. The limit is a twentieth of the difference between probes, which may
        be a thousandth of their losses, and their rounding. In narrow dtypes it is a quarter, and some per cent of the
        losses, as a product of other rows rounds otherwise there.
        """
        alone = evaluate(ProbeBatch(WeightDraws(probe.draw), probe.sign, [0]))[0]
        first, own, alone = (torch.nan_to_num(each) for each in (losses[0], losses[-1], alone))
        narrow = torch.is_autocast_enabled(self._device().type) or any(
            p.dtype != torch.float32 for p in self.model.parameters()
        )
        share, rounding = (0.25, 0.05) if narrow else (0.05, 2e-5)
        if (own - alone).norm() > share * (own - first).norm() + rounding * own.norm():
            self._fail(
                "model",
                "compute each row from its own inputs and keep samples on the first axis (step(closure) evaluates one "
                "probe at a time)",
                "other losses of a probe by itself than among others",
            )

    def step_batch(self, x: Any, y: Any, loss_fn: LossFunction, chunk: int | None = None) -> Tensor:
        """`step` with many probes in one forward; the arguments are those of `accumulate_batch`."""
        self.accumulate_batch(x, y, loss_fn, chunk)
        return self.step()

    def _collect(self, losses: Tensor, forwards: list[ProbeBatch], used: set[str]) -> Tensor:
        """Keep the losses of a micro-batch, and which parameters it has used, for the step."""
        kept, places = self._reduce_losses(losses), [forward.places for forward in forwards]
        if self._losses and self._losses[0].shape != kept.shape:
            self._fail("closure", f"give losses {list(self._losses[0].shape)} as before", list(kept.shape))
        if self._losses and self.workers is not None and self._forwards != places:
            self._fail("chunk", "be one for all micro-batches of a step that ranks share", "another than before")
        self._losses.append(kept)
        self._used |= used
        self._forwards = places
        # One by one: a list of places would be copied to the device, which the host waits for.
        own = [losses[place] for place in sorted(place for forward in self._own(forwards) for place in forward.places)]
        return torch.stack(own).mean() if own else losses.new_full((), math.nan)

    def forwards(self, chunk: int | None = None) -> int:
        """How often `accumulate_batch` runs the model on a micro-batch, on all ranks that share it together."""
        return len(self._forwards_of(chunk))

    def _forwards_of(self, chunk: int | None) -> list[ProbeBatch]:
        """The forwards of a micro-batch, with at most `chunk` probes in each; None: all probes of one kind."""
        probes = self._probes()
        return list(group_probes(probes, len(probes) if chunk is None else self._count("chunk", chunk, 1)))

    def _own(self, forwards: list[ProbeBatch]) -> list[ProbeBatch]:
        """The forwards that this process evaluates: whole ones, so that each has the values of a single process."""
        if self.workers is None:
            return forwards
        return [forwards[place] for place in self.workers.own(len(forwards))]

    @torch.no_grad()
    def apply(self, update: Update) -> None:
        """Change the weights by an update, this optimiser's own or one of a log, and go on with the step after it."""
        parameters = {self._names[id(p)]: p for group in self.param_groups for p in group["params"]}
        state = {name: self.state[parameter] for name, parameter in parameters.items()}
        self.rule.apply(update, parameters, state)
        drop_gathered(self.model)
        self.last_update = update
        self.steps = update.step + 1
        self.forget()

    def forget(self) -> None:
        """Drop what was accumulated for the coming step, as after a `WorkerError`; `zero_grad` does not."""
        self._losses.clear()
        self._used.clear()

    # --- probing -----------------------------------------------------------------------------------------------------

    def _device(self) -> torch.device:
        return next(parameter.device for group in self.param_groups for parameter in group["params"])

    def _perturbed(self, draws: WeightDraws, sign: int, rows: int = 0) -> PerturbedWeights:
        """The mode for a probe of the coming step; without noise, and at no cost, where sign is 0."""
        noised = []
        step_key = noise_contract.fold_in(self.seed, self.steps)
        for group in self.param_groups if sign else ():
            named = {self._names[id(p)]: p for p in group["params"] if p.requires_grad}
            for device, names in by_device(named):
                sigma = torch.full((), sign * group[self.SCALE], dtype=torch.float32, device=device)
                for name, key in zip(names, site_keys(step_key, names, device).unbind(), strict=True):
                    rank = self._rule.rank if named[name].dim() > 1 else None
                    noised.append(NoisedParameter(name, named[name], key, sigma, rank, self._padding.get(name)))
        return PerturbedWeights(
            self.model, noised, draws._replace(dist=self._rule.dist, sampler=self._rule.sampler), rows
        )

    def _check_parameters(self, state: ModuleState) -> None:
        """Raise if the model has other parameters now than the optimiser, or some that it cannot train."""
        own = [p for group in self.param_groups for p in group["params"]]
        if not any(p.requires_grad for p in own):
            self._fail("model", "have a trained parameter (requires_grad)", "none")
        held = {id(p) for module in state.modules for p in module._parameters.values()}
        for p in own:
            if is_sharded(p):  # whose module holds other objects while it runs
                continue
            if id(p) not in held:
                self._fail(
                    "model",
                    "keep the parameters that the optimiser was made of (make a new one where a layer is replaced, or "
                    "loaded with assign=True)",
                    f"another in the place of {self._names[id(p)]}",
                )
            if p.dtype not in DTYPES:
                self._fail(self._names[id(p)], "be float32, bfloat16 or float16", p.dtype)
            if p.requires_grad and (p._backward_hooks or p._post_accumulate_grad_hooks):
                self._fail(
                    "model",
                    "have no hooks on the gradients of its parameters, as there are no gradients (register_hook)",
                    f"one on {self._names[id(p)]}",
                )

    def _trained(self) -> set[str]:
        """The names of the parameters that are trained now."""
        return {self._names[id(p)] for group in self.param_groups for p in group["params"] if p.requires_grad}

    def _check_used(self, used: _Used, state: ModuleState) -> set[str]:
        """The parameters that a micro-batch's forwards have used; raise if they cannot all be seen."""
        trained = self._trained()
        unused = [name for name in self._names.values() if name in trained - used.names] if used.forwards else []
        if unused and len(unused) == len(trained):
            self._fail(
                "closure",
                "use trained parameters in the thread that calls it, through torch functions (noise reaches no other "
                "thread, and no result of an earlier forward)",
                f"none of {_shortened_list(unused)}",
            )
        if unused and state.tensors:
            self._fail(
                "model",
                "hold no results of an earlier forward where a trained parameter is not used, as they may be computed "
                "from it (register constants as buffers, freeze parameters by requires_grad_(False), or give params)",
                f"tensors among its attributes, and none of {_shortened_list(unused)}",
            )
        if used.common != used.names:
            self._warn(
                [name for name in used.names if name not in used.common],
                "some forwards of step {step} have used {names} and others have not, which is wrong if a forward keeps "
                "results for the next one outside the model's modules",
            )
        return used.names

    def _warn_of(self, still: tuple[str, ...]) -> None:
        """Name those that no function of this step has used, once for each."""
        trained = self._trained()
        self._warn(
            [name for name in still if name in trained],
            "no function of step {step} has used {names}: they stay as they are in such steps (no function in another "
            "thread is seen, nor a result of an earlier forward)",
        )

    def _warn(self, names: Sequence[str], text: str) -> None:
        """Warn of parameters, once of each."""
        new = [name for name in names if (name, text) not in self._warned]
        if new:
            self._warned.update((name, text) for name in new)
            text = text.format(step=self.steps, names=_shortened_list(new))
            warnings.warn(f"ulr.optim.{type(self).__name__}: {text}", stacklevel=5)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Torch's `state` and `param_groups`, and under `ulr` the rest of a run's state: seed, steps, settings."""
        settings = {name: getattr(self, name) for name in self.SETTINGS}
        own = {"seed": self.seed, "steps": self.steps, "rule": dataclasses.asdict(self.rule), "settings": settings}
        return super().state_dict() | {"ulr": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, its settings included: the run goes on bitwise from its last step.

        Raises:
            ValueError: the state is one of other parameters or of another optimiser, or a value breaks its rule;
                nothing has been changed.
        """
        own = state_dict.get("ulr")
        if own is None:
            self._fail("state_dict", "be one of an optimiser of ulr.optim", f"one with {', '.join(state_dict)}")
        mine, check = self.state_dict(), StateCheck(functools.partial(self._fail, "state_dict"))
        check.keys("state_dict", state_dict, mine, more=True)
        check.keys("ulr", own, mine["ulr"])
        check.keys("ulr.settings", own["settings"], mine["ulr"]["settings"])
        check.keys("ulr.rule", own["rule"], mine["ulr"]["rule"])
        for group in state_dict["param_groups"]:
            check.keys("param_groups", group, dict.fromkeys(("lr", self.SCALE, "weight_decay")), more=True)
            self._numbers({name: value for name, value in group.items() if name not in ("momentum", "betas")})
        self._check_seed(own["seed"])
        self._count("steps", own["steps"], 0)
        self._check_settings(own["settings"])
        self._flag("stochastic", own["rule"]["stochastic"])
        try:
            rule = Rule.of_fields(own["rule"])
        except TypeError as error:
            self._fail("state_dict", "hold a rule of this optimiser in 'ulr'", f"one that cannot be read: {error}")
        check.names(rule.names, self.rule.names)
        parameters = [p for group in self.param_groups for p in group["params"]]
        states = check.tensors(state_dict["state"], parameters, rule)
        super().load_state_dict({"state": states, "param_groups": state_dict["param_groups"]})
        # torch gives floating states the parameters' dtype; those of half-precision weights are fp32 here.
        for index, values in states.items():
            own_state = self.state[parameters[index]]
            own_state.update({name: value.to(parameters[index].device, copy=True) for name, value in values.items()})
        self.seed, self.steps, self._rule = own["seed"], own["steps"], rule
        for argument in ("momentum", "betas"):  # which torch's schedulers look for
            self.defaults.pop(argument, None)
        if rule.state_names():
            argument = "momentum" if rule.betas is None else "betas"
            self.defaults[argument] = getattr(rule, argument)
        for name, value in own["settings"].items():
            setattr(self, name, value)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which go on with the model that was copied along, as torch's do."""
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_names", "_padding")
        } | super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._names, self._padding = parameter_names(self.model), padding_rows(self.model)


@dataclasses.dataclass
class _Used:
    """The use of parameters in the forwards of a micro-batch."""

    forwards: int = 0  # with noise
    names: set[str] = dataclasses.field(default_factory=set)  # of the parameters used in any of these
    common: set[str] = dataclasses.field(default_factory=set)  # in all of these

    def add(self, names: set[str]) -> None:
        self.common = self.common & names if self.forwards else names
        self.names |= names
        self.forwards += 1


def _shortened_list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"

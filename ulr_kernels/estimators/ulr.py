"""ulr.ULR: the gradient of a model's mean loss from noised forward passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ulr_kernels.errors import fail
from ulr_kernels.estimators.allocation import spread
from ulr_kernels.estimators.clean_pass import CleanPass
from ulr_kernels.estimators.data_parallel import DataParallelBatch
from ulr_kernels.estimators.guides import Features, Guides
from ulr_kernels.estimators.mlp_step import run_mlp_step
from ulr_kernels.estimators.noised import Keys
from ulr_kernels.estimators.plan import Plan, look_again, make_plan, settle
from ulr_kernels.estimators.runner import PassRunner
from ulr_kernels.estimators.schedule import Pass, schedule
from ulr_kernels.estimators.settings import Settings
from ulr_kernels.estimators.step_keys import StepKeys, check_seed, check_step
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.nn.affects import Affects, read_affects
from ulr_kernels.nn.batch import Batch, LossFunction
from ulr_kernels.nn.call import finished_gradients
from ulr_kernels.nn.graphs import GraphBatch, Graphs, read_graphs
from ulr_kernels.nn.names import features, unwrapping
from ulr_kernels.nn.running_statistics import RunningStatistics

MOST_PLANS = 512  # bounds the memory of a job whose batches have ever new shapes


class ULR:
    """The unified likelihood ratio estimator (arXiv 2305.08960, Theorem 1) for the layers of a model.

    For a layer v = phi(x; theta) + sigma * eps the gradient of E[L] is E[(L - b) * J^T score(eps)] / sigma, with J the
    Jacobian of phi in its own parameters. Nothing after the layer is differentiated, so activations and losses may be
    steps, spikes, arg-max or accuracy. The estimate is unbiased for the loss of the noised model, whose mean over the
    noise is smooth; with `rademacher` noise (SPSA) only as sigma goes to 0.

    The model is not changed in any way. Its forward must keep the samples on the first axis, and compute each sample
    from its own inputs: in a trial on the first batch, noise on some samples must leave the losses of all others alone.
    Any torch function that brings a trained parameter and samples together is a layer, whose output gets the noise;
    tensors computed from parameters alone (a transpose, a normalised weight) are followed back to them. A layer with no
    trained parameter gets no noise. All forwards run in eval mode: dropout is off and BatchNorm uses its running
    statistics. Where it is in train mode, a step then moves these towards the statistics of the batch without noise,
    which takes one forward without noise.

    An `nn.Sequential` of `nn.Linear` and one of ReLU, Tanh and Sigmoid, with `functools.partial(F.cross_entropy,
    reduction="none")` or `nn.CrossEntropyLoss(reduction="none")` as loss and the same copies for all layers and
    samples, does not run layer by layer: `ulr.ops.noisy_mlp_step` does the step, in one launch on a CUDA device.

    In a `DistributedDataParallel` each rank passes its own micro-batch: noise and `.grad` are those of one process with
    the whole batch, to rounding (where the allocation is even), `no_sync()` is honoured, and micro-batches may differ
    in size (the ranks exchange them, so each call synchronises). All ranks need the same seed.

    Args:
        model: any module; make a new estimator after replacing parts of it.
        sigma: noise scale in units of the layer's output, > 0; a number, or a mapping from layer names to numbers. A
            layer has the qualified name of the module whose own parameters are called weight and bias, else that of the
            parameter. The name of a module stands for all layers in it that have no closer name, "" for all others.
        copies: noised copies of each sample per pass; a number or (layer-wise) such a mapping.
        antithetic: copies come as pairs eps, -eps; the number of copies must be even.
        injection: "layerwise": one pass per layer, in which only that layer is noised; "joint": one pass for all.
        noise: "outputs": noise on the layer's outputs; "weights": on its parameters, W + sigma * eps, which all samples
            of a copy share (evolution strategies: the gradient is E[L * score(eps)] / sigma), for functions that cannot
            have it on their outputs, and layers with fewer weights than outputs; or a mapping from layer names to
            either, in which the others have "outputs". sigma is then in units of the weights.
        dist: "normal", "laplace" or "rademacher".
        sampler: "iid"; "sobol": the copies of a sample are a scrambled Sobol sequence; "hadamard", with
            dist="rademacher": orthogonal signs (docs/noise.md). Their error is (d - M) / M of the gradient's square
            instead of (d + 1) / M, for M directions of d coordinates, none where M is a power of two of at least d.
            That holds for a pass with one noise: with "joint" injection, and for a layer that is called more than once
            (a recurrent one), "iid" has the smaller error. "auto", with dist="rademacher": "hadamard" in passes with
            one noise, "iid" in others.
        baseline: "mean": of the other copies or pairs of the sample; 0 if there are none, so that a single copy needs
            "clean", or its estimates vary with all of the loss; "clean": the loss without noise; "none".
        seed: integer in [-2^63, 2^64). The noise depends on seed, step and layer name alone.
        learn_sigma: ln sigma of each layer that is trained now becomes a parameter (see `parameters`), per feature for
            nn.Linear, nn.Conv1d, nn.Conv2d and normalisation layers, else one; its gradient is
            E[(L - b) * (eps * score - 1)].
        max_rows: the most rows (copies times samples) of one forward, which bounds the memory. None: all on a GPU; on a
            CPU as many that no tensor after the first noise has much more than 4 MiB. Samples are split up where a pair
            of copies of all of them is too much. The gradients are the same. Where noised layers read noised tensors
            (joint injection, a layer called twice) and all copies of a sample do not fit, forwards run once more, for
            the gradients.
        memory: "keep": the tensors that noised layers read are kept until the losses are known; "recompute": nothing is
            kept, and each forward runs once more with known losses, in which a layer adds its gradients as it makes its
            noise again: training in the memory of inference. The gradients are the same, to rounding. Layer-wise the
            second forward has a single copy, and costs little; jointly it is a whole one, in which no activation
            outlives the function that reads it.
        allocation: "even": each sample has `copies`; "neyman" (layer-wise): so many on average at most, in proportion
            to how far noise moves its loss in the pass of the last layer, which comes first and is even. It is
            unbiased, as the noises of layers are independent. A network that is right about most samples needs several
            times fewer copies. A sample's noise is then named by its place after sorting the samples by their number of
            copies (in each rank), and a backward waits once for the device. Noise on weights is left even, as all
            samples share it.
        guide: None; "feedback": each layer has a guess of its output's gradient, B e times the derivative of what
            reads the output (docs/fewer-forwards.md). B is learnt on the way from the estimates themselves; e is
            the derivative of the loss in the clean outputs, or where it has none the outputs and the targets; or a
            function `guide(outputs, targets)` -> e, `[samples, features]`. It makes the error of an estimate several
            times smaller and never biases it. A step runs one forward without noise more. Noise on weights has none.
            Ranks learn one guide from all their samples, also inside `no_sync()`. Shapes of an output, as lengths of
            texts, share a guide: it has a weight for each of at most four parts along each axis beside the features.
        support: "all"; "active": the estimate of the gradient of a layer's output is 0 where the functions that read
            the output let nothing through without noise, nor would with 2 sigma more or less of it: at a ReLU that is
            off, at all elements of a max-pool's window but the winner. That is where the gradient of the loss without
            noise is 0, so the estimate has the error of fewer coordinates, and lacks what noise alone would bring there
            (docs/fewer-forwards.md). For layers whose inputs are the same in all copies; without learnt sigma.
        preset: None; "best": the settings of docs/fewer-forwards.md in the place of those that are left at their
            defaults: orthogonal signs where a pass has one noise, in single copies, the clean loss as baseline, the
            guide, and the active support.

    Attributes:
        model: without wrappers.
        settings: these arguments.
        view: the model's parameters and their names.
        log_sigma: layer -> its learnt ln sigma.

    Raises:
        ValueError: an argument breaks these rules.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float | Mapping[str, float] = 0.1,
        copies: int | Mapping[str, int] = 32,
        *,
        antithetic: bool = False,
        injection: str = "layerwise",
        noise: str | Mapping[str, str] = "outputs",
        dist: str = "normal",
        sampler: str = "iid",
        baseline: str = "mean",
        seed: int = 0,
        learn_sigma: bool = False,
        max_rows: int | None = None,
        memory: str = "keep",
        allocation: str = "even",
        guide: str | Features | None = None,
        support: str = "all",
        preset: str | None = None,
    ) -> None:
        given = dict(
            sigma=sigma,
            copies=copies,
            antithetic=antithetic,
            injection=injection,
            noise=noise,
            dist=dist,
            sampler=sampler,
            baseline=baseline,
            learn_sigma=learn_sigma,
            max_rows=max_rows,
            memory=memory,
            allocation=allocation,
            guide="function" if callable(guide) else guide,
            support=support,
        )
        self.settings = Settings.of_preset(preset, given)
        self._features = guide if callable(guide) else None
        if not isinstance(model, nn.Module):
            fail("model", "be a torch.nn.Module", type(model).__name__)
        *wrappers, self.model = unwrapping(model)
        parallel = [each for each in wrappers if isinstance(each, nn.parallel.DistributedDataParallel)]
        self._parallel = DataParallelBatch(parallel[0]) if parallel else None
        self._keys = StepKeys(seed)
        self._guides = Guides(self._keys.seed, self._features) if self.settings.guide is not None else None
        self._said: set[str] = set()  # notes of plans
        self.log_sigma: dict[str, nn.Parameter] = {}
        self._view_model()
        self.settings.check_names(set(self.view.layers.values()))
        if self.settings.learn_sigma:
            self._make_log_sigma()

    def _view_model(self) -> None:
        """Look at the model by the present settings, with no plan yet."""
        self.view = ModelView.of(self.model, lambda layer: self.settings.noise_of(layer) == "weights")
        self._runner = PassRunner(self.view, self.settings, self.log_sigma)
        self._plans: dict[tuple, Plan] = {}  # by the shapes of a batch
        self._kinds: dict[tuple, Plan] = {}  # the first of those that differ in sizes alone

    def _make_log_sigma(self) -> None:
        shapes = features(self.model)
        for parameter in self.view.parameters:
            name = self.view.layers[id(parameter)]
            if parameter.requires_grad and name not in self.log_sigma:
                start = torch.full(shapes[id(parameter)], self.settings.sigma_of(name), dtype=torch.float32)
                self.log_sigma[name] = nn.Parameter(start.log().to(parameter.device))

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return self.view.device

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self._keys.seed

    @property
    def step(self) -> int:
        """The number of the next step, from 0. It is counted on the model's device: reading it synchronises."""
        return self._keys.step

    @step.setter
    def step(self, value: int) -> None:
        self._keys.step = value

    def parameters(self) -> list[nn.Parameter]:
        """The learnt ln sigma, for an optimiser; empty unless learn_sigma."""
        return list(self.log_sigma.values())

    def sigma(self, layer: str) -> Tensor | float:
        """The noise scale of a layer: the setting, or the learnt one, fp32 `[features]` or `[]`."""
        return self._runner.sigma(layer)

    @torch.inference_mode(False)
    @torch.no_grad()
    def backward(self, x: Any, y: Any = None, loss_fn: LossFunction | None = None, affects: Affects = None) -> Tensor:
        """Add the gradient of the batch's mean noised loss to `.grad` of the trained parameters, and go on by a step.

        Args:
            x: the model's input: a tensor, a tuple (positional arguments) or a mapping (keyword arguments) of tensors
                with samples first; or graphs, which are one sample: an object with `edge_index`, or the arguments of a
                model whose forward names one `edge_index`.
            y: targets: a tensor, or a tuple, list or mapping of such, with samples first; a list or array with an entry
                for each sample; or None.
            loss_fn: `loss_fn(outputs, targets)` -> the loss of each row, `[rows]`, or with `affects` `[rows, losses]`;
                need not be differentiable. It gets all copies of the targets. Trained `nn.Parameter`s of its own, and
                those of the model that it reads past all layers, get autograd's gradient of the mean noised loss.
            affects: for samples with many losses (a graph's nodes, a text's tokens, a series' steps): the losses of a
                sample that the noise of each of its rows in a layer can change. A matrix `[rows, losses]` on the
                model's device, dense or sparse, in which any number but 0 means yes; a dense `[samples, rows, losses]`
                where samples differ; or a mapping from names of layers or modules to such, where the others affect all
                losses, as noise on weights does. Only the losses that a row affects enter its gradient: fewer of them
                are less noise. Extra 1s only add variance; a missing 1 biases the gradient, and is looked for with some
                losses of the first batch of a shape. Rows are those of the layer's output, without its features, in all
                calls of the layer one after the other. A causal text of T tokens has `torch.ones(T, T).triu()`, and
                after its last attention `torch.eye(T)`.

        Returns:
            The mean noised loss (of this rank's samples, if there are ranks), a scalar on the losses' device, detached.
            Reading it is what synchronises, not this call. But before the first gradient of a shape the model runs up
            to nine forwards, most of two copies, and synchronises; for another shape of the same kind of batch
            (another length, fewer samples) two, and one more with `affects`. A few later steps look again whether
            samples mix (docs/networks.md), in two forwards of two copies, and synchronise too.

        Raises:
            ValueError: a batch, a loss or a model breaks the rules. If this shows on the first batch of a shape, no
                gradient has been written; a loss that fails later may leave the gradients of earlier passes.
        """
        loss_fn = self._loss(loss_fn)
        batch = self._batch(x, y, affects)
        if self._parallel is not None:
            batch = self._parallel.locate(batch, self.device)
        plan = self._plan(batch, loss_fn)
        keys = self._keys.of_sites(plan.names, plan.sites)
        self._runner.loss_parameters.clear()
        with finished_gradients([*self.view.parameters, *self.parameters()]):
            losses = run_mlp_step(self._runner, keys, batch, loss_fn, self._guides)
            mean = self._run(plan, keys, batch, loss_fn) if losses is None else losses.mean()
        if self._parallel is not None:
            of_loss = self._runner.loss_parameters.values()
            self._parallel.average([*self.view.parameters, *self.parameters(), *of_loss])
        self._keys.advance()
        return mean

    @torch.inference_mode(False)
    @torch.no_grad()
    def plan(self, x: Any, y: Any = None, loss_fn: LossFunction | None = None, affects: Affects = None) -> Plan:
        """The plan for batches of this shape. Raises the errors that `backward` raises before its first gradient."""
        return self._plan(self._batch(x, y, affects), self._loss(loss_fn))

    @staticmethod
    def _loss(loss_fn: LossFunction | None) -> LossFunction:
        if loss_fn is None:
            fail("loss_fn", "be given", None)
        return loss_fn

    def _batch(self, x: Any, y: Any, affects: Affects) -> Batch:
        graphs = read_graphs(self.model, x)
        if graphs is not None:
            return self._graph_batch(graphs, y, affects)
        batch = Batch(x, y)
        if affects is None:
            return batch
        self._check_affects()
        return Batch(x, y, affects=read_affects(affects, batch.samples, self.device))

    def _graph_batch(self, graphs: Graphs, y: Any, affects: Affects) -> Batch:
        self._check_affects("graphs")
        if self._parallel is not None:
            fail("x", "hold tensors with samples first in a DistributedDataParallel", "graphs")
        return GraphBatch(graphs, y, read_affects(affects, 1, self.device))

    def _check_affects(self, got: str = "one") -> None:
        """Raise `RuleError` if a setting does not go with samples that have many losses."""
        if self.settings.sampler == "sobol":
            fail("affects", "be None where sampler is 'sobol', whose copies are those of whole samples", got)
        if self._guides is not None:
            fail("affects", "be None where there is a guide, which explains the loss of a whole sample", got)
        if self.settings.support != "all":
            fail("affects", "be None where support is 'active', which is that of a whole sample's loss", got)

    def _plan(self, batch: Batch, loss_fn: LossFunction) -> Plan:
        self.view.check_parameters()
        trained = self.view.trained
        signature, kind = (batch.signature, trained), (batch.kind, trained)
        plan = self._plans.get(signature)
        if plan is None:
            for plans in (self._plans, self._kinds):
                if len(plans) == MOST_PLANS:
                    del plans[next(iter(plans))]  # the oldest
            with self._runner.forwards():
                plan = make_plan(self._runner, self._keys, batch, loss_fn, self._kinds.get(kind))
            for note in dict.fromkeys(plan.notes):
                if note not in self._said:
                    warnings.warn(f"ulr.ULR: {note}", stacklevel=4)
                    self._said.add(note)
            self._plans[signature] = plan
            if batch.many:  # with one sample a model may do without the samples' axis, as `squeeze` does
                self._kinds.setdefault(kind, plan)
        else:
            plan.carried.refuse_leftovers()
        return plan

    def _run(self, plan: Plan, keys: Keys, batch: Batch, loss_fn: LossFunction) -> Tensor:
        """Run all passes, add their gradients, and move running statistics; returns the mean loss."""
        statistics = RunningStatistics(self.model)
        with self._runner.forwards():
            mean = self._run_passes(plan, keys, batch, loss_fn, statistics)
        if statistics:
            if self._parallel is not None:
                self._parallel.sum_(statistics.sums())
            statistics.update()
        return mean

    def _run_passes(
        self, plan: Plan, keys: Keys, batch: Batch, loss_fn: LossFunction, statistics: RunningStatistics
    ) -> Tensor:
        s, runner, history = self.settings, self._runner, plan.history
        history.steps += 1
        if history.is_due(sum(pass_.copies for pass_ in plan.passes)):
            look_again(runner, plan, keys, batch, loss_fn)
        history.at_new_shape = False

        def on_functions(called: set[Callable]) -> None:
            """Look again before the gradients of forwards that take another branch."""
            if not called <= history.functions:
                history.functions |= called
                if history.steps > 1:
                    look_again(runner, plan, keys, batch, loss_fn)

        clean = None
        on_outputs = any(pass_.layers for pass_ in plan.passes)
        guides = self._guides if on_outputs else None
        with statistics.watching():
            if guides is not None or (s.support == "active" and on_outputs):
                clean = runner.clean_pass(plan.clean, batch, loss_fn, guides)
            elif s.baseline == "clean" or statistics:
                clean = CleanPass(runner.clean_losses(plan.clean, batch, loss_fn), None, {})
        if guides is not None:
            assert clean is not None
            guides.begin(clean)
        order = range(len(plan.passes))[:: 1 if s.allocation == "even" else -1]
        passes = (settle(runner, plan, which, keys, batch, loss_fn) for which in order)
        means: list[Tensor] = []
        shown: list[Tensor] = []
        known: list[Tensor] = []
        first: Pass | None = None  # the first pass with noise on outputs: its losses show the spreads

        def spreads() -> Tensor | None:
            if shown and not known:
                known.append(spread(torch.cat(shown, 1), s.antithetic).cpu())
            return known[0] if known else None

        once = plan.passes[order[0]][:2]  # the pass that also adds the gradient past all layers
        for part in schedule(passes, batch, s, spreads):
            losses = runner.run_part(part, keys, clean, loss_fn, on_functions, part.pass_[:2] == once, guides)
            means.append(losses.mean() * (part.batch.samples / batch.samples))
            if s.allocation != "even" and not part.pass_.weights and (first is None or first is part.pass_):
                first = part.pass_
                shown.append(losses)
        if guides is not None:
            guides.finish(self._parallel)
        return torch.stack(means).sum() / len(plan.passes)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state that a run goes on from: seed, step, settings, and the learnt ln sigma by layer."""
        return {
            "seed": self.seed,
            "step": self.step,
            "settings": self.settings.to_dict(),
            "log_sigma": {name: value.detach().clone() for name, value in self.log_sigma.items()},
            "guides": self._guides.state_dict() if self._guides is not None else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, its settings included.

        Raises:
            ValueError: it is no estimator's, a value breaks its rule, or layers with learnt sigma differ; nothing is
                set.
        """
        if missing := [name for name in ("seed", "step", "settings", "log_sigma") if name not in state]:
            fail("state", "be that of an estimator", f"none with {', '.join(missing)}")
        seed, step = check_seed(state["seed"]), check_step(state["step"])
        for name in ("settings", "log_sigma"):
            if not isinstance(state[name], Mapping):
                fail("state", f"hold a dict as {name!r}", type(state[name]).__name__)
        try:
            settings = Settings(**state["settings"])
        except TypeError as error:
            fail("state", "hold an estimator's settings", f"some that cannot be read: {error}")
        settings.check_names(set(self.view.layers.values()))
        if settings.guide == "function" and self._features is None:
            fail("state", "be that of an estimator whose 'guide' is no function, as this one's", "one with a function")
        log_sigma = state["log_sigma"]
        shapes = {name: list(value.shape) for name, value in self.log_sigma.items()}
        got = {name: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for name, v in log_sigma.items()}
        if got != shapes:
            fail("state", f"hold ln sigma of the shapes {shapes}", got)
        self.settings, self._keys.seed, self.step = settings, seed, step
        for name, value in log_sigma.items():
            self.log_sigma[name].copy_(value)
        self._guides = Guides(seed, self._features) if settings.guide is not None else None
        if self._guides is not None and state.get("guides"):
            self._guides.load_state_dict(state["guides"], self.device)
        self._view_model()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which go on with the model that was copied along."""
        made_again = ("view", "_runner", "_plans", "_kinds")
        return {name: value for name, value in self.__dict__.items() if name not in made_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view_model()

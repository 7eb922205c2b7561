"""ulr.ULR: the gradient of a model's mean loss from noised forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ulr_kernels import contract, ops
from ulr_kernels.baselines import loss_weights
from ulr_kernels.estimators.allocation import groups, spread
from ulr_kernels.estimators.batch import Batch, LossFunction, apply, joined, repeat
from ulr_kernels.estimators.chunks import chunks_of, in_order, of_chunk, parts_of
from ulr_kernels.estimators.evaluation import evaluation
from ulr_kernels.estimators.mlp import losses_of_step
from ulr_kernels.estimators.noised import Finished, NoisedPass, Replay
from ulr_kernels.estimators.plan import Pass, Plan, make_plan, settle
from ulr_kernels.estimators.prefix import Prefix
from ulr_kernels.estimators.reach import Given, Weights, read_reach
from ulr_kernels.estimators.replicas import Replicas
from ulr_kernels.estimators.settings import Settings, fail
from ulr_kernels.estimators.weights import WeightNoise
from ulr_kernels.nn.call import Noise
from ulr_kernels.nn.linear import LinearCall, add_gradients
from ulr_kernels.nn.names import features, layer_names, parameter_names, unwrapping
from ulr_kernels.optim.probing import Probing, Site

MOST_PLANS = 64  # a job whose batches have ever new shapes must not fill the memory


class ULR:
    """The unified likelihood ratio estimator (arXiv 2305.08960, Theorem 1) for the layers of a model.

    For a layer v = phi(x; theta) + sigma * eps the gradient of E[L] is E[(L - b) * J^T score(eps)] / sigma, with J the
    Jacobian of phi in its own parameters: nothing after the layer is differentiated, so that activations and losses may
    be steps, spikes, arg-max or accuracy. It is unbiased for the loss of the noised model, whose mean over the noise is
    smooth; `rademacher` noise (SPSA) only as sigma goes to 0.

    The model is not changed in any way. Its forward must keep the samples on the first axis, and compute each from its
    own inputs: on the first batch, noise on some samples is tried to leave the losses of all others alone.
    Any torch function that brings a trained parameter and samples together is a layer, whose output gets
    the noise; tensors computed from parameters alone (a transpose, a normalised weight) are followed back to them. A
    layer with no trained parameter gets no noise. Noised passes run in eval mode: dropout is off and BatchNorm uses its
    running statistics.

    An `nn.Sequential` of `nn.Linear` and one of ReLU, Tanh and Sigmoid, with `functools.partial(F.cross_entropy,
    reduction="none")` or `nn.CrossEntropyLoss(reduction="none")` as loss and the same copies for all layers and
    samples, is not run layer by layer: `ulr.ops.noisy_mlp_step` does the step, which is one launch on a CUDA device.

    In a `DistributedDataParallel` each rank passes its own micro-batch: noise and `.grad` are those of one process with
    the whole batch, to rounding (where the allocation is even), `no_sync()` is honoured, and micro-batches may differ
    in size (which is exchanged, so that each call synchronises). All ranks need the same seed.

    Args:
        model: any module; make a new estimator after replacing parts of it.
        sigma: noise scale in units of the layer's output, > 0; a number or a mapping from layer names (the qualified
            name of the module whose own parameters are called weight and bias; else of the parameter) to numbers. The
            name of a module stands for all layers in it that are not named more closely, "" for all others.
        copies: noised copies of each sample per pass; a number or (layer-wise) such a mapping.
        antithetic: copies come as pairs eps, -eps; the number of copies must be even.
        injection: "layerwise": one pass per layer, in which only that layer is noised; "joint": one pass for all.
        noise: "logits": noise on the layer's outputs; "weights": on its parameters, W + sigma * eps, which all samples
            of a copy share (evolution strategies: the gradient is E[L * score(eps)] / sigma), for functions that cannot
            have it on their outputs, and layers with fewer weights than outputs; or a mapping from layer names to
            either, in which the others have "logits". sigma is then in units of the weights.
        dist: "normal", "laplace" or "rademacher".
        sampler: "iid", or "sobol": the copies of a sample are a scrambled Sobol sequence.
        baseline: "mean": of the other copies or pairs of the sample, nothing where there are none (one copy then needs
            "clean", or its estimates vary with all of the loss); "clean": the loss without noise; "none".
        seed: integer in [-2^63, 2^64). Seed, step and layer name are all that enters the noise.
        learn_sigma: ln sigma of each layer that is trained now becomes a parameter (see `parameters`), per feature for
            nn.Linear, nn.Conv1d, nn.Conv2d and normalisation layers, else one; its gradient is
            E[(L - b) * (eps * score - 1)].
        max_rows: the most rows (copies times samples) that the model is given at once, so that memory is bounded; None:
            all on a GPU, on a CPU so many that no tensor behind the first noise has much more than 4 MiB. Samples are
            split up where all copies or a pair of copies of all of them are too many. The gradients are the same. Where
            noised layers read what noise has changed (joint injection, a layer called twice) and there is no room for
            all copies of a sample, forwards run once more, for the gradients.
        memory: "keep": what the noised layers read is kept until the losses are known; "replay": nothing is, and each
            forward runs once more with known losses, in which a layer adds its gradients as it makes its noise again:
            training in the memory of inference. The gradients are the same, to rounding. Layer-wise the second forward
            ends at its layer, and costs little; jointly it is a whole one, and no activation outlives what reads it.
        allocation: "even": each sample has `copies`; "neyman" (layer-wise): at most so many on average, the more the
            further noise moves its loss, as the pass of the last layer shows, which comes first and is even. It is
            unbiased, as layers' noises are independent; a network that is right about most samples needs several times
            fewer copies. A sample's noise is then named by its place among those ordered by copies (in each rank), and
            a backward waits once for the device. Noise on weights, which all samples share, is left alone.

    Raises:
        ValueError: an argument breaks these rules.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float | Mapping[str, float] = 0.1,
        copies: int | Mapping[str, int] = 32,
        antithetic: bool = True,
        injection: str = "layerwise",
        noise: str | Mapping[str, str] = "logits",
        dist: str = "normal",
        sampler: str = "iid",
        baseline: str = "mean",
        seed: int = 0,
        learn_sigma: bool = False,
        max_rows: int | None = None,
        memory: str = "keep",
        allocation: str = "even",
    ) -> None:
        self.settings = Settings(
            sigma,
            copies,
            antithetic,
            injection,
            noise,
            dist,
            sampler,
            baseline,
            learn_sigma,
            max_rows,
            memory,
            allocation,
        )
        if not isinstance(model, nn.Module):
            fail("model", "be a torch.nn.Module", type(model).__name__)
        *wrappers, self.model = unwrapping(model)
        parallel = [each for each in wrappers if isinstance(each, nn.parallel.DistributedDataParallel)]
        self._replicas = Replicas(parallel[0]) if parallel else None
        _check_seed(seed)
        self.seed = seed
        with torch.inference_mode(False):  # a tensor that may be written to later
            self._step = torch.zeros((), dtype=torch.int64)  # on the model's device: a CUDA graph can advance it
        self.model_parameters = list(self.model.parameters())  # keeps them alive: they are matched by identity
        self.layers, self.names = layer_names(self.model), parameter_names(self.model)
        self.settings.check_names(set(self.layers.values()))
        self.log_sigma = self._make_log_sigma() if learn_sigma else {}
        self._plans: dict[tuple, Plan] = {}  # by the shapes of a batch
        self._kinds: dict[tuple, Plan] = {}  # the first of those that differ in sizes alone
        self.weights: dict[str, nn.Parameter] = {}  # those that have noise themselves, by name
        self.followed: list[nn.Parameter] = []  # the others: calls of layers are known by them
        self.riders: dict[str, str] = {}  # layer -> the layer whose noise serves it too, in the latest new batch

    def _make_log_sigma(self) -> dict[str, nn.Parameter]:
        log_sigma: dict[str, nn.Parameter] = {}
        shapes = features(self.model)
        for parameter in self.model_parameters:
            name = self.layers[id(parameter)]
            if parameter.requires_grad and name not in log_sigma:
                start = torch.full(shapes[id(parameter)], self.settings.sigma_of(name), dtype=torch.float32)
                log_sigma[name] = nn.Parameter(start.log().to(parameter.device))
        return log_sigma

    @property
    def device(self) -> torch.device:
        """The model's, of its first parameter."""
        return self.model_parameters[0].device

    @property
    def step(self) -> int:
        """The number of the next step, from 0. It is counted on the model's device: reading it synchronises."""
        return int(self._step)

    @step.setter
    def step(self, value: int) -> None:
        _check_step(value)
        self._step.fill_(value)

    def parameters(self) -> list[nn.Parameter]:
        """The learnt ln sigma, for an optimiser; empty unless learn_sigma."""
        return list(self.log_sigma.values())

    def sigma(self, layer: str) -> Tensor | float:
        """The noise scale of a layer: the setting, or what has been learnt, fp32 `[features]` or `[]`."""
        if layer in self.log_sigma:
            return self.log_sigma[layer].detach().exp()
        return self.settings.sigma_of(layer)

    @torch.inference_mode(False)
    @torch.no_grad()
    def backward(self, x: Any, y: Any, loss_fn: LossFunction, reach: Given = None) -> Tensor:
        """Add the gradient of the batch's mean noised loss to `.grad` of the trained parameters, and go on by a step.

        Args:
            x: the model's input: a tensor, a tuple (positional arguments) or a dict (keyword arguments) of tensors with
                samples first.
            y: targets: a tensor, tuple or dict of tensors with samples first, or None.
            loss_fn: `loss_fn(outputs, targets)` -> the loss of each row, `[rows]`, or with `reach` `[rows, losses]`;
                need not be differentiable. It gets all copies of the targets.
            reach: for samples that are a graph, a text, a series: which of a sample's losses (of its nodes, tokens,
                steps) the noise of each of its rows in a layer can change. A matrix `[rows, losses]` on the model's
                device, dense or sparse, of which any number but 0 says that it can; a dense `[samples, rows, losses]`
                where samples differ; or a mapping from names of layers or modules to such, where the others reach all
                losses, as noise on weights does. A row's noise is then weighed by the losses that it reaches alone, of
                which fewer are less noise. A matrix with too many 1s is right, too; one with a 0 too many is not, for
                which some losses of the first batch of a shape are tried. Rows are the output's, without its features,
                in all calls of the layer one behind the other. A causal text of T tokens: `torch.ones(T, T).triu()`,
                and behind its last attention `torch.eye(T)`.

        Returns:
            The mean noised loss (of this rank's samples, if there are ranks), a scalar on the losses' device, detached.
            Reading it is what synchronises, not this. Before the first gradient of a shape a few forwards of two copies
            are run and synchronise: at most eight, in which noise on some samples in all layers at once must leave the
            losses of all others alone; for another shape of a batch of the same kind (another length, fewer samples)
            one, and one more where there is a reach.

        Raises:
            ValueError: a batch, a loss or a model that breaks the rules. What the first batch of a shape shows is
                raised before any gradient is written; a loss that fails later may leave those of passes before.
        """
        batch = self._batch(x, y, reach)
        if self._replicas is not None:
            self._replicas.place(batch, self.device)
        with evaluation(self.model):
            plan = self._plan(batch, loss_fn)
            keys = self.keys(plan.names, plan.sites)
            losses = losses_of_step(self, keys, batch, loss_fn)
            mean = self._passes(plan, keys, batch, loss_fn) if losses is None else losses.mean()
        if self._replicas is not None:
            self._replicas.average([*self.model_parameters, *self.parameters()])
        self._step.add_(1)
        return mean

    @torch.inference_mode(False)
    @torch.no_grad()
    def look(self, x: Any, y: Any, loss_fn: LossFunction, reach: Given = None) -> Plan:
        """The passes that a batch like this asks for. Raises what `backward` raises about the first of a shape."""
        batch = self._batch(x, y, reach)
        with evaluation(self.model):
            return self._plan(batch, loss_fn)

    def _batch(self, x: Any, y: Any, reach: Given) -> Batch:
        batch = Batch(x, y)
        batch.reach = read_reach(reach, batch.samples, self.device)
        if reach is not None and self.settings.sampler == "sobol":
            fail("reach", "be None where sampler is 'sobol', whose copies are those of whole samples", "one")
        return batch

    def _passes(self, plan: Plan, keys: Mapping[str, Tensor], batch: Batch, loss_fn: LossFunction) -> Tensor:
        """All passes and their gradients, layer by layer; the mean loss."""
        s = self.settings
        clean = self._clean(plan.clean, batch, loss_fn) if s.baseline == "clean" else None
        if s.allocation == "even":
            settled = (settle(self, plan, which, keys, batch) for which in range(len(plan.passes)))
            return torch.stack([self._pass(item, keys, batch, clean, loss_fn).mean() for item in settled]).mean()
        means, spreads = [], None
        for which in reversed(range(len(plan.passes))):
            item = settle(self, plan, which, keys, batch)
            if spreads is None or item.weights:  # noise on weights is all samples'
                losses = self._pass(item, keys, batch, clean, loss_fn)
                means.append(losses.mean())
                spreads = spreads if item.weights else spread(losses, s.antithetic).cpu()
            else:
                means.append(self._pass_of_groups(item, keys, batch, clean, loss_fn, spreads))
        return torch.stack(means).mean()

    def _pass_of_groups(
        self,
        item: Pass,
        keys: Mapping[str, Tensor],
        batch: Batch,
        clean: Tensor | None,
        loss_fn: LossFunction,
        spreads: Tensor,
    ) -> Tensor:
        """One pass in which samples differ in their number of copies; the mean loss."""
        s = self.settings
        # A single draw has no baseline; it needs none where a pair of equal inputs cancels it, as for weights.
        least = s.by_draw * (1 if s.antithetic and item.shared and not s.learn_sigma else 2)
        place, means = 0, []
        for group in groups(spreads, item.copies, least, s.by_draw):
            part = batch.select(group.samples, place)
            place += part.samples
            of_part = None if clean is None else clean[group.samples.to(clean.device)]
            many = part.samples > 1  # a model may treat a single row differently, as `squeeze` does
            of_group = item._replace(copies=group.copies, cut=item.cut and many, resumes=item.resumes and many)
            losses = self._pass(of_group, keys, part, of_part, loss_fn)
            means.append(losses.mean() * (part.samples / batch.samples))
        return torch.stack(means).sum()

    def _clean(self, item: Pass, batch: Batch, loss_fn: LossFunction) -> Tensor:
        """The losses without noise, `[samples]` or `[samples, losses]`."""
        parts = [batch.part(rows) for rows in parts_of(batch.samples, item.part)]
        return torch.cat([part.losses(self.noised(item, {}, part, 1, keep=False)[1], loss_fn, 1)[0] for part in parts])

    def _pass(
        self, item: Pass, keys: Mapping[str, Tensor], batch: Batch, clean: Tensor | None, loss_fn: LossFunction
    ) -> Tensor:
        """One pass and its gradients; the losses, `[copies, samples]` or `[copies, samples, losses]`."""
        found = []
        for rows in parts_of(batch.samples, item.part):
            of_part = None if clean is None else clean[rows]
            found.append(self._accumulate(item, keys, batch.part(rows), of_part, loss_fn))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _accumulate(
        self, item: Pass, keys: Mapping[str, Tensor], batch: Batch, clean: Tensor | None, loss_fn: LossFunction
    ) -> Tensor:
        """One pass over some samples, and its gradients; their losses."""
        s = self.settings
        chunks = chunks_of(item.copies, batch.samples, item.rows, s.by_draw)
        replays = bool(item.layers) and (s.memory == "replay" or (len(chunks) > 1 and not item.shared))
        parts, kept, prefix = [], None, Prefix() if item.resumes and len(chunks) > 1 else None
        for draw, size in chunks:
            keep = not replays and kept is None  # what one chunk reads is what all read
            noised, outputs = self.noised(item, keys, batch, size, draw, keep=keep, prefix=prefix)
            parts.append(batch.losses(outputs, loss_fn, size))
            del outputs  # before the next chunk makes its own
            kept = noised if keep else kept
        losses = in_order(parts, s.antithetic)
        weights = loss_weights(losses, clean, s.baseline, s.antithetic)
        weights *= batch.share
        of_all = self._weights(item, batch, weights)
        if item.weights:
            self._weight_noise(item, keys).add_gradients(of_all.of_samples)
        if kept is not None:
            self._add_gradients(kept, item, of_all)
        elif len(noised.order) == 1:  # it reads what no noise has changed
            self._replay(item._replace(cut=True), keys, batch, weights, 0, noised.order)
        else:
            for draw, size in chunks:
                part = of_chunk(weights, draw, size, s.antithetic)
                self._replay(item, keys, batch, part, draw, noised.order)
        return losses

    @staticmethod
    def _weights(item: Pass, batch: Batch, loss_weight: Tensor) -> Weights:
        return Weights(loss_weight, batch.reach, item.noise_rows, item.riders)

    def _add_gradients(self, noised: NoisedPass, item: Pass, weights: Weights) -> None:
        for kept in noised.calls:
            kept.call.check_unchanged()
        log_sigma = self._learnt(item)
        together = []
        for layer, number, call in noised.calls:
            if isinstance(call, LinearCall) and layer not in log_sigma:
                together.append((call, weights.of(layer, number)))
            else:
                call.add_gradient(weights.of(layer, number), 0, log_sigma.get(layer))
        add_gradients(together, 0)

    def _replay(
        self, item: Pass, keys: Mapping[str, Tensor], batch: Batch, weights: Tensor, draw: int, order: list[str]
    ) -> None:
        """The forward once more, with known losses; each layer adds its gradients as it goes."""
        replay = Replay(self._weights(item, batch, weights), self._learnt(item), order)
        try:
            noised, _ = self.noised(item, keys, batch, weights.shape[0], draw, keep=False, replay=replay)
        except Finished:
            return
        noised.check_order(order)

    def _learnt(self, item: Pass) -> dict[str, nn.Parameter]:
        """The ln sigma that a pass gives gradients; a rider's noise has its lead's."""
        return {layer: value for layer, value in self.log_sigma.items() if layer not in item.riders}

    def noised(
        self,
        item: Pass,
        keys: Mapping[str, Tensor],
        batch: Batch,
        copies: int,
        draw: int = 0,
        *,
        keep: bool = True,
        replay: Replay | None = None,
        prefix: Prefix | None = None,
        noisy: Callable[[str, int], Tensor] | None = None,
    ) -> tuple[NoisedPass, Any]:
        """One forward of a pass, for `copies` copies from a draw on; and the model's output."""
        s = self.settings
        noises = {
            layer: Noise(self.sigma(layer), keys[layer], copies, s.antithetic, s.dist, s.sampler, draw, batch.first)
            for layer in item.layers
            if layer not in item.riders
        }

        def forward(probing: Probing | None, inputs: Any) -> tuple[NoisedPass, Any]:
            arguments = (self.layers, self.followed, inputs, noises, item.riders, batch.samples)
            noised = NoisedPass(
                *arguments, cut=item.cut, keep=keep, replay=replay, probing=probing, prefix=prefix, noisy=noisy
            )
            with noised:
                return noised, apply(self.model, inputs)

        if not item.weights:
            return forward(None, repeat(batch.x, 1 if item.cut else copies))
        on_weights = self._weight_noise(item, keys)
        if not item.apart:
            return forward(on_weights.together(self.model, copies, draw, batch.samples), repeat(batch.x, copies))
        done = [forward(mode, repeat(batch.x, 1)) for mode in on_weights.by_copy(self.model, copies, draw)]
        return done[0][0], joined([outputs for _, outputs in done])

    def _weight_noise(self, item: Pass, keys: Mapping[str, Tensor]) -> WeightNoise:
        def site(name: str, parameter: nn.Parameter) -> Site:
            sigma = self.settings.sigma_of(self.layers[id(parameter)])
            scale = torch.full((), sigma, dtype=torch.float32, device=parameter.device)
            return Site(name, parameter, keys[name].to(parameter.device), scale, None)

        sites = [site(name, self.weights[name]) for name in item.weights]
        return WeightNoise(sites, self.settings.antithetic, self.settings.dist)

    def keys(self, layers: tuple[str, ...], sites: Tensor) -> dict[str, Tensor]:
        """The site keys of this step, made on the device from the step that is counted there."""
        if self._step.device != sites.device:  # the model has been moved
            self._step = self._step.to(sites.device)
        seed = torch.full((), contract.signed64(self.seed), dtype=torch.int64, device=sites.device)
        return dict(zip(layers, ops.fold_in(ops.fold_in(seed, self._step), sites).unbind(), strict=True))

    def _plan(self, batch: Batch, loss_fn: LossFunction) -> Plan:
        """What a batch of these shapes does in this model; and which parameters have noise themselves."""
        on_weights = {id(p) for p in self.model_parameters if self.settings.noise_of(self.layers[id(p)]) == "weights"}
        self.weights = {self.names[id(p)]: p for p in self.model_parameters if p.requires_grad and id(p) in on_weights}
        self.followed = [p for p in self.model_parameters if id(p) not in on_weights]
        if [*map(id, self.model.parameters())] != [*map(id, self.model_parameters)]:
            fail("model", "have the parameters that it had (make a new estimator after replacing any)", "other ones")
        trained = tuple(p.requires_grad for p in self.model_parameters)
        signature, kind = (batch.signature, trained), (batch.kind, trained)
        plan = self._plans.get(signature)
        if plan is None:
            for plans in (self._plans, self._kinds):
                if len(plans) == MOST_PLANS:
                    plans.clear()
            plan = self._plans[signature] = make_plan(self, batch, loss_fn, self._kinds.get(kind))
            if batch.samples > 1:  # with one sample a model may do without the samples' axis, as `squeeze` does
                self._kinds.setdefault(kind, plan)
        return plan

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on: seed, step, settings, and the learnt ln sigma by layer."""
        return {
            "seed": self.seed,
            "step": self.step,
            "settings": self.settings.to_dict(),
            "log_sigma": {name: value.detach().clone() for name, value in self.log_sigma.items()},
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
        _check_seed(state["seed"])
        _check_step(state["step"])
        for name in ("settings", "log_sigma"):
            if not isinstance(state[name], Mapping):
                fail("state", f"hold a dict as {name!r}", type(state[name]).__name__)
        try:
            settings = Settings(**state["settings"])
        except TypeError as error:
            fail("state", "hold an estimator's settings", f"some that cannot be read: {error}")
        settings.check_names(set(self.layers.values()))
        log_sigma = state["log_sigma"]
        shapes = {name: list(value.shape) for name, value in self.log_sigma.items()}
        got = {name: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for name, v in log_sigma.items()}
        if got != shapes:
            fail("state", f"hold ln sigma of the shapes {shapes}", got)
        self.settings, self.seed, self.step = settings, state["seed"], state["step"]
        for name, value in log_sigma.items():
            self.log_sigma[name].copy_(value)
        self._plans.clear()
        self._kinds.clear()


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        fail("seed", "be an integer in [-2^63, 2^64)", repr(seed))


def _check_step(step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**63:
        fail("step", "be an integer in [0, 2^63)", repr(step))

"""Runs the passes of a step: forwards with noise, and the gradients from their losses."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ulr_kernels.baselines import loss_weights
from ulr_kernels.errors import RuleError, fail
from ulr_kernels.estimators.clean_pass import CleanForward, CleanPass, Rows, Site, of_rows
from ulr_kernels.estimators.clean_prefix import CleanPrefixCache
from ulr_kernels.estimators.guides import Guides, error_features
from ulr_kernels.estimators.noised import CannotExpandLate, FirstPass, ForwardSpec, Keys, NoisedForward
from ulr_kernels.estimators.record import Record
from ulr_kernels.estimators.schedule import Part, Pass, chunks_of, in_order, of_chunk, parts_of
from ulr_kernels.estimators.settings import Settings
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.estimators.weight_noise import WeightNoise
from ulr_kernels.nn.affects import RowWeights
from ulr_kernels.nn.batch import Batch, LossFunction
from ulr_kernels.nn.call import Noise, NoiseSite, also_finished, gradient_buffer, leaves_of, without_hooks
from ulr_kernels.nn.eval_mode import eval_mode
from ulr_kernels.nn.module_state import ModuleState
from ulr_kernels.nn.perturbed import NoisedParameter, PerturbedWeights


class PassRunner:
    """Runs forwards of a model with noise.

    Attributes:
        view: of the model.
        settings: of the estimator.
        log_sigma: layer -> its learnt ln sigma.
        loss_parameters: by their ids, those that are not the model's and have got gradients in this step.
        state: of the model's modules; in a block of `forwards` alone.
    """

    state: ModuleState

    def __init__(self, view: ModelView, settings: Settings, log_sigma: Mapping[str, nn.Parameter]) -> None:
        self.view, self.settings, self.log_sigma = view, settings, log_sigma
        self.loss_parameters: dict[int, Tensor] = {}
        self._early: set[tuple[str, ...]] = set()  # the layers of passes that turned out not to expand late

    def sigma(self, layer: str) -> Tensor | float:
        """The noise scale of a layer: the setting, or the learnt one, fp32 `[features]` or `[]`."""
        if layer in self.log_sigma:
            return self.log_sigma[layer].detach().exp()
        return self.settings.sigma_of(layer)

    @contextlib.contextmanager
    def forwards(self) -> Iterator[None]:
        """The block in which this runs forwards. After it the model's modules are as before."""
        with eval_mode(self.view.model), without_hooks(self.view.parameters):
            self.state = ModuleState(self.view.model)
            try:
                yield
            finally:
                self.state.restore()
                del self.state

    # --- forwards ----------------------------------------------------------------------------------------------------

    def run_pass(
        self, spec: ForwardSpec, use: Callable[[Any, int], Any] = lambda *_: None
    ) -> tuple[NoisedForward, list[Any]]:
        """Run a pass of all copies: by one forward, or where the pass says so by one for each copy.

        Args:
            spec: what to run.
            use: called with the model's output, copies major, and its number of copies after each forward, while the
                modules still have what this forward left there.

        Returns:
            The (first) forward, and what `use` returned for each.
        """
        pass_, keys, batch, copies = spec.pass_, spec.keys, spec.batch, spec.copies
        s, model = self.settings, self.view.model
        noises = {
            layer: Noise(
                self.sigma(layer), keys[layer], copies, s.antithetic, s.dist, pass_.sampler, spec.draw, batch.first
            )
            for layer in pass_.layers
            if layer not in pass_.shared_noise
        }

        def run(perturbed: PerturbedWeights | None, inputs: Any, copies: int, spec: ForwardSpec = spec) -> tuple:
            forward = NoisedForward(self.view, spec, inputs, noises, perturbed)
            return forward, use(forward.run(model, inputs, self.state), copies)

        if not pass_.weights:
            forward, result = run(None, batch.inputs(1 if pass_.expand_late else copies), copies)
            return forward, [result]
        weights = self._weight_noise(pass_, keys)
        if not pass_.one_copy_per_forward:
            mode = weights.all_copies(model, copies, spec.draw, batch.samples)
            forward, result = run(mode, batch.inputs(copies), copies)
            return forward, [result]
        records = [Record(batch.samples) for _ in range(copies)]
        done = [
            run(mode, batch.inputs(1), 1, spec._replace(record=record if spec.record else None))
            for mode, record in zip(weights.by_copy(model, copies, spec.draw), records, strict=True)
        ]
        if spec.record is not None:
            spec.record.add_copies(records)
        return done[0][0], [result for _, result in done]

    def run_losses(self, spec: ForwardSpec, loss_fn: LossFunction) -> tuple[NoisedForward, Tensor]:
        """Run a pass; returns the (first) forward and the losses, fp32 `[copies, samples]`, or with `affects` more."""
        forward, found = self.run_pass(spec, lambda outputs, copies: spec.batch.losses(outputs, loss_fn, copies))
        return forward, torch.cat(found)

    def clean_losses(self, pass_: Pass, batch: Batch, loss_fn: LossFunction) -> Tensor:
        """The losses without noise, fp32 `[samples]` or `[samples, losses]`; `pass_` bounds the memory."""
        parts = [batch.part(rows, rows.start) for rows in parts_of(batch.samples, pass_.max_samples)]
        return torch.cat([self.run_losses(ForwardSpec(pass_, {}, part, 1), loss_fn)[1][0] for part in parts])

    def clean_pass(self, pass_: Pass, batch: Batch, loss_fn: LossFunction, guides: Guides | None) -> CleanPass:
        """A forward without noise: losses, gates, and with guides features; `pass_` bounds the memory."""

        def sigma(layer: str) -> float | Tensor:
            scale = self.sigma(layer)
            return scale.max() if isinstance(scale, Tensor) else scale

        found = []
        for rows in parts_of(batch.samples, pass_.max_samples):
            part = batch.part(rows, rows.start)
            inputs = part.inputs(1)
            forward = CleanForward(self.view, inputs, sigma, self.settings.support == "active")
            outputs = forward.run(self.view.model, inputs, self.state)
            gates = forward.gates()
            if guides is None:
                found.append(CleanPass(batch.losses(outputs, loss_fn, 1)[0], None, gates))
            else:
                found.append(CleanPass(*error_features(outputs, part, loss_fn, guides.features), gates))
        return CleanPass.joined(found)

    def losses_and_direct_gradients(
        self, batch: Batch, outputs: Any, loss_fn: LossFunction, copies: int
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]], list[weakref.ref[Tensor]]]:
        """The losses as `Batch.losses` gives them, and the gradients of their mean in the parameters that the loss
        depends on past all layers: through `loss_fn`, which may have parameters of its own (a learnt temperature, the
        centres of classes), or an output that is computed from parameters alone.

        Returns:
            The losses; id(parameter) -> (parameter, gradient); and weak references to other tensors that require a
            gradient, which get none. A tensor that the loss has made itself is gone by then.
        """
        with torch.enable_grad():
            losses = batch.losses(outputs, loss_fn, copies)
            mean = losses.mean()
        leaves = {id(leaf): leaf for leaf in leaves_of(mean) if leaf.requires_grad}.values()
        trained = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
        others = [weakref.ref(leaf) for leaf in leaves if not isinstance(leaf, nn.Parameter)]
        if not trained:
            return losses.detach(), {}, others
        with without_hooks(trained):
            found = torch.autograd.grad(mean, trained, retain_graph=True, allow_unused=True)
        pairs = zip(trained, found, strict=True)
        return losses.detach(), {id(p): (p, gradient) for p, gradient in pairs if gradient is not None}, others

    def _weight_noise(self, pass_: Pass, keys: Keys) -> WeightNoise:
        s = self.settings

        def noised(name: str) -> NoisedParameter:
            parameter = self.view.noised[name]
            sigma = self.settings.sigma_of(self.view.layers[id(parameter)])
            scale = torch.full((), sigma, dtype=torch.float32, device=parameter.device)
            key, still = keys[name].to(parameter.device), self.view.padding.get(name)
            return NoisedParameter(name, parameter, key, scale, None, still)

        return WeightNoise([noised(name) for name in pass_.weights], s.antithetic, s.dist, pass_.sampler)

    # --- gradients ---------------------------------------------------------------------------------------------------

    def run_part(
        self,
        part: Part,
        keys: Keys,
        clean: CleanPass | None,
        loss_fn: LossFunction,
        on_functions: Callable[[set[Callable]], object],
        direct: bool = False,
        guides: Guides | None = None,
    ) -> Tensor:
        """Run all forwards of a part and add its gradients to `.grad`.

        Args:
            part: samples and their pass.
            keys: of this step.
            clean: of the whole batch, for the baseline "clean", guides and supports.
            loss_fn: the user's.
            on_functions: called with the functions of samples that the forwards have called, before any gradient.
            direct: add the gradient of the part of the loss that depends on parameters past all layers too.
            guides: of this step, if there are any.

        Returns:
            The losses, fp32 `[copies, samples]` or `[copies, samples, losses]`.
        """
        if part.pass_.layers in self._early:
            part = part._replace(pass_=part.pass_._replace(expand_late=False, reuses_prefix=False))
        try:
            return self._run_part(part, keys, clean, loss_fn, on_functions, direct, guides)
        except CannotExpandLate:  # from a first forward: nothing has been added
            self._early.add(part.pass_.layers)
            return self.run_part(part, keys, clean, loss_fn, on_functions, direct, guides)

    def _run_part(
        self,
        part: Part,
        keys: Keys,
        clean: CleanPass | None,
        loss_fn: LossFunction,
        on_functions: Callable[[set[Callable]], object],
        direct: bool,
        guides: Guides | None,
    ) -> Tensor:
        s, pass_, batch = self.settings, part.pass_, part.batch
        chunks = chunks_of(pass_.copies, batch.samples, pass_.max_rows, s.copies_per_draw)
        recompute = bool(pass_.layers) and (s.memory == "recompute" or (len(chunks) > 1 and not pass_.shared_inputs))
        prefix = CleanPrefixCache() if pass_.reuses_prefix and len(chunks) > 1 else None
        spec = ForwardSpec(pass_, keys, batch, pass_.copies, prefix=prefix)
        found, kept = [], None
        functions: set[Callable] = set()
        past_layers: list[tuple[dict[int, tuple[Tensor, Tensor]], float]] = []

        def losses_of(outputs: Any, copies: int) -> Tensor:
            if not direct:
                return batch.losses(outputs, loss_fn, copies)
            losses, gradients, _ = self.losses_and_direct_gradients(batch, outputs, loss_fn, copies)
            past_layers.append((gradients, copies / pass_.copies))
            return losses

        for draw, copies in chunks:
            keep = not recompute and kept is None  # all chunks read the same
            with self._naming_rows(batch, copies, loss_fn):
                forward, of_forwards = self.run_pass(spec._replace(copies=copies, draw=draw, keep=keep), losses_of)
            found.append(torch.cat(of_forwards))
            functions |= forward.functions
            kept = forward if keep else kept
        on_functions(functions)
        losses = in_order(found, s.antithetic)
        for gradients, share in past_layers:
            own = {key: parameter for key, (parameter, _) in gradients.items() if key not in self.view.names}
            self.loss_parameters.update(own)
            also_finished(own.values())
            for parameter, gradient in gradients.values():
                gradient_buffer(parameter).add_(gradient, alpha=share * batch.share)
        weights, added, deltas = self._estimates(part, forward.sites, losses, clean, guides)
        row_weights = self._row_weights(pass_, batch, weights)
        if pass_.weights:
            self._weight_noise(pass_, keys).add_gradients(row_weights.of_samples)
        if kept is not None:
            self._add_gradients(kept, pass_, row_weights, added, deltas)
        elif len(forward.order) == 1:  # its inputs have no noise: one forward serves all copies
            spec = spec._replace(pass_=pass_._replace(expand_late=True), prefix=None)
            self._recompute(spec, weights, forward.order, added, deltas)
        else:
            for draw, copies in chunks:
                of_draws = of_chunk(weights, draw, copies, s.antithetic)
                share = copies / pass_.copies
                of_copies = ({site: each * share for site, each in gradients.items()} for gradients in (added, deltas))
                chunk = spec._replace(copies=copies, draw=draw, prefix=None)
                self._recompute(chunk, of_draws, forward.order, *of_copies)
        return losses

    @contextlib.contextmanager
    def _naming_rows(self, batch: Batch, copies: int, loss_fn: LossFunction) -> Iterator[None]:
        """Name the rule where torch raises an error in a forward of many rows, and none in one of two copies."""
        try:
            yield
        except (RuleError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            try:
                self.run_losses(ForwardSpec(Pass((), (), 2, {}, {}), {}, batch, 2), loss_fn)
            except Exception:
                raise error from None
            if copies <= 2:
                raise
            fail(
                "max_rows",
                "be at most the rows that the model and 'loss_fn' take in a forward, copies times samples (a buffer as "
                "long as the largest batch has fewer)",
                f"a forward of {copies * batch.samples}: {error}",
                cause=error,
            )

    def _estimates(
        self,
        part: Part,
        sites: Mapping[Site, NoiseSite],
        losses: Tensor,
        clean: CleanPass | None,
        guides: Guides | None,
    ) -> tuple[Tensor, dict[Site, Tensor], dict[Site, Tensor]]:
        """Use the guides and supports, and let the guides learn.

        Returns:
            The weights of the losses less what guides explain of them; the gradients of outputs that guides add; and
            for outputs with guide or support the estimates of their gradients, with what guides add, summed over
            copies.
        """
        s, batch, copies = self.settings, part.batch, part.pass_.copies
        baseline = of_rows(clean.losses, part.rows) if clean is not None and s.baseline == "clean" else None
        explained: Tensor | float = 0.0
        added: dict[Site, Tensor] = {}
        if guides is not None and sites:
            explained = torch.zeros_like(losses)
            if baseline is not None:
                explained += guides.shift(part.pass_.layers, losses.device)
                guides.learn_shift(part.pass_.layers, losses - baseline)
            for name, site in sites.items():
                guess, coefficient = guides.guess(name, part.rows, site.grid, site.feature_dim)
                dots = site.dot(guess, copies)
                guides.fit(name, losses, dots)
                explained.add_(coefficient * dots)
                added[name] = guess.view(site.shape) * (coefficient * (batch.share / batch.samples))
        weights = loss_weights(losses - explained, baseline, s.baseline, s.antithetic) * batch.share
        deltas: dict[Site, Tensor] = {}
        for name, site in sites.items():
            support = self._support(clean, name, site, part.rows)
            if name not in added and support is None:
                continue
            delta = deltas[name] = site.score(weights)
            if guides is not None:
                delta += added[name]
                guides.learn(name, delta * (batch.samples / batch.share))
            if support is not None:
                delta *= support.view(site.shape)
        return weights, added, deltas

    def _support(self, clean: CleanPass | None, name: Site, site: NoiseSite, rows: Rows) -> Tensor | None:
        """Where a call's output has a gradient to estimate; None: everywhere, or not known, as in each copy another."""
        if clean is None or self.settings.support != "active" or not site.shared:
            return None
        return clean.gate(name, rows).support

    @staticmethod
    def _row_weights(pass_: Pass, batch: Batch, loss_weight: Tensor) -> RowWeights:
        return RowWeights(loss_weight, batch.affects, pass_.noise_rows, pass_.shared_noise)

    def _learnt(self, pass_: Pass) -> dict[str, nn.Parameter]:
        """The ln sigma that a pass gives gradients: a layer that has another's noise has no scale of its own."""
        return {layer: value for layer, value in self.log_sigma.items() if layer not in pass_.shared_noise}

    def _add_gradients(
        self,
        forward: NoisedForward,
        pass_: Pass,
        weights: RowWeights,
        added: Mapping[Site, Tensor],
        deltas: Mapping[Site, Tensor],
    ) -> None:
        """Add the gradients of kept calls, of many in one launch where their layer type can do so.

        `added`, `deltas`: by `_estimates`.
        """
        for kept in forward.calls:
            kept.call.check_unchanged()
        log_sigma = self._learnt(pass_)
        together: dict[Callable, list[tuple[Any, Tensor]]] = {}
        for layer, number, call in forward.calls:
            site = pass_.shared_noise.get(layer, layer), number
            if site in deltas and call.shared and layer not in log_sigma:
                call.add_output_gradient(deltas[site])
                continue
            if site in added:
                call.add_output_gradient(added[site])
            if call.add_together is None or layer in log_sigma:
                call.add_gradient(weights.of(layer, number), 0, log_sigma.get(layer))
            else:
                together.setdefault(call.add_together, []).append((call, weights.of(layer, number)))
        for add_together, calls in together.items():
            add_together(calls, 0)

    def _recompute(
        self,
        spec: ForwardSpec,
        weights: Tensor,
        order: list[str],
        added: Mapping[Site, Tensor],
        deltas: Mapping[Site, Tensor],
    ) -> None:
        """Run a forward once more, with known losses; each layer adds its gradients as it runs."""
        row_weights = self._row_weights(spec.pass_, spec.batch, weights)
        first = FirstPass(row_weights, self._learnt(spec.pass_), order, added, deltas)
        forward, _ = self.run_pass(spec._replace(first_pass=first))
        forward.check_order(order)

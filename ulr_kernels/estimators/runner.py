"""Runs the passes of a step: forwards with noise, and the gradients from their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ulr_kernels.baselines import loss_weights
from ulr_kernels.estimators.clean_prefix import CleanPrefixCache
from ulr_kernels.estimators.noised import FirstPass, ForwardSpec, Keys, NoisedForward, RecomputeDone
from ulr_kernels.estimators.schedule import Part, Pass, chunks_of, in_order, of_chunk, parts_of
from ulr_kernels.estimators.settings import Settings
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.estimators.weight_noise import WeightNoise
from ulr_kernels.nn.affects import RowWeights
from ulr_kernels.nn.batch import Batch, LossFunction, apply, joined, repeat
from ulr_kernels.nn.call import Noise
from ulr_kernels.nn.names import padding_rows
from ulr_kernels.nn.perturbed import NoisedParameter, PerturbedWeights


class PassRunner:
    """Runs forwards of a model with noise.

    Attributes:
        view: of the model.
        settings: of the estimator.
        log_sigma: layer -> its learnt ln sigma.
    """

    def __init__(self, view: ModelView, settings: Settings, log_sigma: Mapping[str, nn.Parameter]) -> None:
        self.view, self.settings, self.log_sigma = view, settings, log_sigma
        self._padding = padding_rows(view.model)

    def sigma(self, layer: str) -> Tensor | float:
        """The noise scale of a layer: the setting, or the learnt one, fp32 `[features]` or `[]`."""
        if layer in self.log_sigma:
            return self.log_sigma[layer].detach().exp()
        return self.settings.sigma_of(layer)

    # --- forwards ----------------------------------------------------------------------------------------------------

    def run_pass(self, spec: ForwardSpec) -> tuple[NoisedForward, Any]:
        """Run one forward; returns it and the model's output, copies major."""
        pass_, keys, batch, copies = spec.pass_, spec.keys, spec.batch, spec.copies
        s, model = self.settings, self.view.model
        noises = {
            layer: Noise(
                self.sigma(layer), keys[layer], copies, s.antithetic, s.dist, s.sampler, spec.draw, batch.first
            )
            for layer in pass_.layers
            if layer not in pass_.shared_noise
        }

        def run(perturbed: PerturbedWeights | None, inputs: Any) -> tuple[NoisedForward, Any]:
            forward = NoisedForward(self.view, spec, inputs, noises, perturbed)
            with forward:
                return forward, apply(model, inputs)

        if not pass_.weights:
            return run(None, repeat(batch.x, 1 if pass_.expand_late else copies))
        weights = self._weight_noise(pass_, keys)
        if not pass_.one_copy_per_forward:
            return run(weights.all_copies(model, copies, spec.draw, batch.samples), repeat(batch.x, copies))
        done = [run(mode, repeat(batch.x, 1)) for mode in weights.by_copy(model, copies, spec.draw)]
        return done[0][0], joined([outputs for _, outputs in done])

    def clean_losses(self, pass_: Pass, batch: Batch, loss_fn: LossFunction) -> Tensor:
        """The losses without noise, fp32 `[samples]` or `[samples, losses]`; `pass_` bounds the memory."""
        found = []
        for rows in parts_of(batch.samples, pass_.max_samples):
            part = batch.part(rows, rows.start)
            found.append(part.losses(self.run_pass(ForwardSpec(pass_, {}, part, 1))[1], loss_fn, 1)[0])
        return torch.cat(found)

    def _weight_noise(self, pass_: Pass, keys: Keys) -> WeightNoise:
        def noised(name: str) -> NoisedParameter:
            parameter = self.view.noised[name]
            sigma = self.settings.sigma_of(self.view.layers[id(parameter)])
            scale = torch.full((), sigma, dtype=torch.float32, device=parameter.device)
            return NoisedParameter(
                name, parameter, keys[name].to(parameter.device), scale, None, self._padding.get(name)
            )

        return WeightNoise([noised(name) for name in pass_.weights], self.settings.antithetic, self.settings.dist)

    # --- gradients ---------------------------------------------------------------------------------------------------

    def run_part(self, part: Part, keys: Keys, clean: Tensor | None, loss_fn: LossFunction) -> Tensor:
        """Run all forwards of a part and add its gradients to `.grad`.

        `clean`: the losses of the whole batch without noise, for the baseline "clean".
        Returns the losses, fp32 `[copies, samples]` or `[copies, samples, losses]`.
        """
        s, pass_, batch = self.settings, part.pass_, part.batch
        chunks = chunks_of(pass_.copies, batch.samples, pass_.max_rows, s.by_draw)
        recompute = bool(pass_.layers) and (s.memory == "recompute" or (len(chunks) > 1 and not pass_.shared_inputs))
        prefix = CleanPrefixCache() if pass_.reuses_prefix and len(chunks) > 1 else None
        spec = ForwardSpec(pass_, keys, batch, pass_.copies, prefix=prefix)
        found, kept = [], None
        for draw, copies in chunks:
            keep = not recompute and kept is None  # all chunks read the same
            forward, outputs = self.run_pass(spec._replace(copies=copies, draw=draw, keep=keep))
            found.append(batch.losses(outputs, loss_fn, copies))
            del outputs  # before the next chunk makes its own
            kept = forward if keep else kept
        losses = in_order(found, s.antithetic)
        if clean is not None:
            clean = clean[part.rows if isinstance(part.rows, slice) else part.rows.to(clean.device)]
        weights = loss_weights(losses, clean, s.baseline, s.antithetic)
        weights *= batch.share
        row_weights = self._row_weights(pass_, batch, weights)
        if pass_.weights:
            self._weight_noise(pass_, keys).add_gradients(row_weights.of_samples)
        if kept is not None:
            self._add_gradients(kept, pass_, row_weights)
        elif len(forward.order) == 1:  # its inputs have no noise: one forward serves all copies
            spec = spec._replace(pass_=pass_._replace(expand_late=True), prefix=None)
            self._recompute(spec, weights, forward.order)
        else:
            for draw, copies in chunks:
                of_draws = of_chunk(weights, draw, copies, s.antithetic)
                self._recompute(spec._replace(copies=copies, draw=draw, prefix=None), of_draws, forward.order)
        return losses

    @staticmethod
    def _row_weights(pass_: Pass, batch: Batch, loss_weight: Tensor) -> RowWeights:
        return RowWeights(loss_weight, batch.affects, pass_.noise_rows, pass_.shared_noise)

    def _learnt(self, pass_: Pass) -> dict[str, nn.Parameter]:
        """The ln sigma that a pass gives gradients: a layer that has another's noise has no scale of its own."""
        return {layer: value for layer, value in self.log_sigma.items() if layer not in pass_.shared_noise}

    def _add_gradients(self, forward: NoisedForward, pass_: Pass, weights: RowWeights) -> None:
        """Add the gradients of kept calls, of many in one launch where their layer type can do so."""
        for kept in forward.calls:
            kept.call.check_unchanged()
        log_sigma = self._learnt(pass_)
        together: dict[Callable, list[tuple[Any, Tensor]]] = {}
        for layer, number, call in forward.calls:
            if call.add_together is None or layer in log_sigma:
                call.add_gradient(weights.of(layer, number), 0, log_sigma.get(layer))
            else:
                together.setdefault(call.add_together, []).append((call, weights.of(layer, number)))
        for add_together, calls in together.items():
            add_together(calls, 0)

    def _recompute(self, spec: ForwardSpec, weights: Tensor, order: list[str]) -> None:
        """Run a forward once more, with known losses; each layer adds its gradients as it runs."""
        first = FirstPass(self._row_weights(spec.pass_, spec.batch, weights), self._learnt(spec.pass_), order)
        try:
            forward, _ = self.run_pass(spec._replace(first_pass=first))
        except RecomputeDone:
            return
        forward.check_order(order)

"""How the estimator meets a model's layers: modes that see each call of a layer as the model's forward makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ulr_kernels import ops
from ulr_kernels.estimators.batch import tensors
from ulr_kernels.estimators.settings import fail
from ulr_kernels.nn import READERS
from ulr_kernels.nn.linear import LinearCall, Noise


class Meeting(TorchFunctionMode):
    """Base of the modes: matches tensors with the model's parameters by identity and hands calls of layers to `met`.

    Args:
        layers: id(parameter) -> the name of its layer.
    """

    def __init__(self, layers: Mapping[int, str]) -> None:
        super().__init__()
        self._layers = layers
        self._transposes: dict[int, tuple[Tensor, Tensor]] = {}  # id(view) -> the view, kept alive, and its parameter

    def origin(self, tensor: Tensor) -> tuple[Tensor, bool] | None:
        """The parameter that a tensor is, and whether it is its transpose."""
        if id(tensor) in self._layers:
            return tensor, False
        view = self._transposes.get(id(tensor))
        return None if view is None else (view[1], True)

    def trained_layer(self, call: LinearCall) -> str | None:
        """The name of a call's layer, if any parameter of the call is trained."""
        if not any(p.requires_grad for p in call.parameters):
            return None
        return self._layers[id(call.parameters[0])]

    def met(self, call: LinearCall) -> Tensor:
        raise NotImplementedError

    def other(self, func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Any other call of a torch function."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reader = READERS.get(func)
        call = reader(args, kwargs, self.origin) if reader is not None else None
        if call is not None:
            return self.met(call)
        result = func(*args, **kwargs)
        if args and id(args[0]) in self._layers and _is_transpose(result, args[0]):
            self._transposes[id(result)] = (result, args[0])
        else:
            self.other(func, args, kwargs, result)
        return result


def _is_transpose(result: Any, parameter: Tensor) -> bool:
    return (
        isinstance(result, Tensor)
        and parameter.dim() == 2
        and result.data_ptr() == parameter.data_ptr()
        and result.shape == parameter.shape[::-1]
        and result.stride() == parameter.stride()[::-1]
    )


class Recording(Meeting):
    """Watches a clean forward of two copies of a batch: which layers it calls, and whether they can be trained.

    Attributes:
        calls: the trained layers in the order of their first call, and how often each is called.
        met_calls: those calls.
        reached: ids of the parameters whose gradient the calls give.
        elsewhere: id(parameter) -> a function beside the layers' calls that uses it.
    """

    def __init__(self, layers: Mapping[int, str], samples: int) -> None:
        super().__init__(layers)
        self._samples = samples
        self.calls: dict[str, int] = {}
        self.met_calls: list[LinearCall] = []
        self.reached: set[int] = set()
        self.elsewhere: dict[int, str] = {}

    def met(self, call: LinearCall) -> Tensor:
        layer = self.trained_layer(call)
        if layer is not None:
            rows = call.x.shape[0]
            if rows % (2 * self._samples):
                fail(
                    f"the input of layer {layer!r}",
                    f"have samples on its first axis: a multiple of {2 * self._samples} for two copies of the batch",
                    list(call.x.shape),
                )
            if not same(*call.x.unflatten(0, (2, rows // 2))):
                fail_rows(f"the input of layer {layer!r}")
            self.calls[layer] = self.calls.get(layer, 0) + 1
            self.met_calls.append(call)
            self.reached.update(map(id, call.parameters))
        return call.clean()

    def other(self, func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if func is F.batch_norm and kwargs["training"]:  # in eval mode: there are no running statistics
            fail(
                "model", "normalise by running statistics (noise would enter those of the batch)", "batch_norm without"
            )
        if func is Tensor.detach or not tensors(result):  # cut off on purpose, or a shape, a dtype, a device
            return
        for tensor in tensors((args, kwargs)):
            if id(tensor) in self._layers and tensor.requires_grad:
                self.elsewhere[id(tensor)] = getattr(func, "__name__", str(func))


def same(first: Tensor, second: Tensor, scale: Tensor | None = None) -> bool:
    """Whether two copies are equal but for rounding, which may flip a threshold here and there."""
    first, second = (torch.nan_to_num(t.to(torch.float32)) for t in (first, second))
    limit = 0.05 * (first if scale is None else torch.nan_to_num(scale.to(torch.float32))).norm() + 1e-5 * first.norm()
    return bool((first - second).norm() <= limit)


def fail_rows(what: str) -> None:
    fail(
        what,
        "have the samples on its first axis, in order, each made from its own sample only and without random numbers",
        "different values in two copies of the same batch",
    )


class NoisedPass(Meeting):
    """A forward in which some layers are noised.

    Args:
        layers: id(parameter) -> the name of its layer.
        noises: the noise of each noised layer; all with the same number of copies.
        samples: of one copy.
        cut: the model is given one copy, and the first noised call makes the others.
    """

    def __init__(self, layers: Mapping[int, str], noises: Mapping[str, Noise], samples: int, *, cut: bool) -> None:
        super().__init__(layers)
        self._noises = noises
        self._samples = samples
        self._cut = cut
        self._counts: dict[str, int] = {}
        self.calls: list[tuple[str, LinearCall]] = []

    def met(self, call: LinearCall) -> Tensor:
        layer = self.trained_layer(call)
        noise = self._noises.get(layer) if layer is not None else None
        if layer is None or noise is None:
            return call.clean()
        count = self._counts.get(layer, 0)
        self._counts[layer] = count + 1
        key = ops.fold_in(noise.key, count) if count else noise.key
        noise = noise._replace(key=key.to(call.x.device))
        first = not self.calls  # nothing was noised before: all copies have the same input
        self.calls.append((layer, call))
        return call.noised(noise, self._samples, 1 if first and self._cut else noise.copies, shared=first)

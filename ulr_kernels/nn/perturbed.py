"""A forward with perturbed weights: the model runs as it is, and its functions get W + sigma * eps instead of W."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ulr_kernels import ops
from ulr_kernels.nn.names import parameter_names
from ulr_kernels.nn.shards import is_sharded, like, shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class NoisedParameter(NamedTuple):
    """A trained parameter and its noise in one step."""

    name: str
    parameter: Tensor  # as the model holds it
    key: Tensor  # int64 `[]`, its noised key
    sigma: Tensor  # fp32 `[]`, the scale of its noise; negative for the other half of a pair
    rank: int | None  # of a matrix's noise; None for full rank, which vectors always have


class WeightDraws(NamedTuple):
    """The noise of a forward: copy c of `copies` uses draw + c; antithetic copies come as two halves."""

    draw: int = 0
    copies: int = 1
    antithetic: bool = False
    dist: str = "normal"


class PerturbedWeights(TorchFunctionMode):
    """While active, torch functions get perturbed values of the trained parameters among their arguments.

    Linear layers, embeddings and convolutions make the noise on the weight's way into the product. Any other function
    gets a perturbed copy: of vectors (biases, weights of norms) made once in a forward, of anything else for that call.

    With several copies the batch holds their rows copy-major, and every call is split by copy.

    Args:
        model: whose forward it is.
        noised: its trained parameters, with their noise.
        draws: of the noise.
        rows: samples of all copies together; needed where there are several copies.

    Attributes:
        used: names of the parameters that the forward has used.
    """

    def __init__(self, model: nn.Module, noised: Sequence[NoisedParameter], draws: WeightDraws, rows: int = 0) -> None:
        super().__init__()
        self.noised = {id(each.parameter): each for each in noised}
        self._shards = {each.name: each for each in noised if is_sharded(each.parameter)}
        self._others: dict[int, nn.Parameter] = {}  # found in arguments, and not trained
        self._model = model
        self._draws = draws
        self._rows = rows
        self._vectors: dict[int, Tensor] = {}
        self.used: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if only_describes(func):
            return func(*args, **kwargs)
        if self._shards:
            self._find_gathered(args, kwargs)
        used = [noised for leaf in _leaves(args, kwargs) if (noised := self.noised.get(id(leaf))) is not None]
        if not used:
            return func(*args, **kwargs)
        if _writes(func) and id(args[0]) in self.noised:
            raise RuntimeError(
                f"ulr.optim: a forward must not write a trained parameter, got {func.__name__} on one of shape "
                f"{list(args[0].shape)}"
            )
        self.used.update(noised.name for noised in used)
        fused = None if any(is_sharded(noised.parameter) for noised in used) else _FUSED.get(func)
        result = NotImplemented if fused is None else fused(self, *args, **kwargs)
        if result is not NotImplemented:
            return result
        if self._draws.copies == 1:
            return func(*self._replaced(args, 0), **self._replaced(kwargs, 0))
        return _joined(self._by_copy(func, args, kwargs, {}))

    def _find_gathered(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Find the whole parameters of FSDP2, which a module has only while it runs, as objects of the same names."""
        for leaf in _leaves(args, kwargs):
            if isinstance(leaf, nn.Parameter) and id(leaf) not in self.noised and id(leaf) not in self._others:
                noised = self._shards.get(parameter_names(self._model).get(id(leaf), ""))
                if noised is None:
                    self._others[id(leaf)] = leaf
                else:
                    self.noised[id(leaf)] = noised._replace(parameter=leaf)

    # --- functions with noise inside: NotImplemented where the call has another form ----------------------------------

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        noised = self.noised.get(id(weight))
        if noised is None or id(input) in self.noised or weight.dim() != 2 or input.dim() < min(2, self._draws.copies):
            return NotImplemented
        x = self._split(input, "linear").flatten(-input.dim(), -2) if input.dim() > 1 else input.unsqueeze(0)
        y = ops.perturbed_linear(
            x, weight, self._bias(bias), noised.sigma, noised.key, rank=noised.rank, **self._spec()
        )
        return y.view(*input.shape[:-1], weight.shape[0])

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        noised = self.noised.get(id(weight))
        if noised is None or id(input) in self.noised or input.dim() != 4:
            return NotImplemented
        x = self._split(input, "conv2d")
        shape = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        y = ops.perturbed_conv2d(
            x, weight, self._bias(bias), noised.sigma, noised.key, rank=noised.rank, **shape, **self._spec()
        )
        return y.flatten(0, 1)

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        noised = self.noised.get(id(weight))
        if noised is None or max_norm is not None:
            return NotImplemented
        copies = self._draws.copies
        if copies > 1 and input.dim() > 1 and input.shape[0] == 1:  # position numbers that all samples share
            input = input.expand(self._rows, *input.shape[1:])
        ids = self._split(input, "embedding") if copies > 1 else input.unsqueeze(0)
        y = ops.perturbed_embedding(
            ids.reshape(copies, -1).long(), weight, noised.sigma, noised.key, rank=noised.rank, **self._spec()
        )
        return y.view(*input.shape, weight.shape[1])

    def _split(self, x: Tensor, what: str) -> Tensor:
        """`[copies, rows of a copy, ...]`; with a single copy the input itself."""
        copies = self._draws.copies
        if copies == 1:
            return x
        if x.dim() == 0 or x.shape[0] % self._rows:
            raise ValueError(
                f"ulr.optim: the input of a {what} call must have the {self._rows} samples of {copies} copies on its "
                f"first axis (step(closure) evaluates one copy at a time), got {list(x.shape)}"
            )
        return x.unflatten(0, (copies, -1))

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        """`[copies, N]` where the bias is trained."""
        noised = self.noised.get(id(bias))
        return bias if noised is None else self._perturbed(noised)

    # --- perturbed copies --------------------------------------------------------------------------------------------

    def _spec(self) -> dict[str, Any]:
        draws = self._draws
        return {"draw": draws.draw, "copies": draws.copies, "antithetic": draws.antithetic, "dist": draws.dist}

    def _perturbed(self, noised: NoisedParameter) -> Tensor:
        """`[copies, *shape]`: the parameter with the noise of each copy."""
        parameter = noised.parameter
        if parameter.dim() > 1:
            return self._perturb(noised)
        copies = self._vectors.get(id(parameter))
        if copies is None:
            copies = self._vectors[id(parameter)] = self._perturb(noised)
        return copies

    def _perturb(self, noised: NoisedParameter) -> Tensor:
        """All copies, by a lookup of every row: the perturbed embedding writes no weight."""
        parameter = noised.parameter
        if is_sharded(parameter):
            return self._sharded_copy(noised, parameter).unsqueeze(0)
        table = parameter.reshape(parameter.shape[0], -1) if parameter.dim() > 1 else parameter.reshape(1, -1)
        ids = torch.arange(table.shape[0], device=table.device).expand(self._draws.copies, -1)
        copies = ops.perturbed_embedding(ids, table, noised.sigma, noised.key, rank=noised.rank, **self._spec())
        return copies.view(-1, *parameter.shape)

    def _sharded_copy(self, noised: NoisedParameter, parameter: DTensor) -> Tensor:
        """A DTensor like the parameter, whose local part has its part of the noise."""
        if self._draws.copies > 1:
            raise ValueError("ulr.optim: sharded parameters must be probed one copy at a time: step(closure)")
        part = shard(parameter)
        local = part.tensor.clone()
        ops.perturb_(
            [local],
            noised.key[None],
            noised.sigma,
            draw=self._draws.draw,
            dist=self._draws.dist,
            rank=noised.rank,
            row_offset=[part.row_offset],
            col_offset=[part.col_offset],
        )
        return like(parameter, local)

    def _replaced(self, arguments: Any, number: int) -> Any:
        def replace(leaf: Any) -> Any:
            noised = self.noised.get(id(leaf))
            return leaf if noised is None else self._perturbed(noised)[number]

        return _pytree.tree_map(replace, arguments)

    def _by_copy(
        self, func: Callable, args: tuple, kwargs: Mapping[str, Any], axes: Mapping[int, int | None]
    ) -> list[Any]:
        """The results of one call for each copy, with its rows of every tensor that holds all samples.

        `axes`: id(tensor) -> the axis of its samples, where that is not the first; None if it has none.
        """
        copies = self._draws.copies

        def axis_of(leaf: Any) -> int | None:
            if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
                return None
            axis = axes.get(id(leaf), 0)
            if axis is None or leaf.dim() <= axis or not leaf.shape[axis] or leaf.shape[axis] % self._rows:
                return None
            return axis

        if all(axis_of(leaf) is None for leaf in _leaves(args, kwargs)):
            raise ValueError(
                f"ulr.optim: {getattr(func, '__name__', func)} with a trained parameter must have an input with the "
                f"{self._rows} samples of {copies} copies on its first axis (step(closure) evaluates one copy at "
                "a time), got none"
            )

        def part(leaf: Any, number: int) -> Any:
            axis = axis_of(leaf)
            return leaf if axis is None else leaf.unflatten(axis, (copies, -1)).select(axis, number)

        results = []
        for number in range(copies):
            own = _pytree.tree_map(lambda leaf, number=number: part(leaf, number), (args, dict(kwargs)))
            own_args, own_kwargs = self._replaced(own, number)
            results.append(func(*own_args, **own_kwargs))
        return results

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        """Several copies: inputs and output have the samples on their second axis, masks on the first if on any."""
        if self._draws.copies == 1:
            return NotImplemented
        given = _ATTENTION.bind(*args, **kwargs).arguments
        axes: dict[int, int | None] = {id(given[name]): 1 for name in ("query", "key", "value")}
        mask = given.get("attn_mask")
        if mask is not None and mask.dim() == 2:
            axes[id(mask)] = None
        outputs, weights = zip(*self._by_copy(F.multi_head_attention_forward, (), given, axes), strict=True)
        return torch.cat(outputs, 1), None if weights[0] is None else torch.cat(weights)

    def _recurrent(self, input: Tensor, state: Any, *rest: Any, func: Callable) -> Any:
        """Several copies: samples are on the second axis of states, and of input and output unless `batch_first`."""
        if self._draws.copies == 1:
            return NotImplemented
        packed = not isinstance(rest[1], bool)  # then the sizes of batches come second, and all else one place later
        if packed or input.dim() != 3:
            raise ValueError(
                f"ulr.optim: {func.__name__} with a trained parameter and several copies must have an input [samples, "
                "time, features] or time first, not packed (step(closure) evaluates one copy at a time), got "
                f"{'packed ' if packed else ''}{list(input.shape)}"
            )
        axis = 0 if rest[-1] else 1
        axes: dict[int, int | None] = {id(input): axis}
        axes |= dict.fromkeys(map(id, _leaves((state,), {})), 1)
        outputs, *states = zip(*self._by_copy(func, (input, state, *rest), {}, axes), strict=True)
        return torch.cat(outputs, axis), *(torch.cat(parts, 1) for parts in states)


def _joined(results: list[Any]) -> Any:
    """The results of all copies, one after the other."""
    return _pytree.tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *results)


_ATTENTION = inspect.signature(F.multi_head_attention_forward)

_FUSED: dict[Callable, Callable] = {
    F.linear: PerturbedWeights._linear,
    F.conv2d: PerturbedWeights._conv2d,
    F.embedding: PerturbedWeights._embedding,
    F.multi_head_attention_forward: PerturbedWeights._attention,
    **{
        func: functools.partial(PerturbedWeights._recurrent, func=func)
        for func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
    },
}

# Attributes that hold the parameter's values; all others describe the tensor.
_VALUES = {"T", "mT", "H", "mH", "data", "real", "imag"}
_DESCRIBING = {
    getattr(Tensor, name)
    for name in (
        "__hash__ __len__ data_ptr dim element_size get_device is_contiguous is_floating_point ndimension nelement "
        "numel size storage_offset stride"
    ).split()
} | {torch.is_floating_point, torch.is_tensor, torch.numel}


def only_describes(func: Callable) -> bool:
    """Whether a torch function reads no value of its tensor."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") not in _VALUES  # type: ignore[attr-defined]
    return func in _DESCRIBING


_IN_PLACE = {f"__{name}__" for name in "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor".split()}


def _writes(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _leaves(args: Sequence, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments, and the elements of lists among them (recurrent layers pass their weights in one)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value

"""A forward with perturbed weights: the model runs as it is, and its functions get W + sigma * eps instead of W."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ulr_kernels import ops
from ulr_kernels.errors import RuleError
from ulr_kernels.nn.equal_draws import draw_rows
from ulr_kernels.nn.generic import BACKWARD_HOOKS, EXPAND_FUNCTIONS, ignored_hook
from ulr_kernels.nn.marks import SAMPLE, Marked, flat, storage
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
    still: int | None = None  # the row that has no noise, as a table's row for padding; None if there is none


class WeightDraws(NamedTuple):
    """The noise of a forward: copy c of `copies` uses draw + c; antithetic copies come as two halves."""

    draw: int = 0
    copies: int = 1
    antithetic: bool = False
    dist: str = "normal"
    sampler: str = "iid"


class _ResultsOfCopies(NamedTuple):
    """The tensors of all copies that a result of parameters alone stands for."""

    first: weakref.ref  # to that of the first copy, which the model has
    others: list[Tensor]


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed now: `torch.autograd.forward_ad`, `torch.func.jvp`."""
    return forward_ad._current_level >= 0


class PerturbedWeights(Marked, TorchFunctionMode):
    """While active, torch functions get perturbed values of the trained parameters among their arguments.

    Linear layers, embeddings and convolutions make the noise on the weight's way into the product. Any other function
    gets a perturbed copy: of vectors (biases, weights of norms) made once in a forward, of anything else for that call.

    With several copies the batch holds their rows copy-major. A function of parameters and samples runs for each copy
    with its rows, and the results follow one another again. A function of parameters and constants runs once for each
    copy too: the model gets the first copy's result, and every later function that reads it the results of all copies,
    which live until the forward ends. Samples are found by what a tensor was computed from, see `mark_samples`.

    Args:
        model: whose forward it is.
        noised: its trained parameters, with their noise.
        draws: of the noise.
        rows: samples of all copies together; needed where there are several copies.

    Attributes:
        copies: of the batch in this forward.
        used: names of the parameters that the forward has used.
        on_generator: called with each `generator` that a function of the forward gets, before it draws.
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
        self._marks = {}
        self._of_copies: dict[int, _ResultsOfCopies] = {}  # by the id of the first copy's tensor
        self._written: dict[int, Tensor] = {}  # constants that each copy has its own values of now, by storage
        self._buffers = {id(b) for b in model.buffers()} if draws.copies > 1 else set()
        self.copies = draws.copies
        self.used: set[str] = set()
        self.on_generator: Callable[[torch.Generator], object] | None = None

    def mark_samples(self, value: Any) -> None:
        """Note that tensors hold samples: inputs and targets; needed where there are several copies."""
        if self.copies > 1:
            self._mark(value, SAMPLE)

    def share_marks(self, other: Marked) -> None:
        """Use the marks of another mode, which sees all functions of the forward."""
        self._marks = other._marks

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these tensors has noise: a trained parameter, or a tensor computed from such alone."""
        return any(id(tensor) in self.noised or id(tensor) in self._of_copies for tensor in tensors)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in BACKWARD_HOOKS and not (args[0].requires_grad and torch.is_grad_enabled()):
            return ignored_hook(func)
        if reads_only_metadata(func):
            return func(*args, **kwargs)
        if func in _LIKES:
            return (
                self._call_without_noise(func, args, kwargs, flat(args)) if self.copies > 1 else func(*args, **kwargs)
            )
        if kwargs and self.on_generator is not None and kwargs.get("generator") is not None:
            self.on_generator(kwargs["generator"])
        if self._shards:
            self._find_gathered(args, kwargs)
        given = flat(args) + flat(kwargs.values())
        used = [noised for leaf in given if (noised := self.noised.get(id(leaf))) is not None]
        if self._written:
            self._check_views(func, given[1:] if func == _SET_DATA else given)
        if self.copies > 1 and not used and not self.reads(given):
            return self._call_without_noise(func, args, kwargs, given)
        if not used and self.copies == 1:
            return func(*args, **kwargs)
        if _writes(func) and id(args[0]) in self.noised:
            raise RuntimeError(
                f"ulr.optim: a forward must not write a trained parameter, got {func.__name__} on one of shape "
                f"{list(args[0].shape)}"
            )
        self.used.update(noised.name for noised in used)
        fused = None if any(is_sharded(noised.parameter) for noised in used) else _FUSED.get(func)
        result = NotImplemented if fused is None else fused(self, *args, **kwargs)
        if result is NotImplemented:
            if self.copies > 1:
                return self._call_by_copy(func, args, kwargs)
            values = {id(noised.parameter): self._perturbed(noised)[0] for noised in used}
            args, kwargs = _pytree.tree_map(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
            return func(*args, **kwargs)
        if self.copies > 1 and not self.reads(flat((result,))):
            self._mark(result, SAMPLE)
        return result

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
        if noised is None or weight.dim() != 2 or not weight.numel() or not self._fusible(input, bias):
            return NotImplemented
        x = self._split(input, "linear").flatten(-input.dim(), -2) if input.dim() > 1 else input.unsqueeze(0)
        y = ops.perturbed_linear(
            x, weight, self._bias(bias), noised.sigma, noised.key, rank=noised.rank, **self._spec()
        )
        if noised.still is not None:  # a table that is tied to this layer
            y[..., noised.still] = x @ weight[noised.still]
            if bias is not None:
                own = self._bias(bias)[..., noised.still]  # type: ignore[index]
                y[..., noised.still] += own.unsqueeze(-1) if own.dim() else own
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
        if noised is None or input.dim() != 4 or not weight.numel() or not self._fusible(input, bias):
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
        if noised is None:
            return NotImplemented
        self._check_table(noised, padding_idx, max_norm, scale_grad_by_freq)
        if not weight.numel():
            return NotImplemented
        copies = self._draws.copies
        if self.reads((input,)):
            return NotImplemented
        samples = copies == 1 or self._holds_samples(input)
        ids = (
            input.unsqueeze(0)
            if copies == 1
            else self._split(input, "embedding")
            if samples
            else input.expand(copies, *input.shape)
        )
        y = ops.perturbed_embedding(
            ids.reshape(copies, -1).long(), weight, noised.sigma, noised.key, rank=noised.rank, **self._spec()
        )
        if noised.still is not None:
            y = torch.where((ids == noised.still).reshape(copies, -1, 1), weight[noised.still], y)
        if samples:
            return y.view(*input.shape, weight.shape[1])
        return self._keep(y.view(copies, *input.shape, weight.shape[1]).unbind())

    def _embedding_bag(self, *args: Any, **kwargs: Any) -> Any:
        given = _BAG.bind(*args, **kwargs).arguments
        for leaf in (given["input"], given["weight"]):  # the order of older versions is the other one
            if (noised := self.noised.get(id(leaf))) is not None:
                options = (given.get(name) for name in ("padding_idx", "max_norm", "scale_grad_by_freq"))
                self._check_table(noised, *options)
        return NotImplemented

    def _check_table(
        self, noised: NoisedParameter, padding: int | None, max_norm: float | None, scaled: bool | None
    ) -> None:
        """Raise where noise on a table's weights gives another gradient than the options of a call ask for.

        Noise and updates leave out those rows of padding that modules name, and none that only a call names.
        """
        if padding is not None and padding % len(noised.parameter) != noised.still:
            raise ValueError(
                "ulr.optim: 'padding_idx' must be that of an nn.Embedding or nn.EmbeddingBag which holds the table, "
                f"got {padding} in a call with {noised.name}"
            )
        if max_norm is not None:
            raise RuleError(
                "ulr: 'max_norm' must be None for a table with noise on its weights (it would shorten the noised rows, "
                "and leave the rows themselves as long as they are; shorten them after a step), "
                f"got {max_norm} in a call with {noised.name}"
            )
        if scaled:
            raise RuleError(
                "ulr: 'scale_grad_by_freq' must be False for a table with noise on its weights (a gradient so scaled "
                f"is no gradient of the loss), got True in a call with {noised.name}"
            )

    def _fusible(self, input: Tensor, bias: Tensor | None) -> bool:
        """Whether a layer's input has samples, no noise but that of layers before it, and no derivative of its own."""
        if id(input) in self.noised or (input.requires_grad and torch.is_grad_enabled()) or in_forward_mode():
            return False
        if self.copies == 1:
            return True
        return not self.reads((input,)) and id(bias) not in self._of_copies and self._holds_samples(input)

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

    def _holds_samples(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from samples, or is a constant that a model made for each of them.

        The rows of all copies of such a constant are equal (zeros, a row that was expanded), as it knows no samples.
        """
        if self.marks(tensor) & SAMPLE:
            return True
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._buffers or not tensor.dim():
            return False
        if not tensor.shape[0] or tensor.shape[0] % self._rows or (tensor.dim() == 1 and tensor.is_floating_point()):
            return False
        first, *others = tensor.unflatten(0, (self._draws.copies, -1)).unbind()
        return all(torch.equal(first, other) for other in others)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        """`[copies, N]` where the bias is trained."""
        noised = self.noised.get(id(bias))
        return bias if noised is None else self._perturbed(noised)

    # --- perturbed copies --------------------------------------------------------------------------------------------

    def _spec(self) -> dict[str, Any]:
        """The draws by the names of the ops' arguments."""
        return self._draws._asdict()

    def _perturbed(self, noised: NoisedParameter) -> Tensor:
        """`[copies, *shape]`: the parameter with the noise of each copy."""
        parameter = noised.parameter
        if parameter.dim() > 1:
            return self._perturb(noised)
        copies = self._vectors.get(id(parameter))
        if copies is None:
            copies = self._vectors[id(parameter)] = self._perturb(noised)
        return copies

    @torch.no_grad()
    def _perturb(self, noised: NoisedParameter) -> Tensor:
        """All copies, by a lookup of every row: the perturbed embedding writes no weight."""
        parameter = noised.parameter
        if is_sharded(parameter):
            return self._sharded_copy(noised, parameter).unsqueeze(0)
        if not parameter.numel():
            return parameter.expand(self.copies, *parameter.shape)
        table = parameter.reshape(parameter.shape[0], -1) if parameter.dim() > 1 else parameter.reshape(1, -1)
        ids = torch.arange(table.shape[0], device=table.device).expand(self._draws.copies, -1)
        copies = ops.perturbed_embedding(ids, table, noised.sigma, noised.key, rank=noised.rank, **self._spec())
        copies = copies.view(-1, *parameter.shape)
        if noised.still is not None:
            copies[:, noised.still] = parameter[noised.still]
        return copies

    def _sharded_copy(self, noised: NoisedParameter, parameter: DTensor) -> Tensor:
        """A DTensor like the parameter, whose local part has its part of the noise."""
        if self.copies > 1:
            raise ValueError("ulr.optim: sharded parameters must be probed one copy at a time: step(closure)")
        part = shard(parameter)
        local = part.tensor.clone()
        ops.perturb_(
            [local],
            noised.key[None],
            noised.sigma,
            draw=self._draws.draw,
            dist=self._draws.dist,
            sampler=self._draws.sampler,
            rank=noised.rank,
            row_offset=[part.row_offset],
            col_offset=[part.col_offset],
            width=[part.width],
        )
        if noised.still is not None and 0 <= (row := noised.still - part.row_offset) < len(local):
            local[row] = part.tensor[row]
        return like(parameter, local)

    # --- several copies ----------------------------------------------------------------------------------------------

    def _check_views(self, func: Callable, given: list[Tensor]) -> None:
        """Raise for a view of a constant, from before each copy has written its own values into this constant."""
        for tensor in given:
            if storage(tensor) in self._written and not self.reads((tensor,)):
                raise RuntimeError(
                    "ulr.optim: a forward with several copies must take views of a tensor after it has written results "
                    f"of trained parameters there, got {_name(func)} of one from before (step(closure) evaluates one "
                    "copy at a time)"
                )

    def _call_without_noise(self, func: Callable, args: tuple, kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """The result of a function of samples and constants."""
        bits = 0
        for tensor in given:
            bits |= self.marks(tensor)
        result = draw_rows(func, args, kwargs, self.copies, self._rows, self._holds_samples)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        else:
            bits |= SAMPLE
        self._mark(args[0] if func is Tensor.__setitem__ else result, bits)
        return result

    def _call_by_copy(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of a function with noise among its arguments, which runs for each copy."""
        if kwargs.get("out") is not None:
            raise ValueError(
                "ulr.optim: a function of trained parameters must return its result (step(closure) evaluates one copy "
                f"at a time), got {_name(func)} with 'out'"
            )
        if _writes(func):
            self._prepare_write(func, args, kwargs)
        results, samples = self._by_copy(func, args, kwargs, {})
        if _writes(func):
            return None if results[0] is None else args[0]
        return self._joined(results) if samples else self._kept(results)

    def _prepare_write(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Give each copy its own values of a constant that it writes its own into."""
        target, *given = flat(args) + flat(kwargs.values())
        if self.marks(target) & SAMPLE:
            return
        if any(self._holds_samples(leaf) for leaf in given if not self.reads((leaf,))):
            raise ValueError(
                f"ulr.optim: {_name(func)} with a trained parameter must write samples into a tensor of samples "
                f"(step(closure) evaluates one copy at a time), got one of {list(target.shape)} without"
            )
        if not self.reads((target,)):
            self._keep([target, *(target.clone() for _ in range(self._draws.copies - 1))])
            self._written[storage(target)] = target

    def _by_copy(
        self, func: Callable, args: tuple, kwargs: Mapping[str, Any], axes: Mapping[int, int | None]
    ) -> tuple[list[Any], bool]:
        """The results of one call for each copy, and whether they have samples; each copy gets its rows of these.

        `axes`: id(tensor) -> the axis of its samples, where that is not the first; None if it has none.
        """
        copies = self._draws.copies
        values: dict[int, Sequence[Tensor]] = {}
        samples = False
        for leaf in flat(args) + flat(kwargs.values()):
            if id(leaf) in values:
                continue
            if (noised := self.noised.get(id(leaf))) is not None:
                values[id(leaf)] = self._perturbed(noised).unbind()
            elif id(leaf) in self._of_copies:
                values[id(leaf)] = [leaf, *self._of_copies[id(leaf)].others]
                axis = axes.get(id(leaf))
                if axis is not None and leaf.shape[axis] == self._rows:  # expanded: each copy needs its own rows
                    values[id(leaf)] = [
                        value.unflatten(axis, (copies, -1)).select(axis, number)
                        for number, value in enumerate(values[id(leaf)])
                    ]
            elif (axis := axes.get(id(leaf), 0)) is not None and (id(leaf) in axes or self._holds_samples(leaf)):
                if leaf.dim() <= axis or leaf.shape[axis] % self._rows:
                    raise ValueError(
                        f"ulr.optim: {_name(func)} with a trained parameter must have an input with the {self._rows} "
                        f"samples of {copies} copies on its first axis (step(closure) evaluates one copy at a time), "
                        f"got {list(leaf.shape)}"
                    )
                values[id(leaf)] = leaf.unflatten(axis, (copies, -1)).unbind(axis)
                samples = True
        results, adds_rows = [], False
        for number in range(copies):
            own_args, own_kwargs = _pytree.tree_map(
                lambda leaf, number=number: values[id(leaf)][number] if id(leaf) in values else leaf,
                (args, dict(kwargs)),
            )
            result = func(*own_args, **own_kwargs)
            if number == 0:
                adds_rows = not samples and self._adds_rows(func, args, result)
            results.append(result.unflatten(0, (copies, -1))[number].clone() if adds_rows else result)
        return results, samples or adds_rows

    def _adds_rows(self, func: Callable, args: tuple, result: Any) -> bool:
        """Whether a function of parameters has made a row for each sample of them, as the model counts samples."""
        if not isinstance(result, Tensor) or not result.dim():
            return False
        if func in _JOINS:
            return result.shape[0] == self._rows and len({id(leaf) for leaf in args[0]}) == 1
        if func not in _REPEATS:
            return False
        rows = args[0].shape[0] if args[0].dim() == result.dim() else 1
        return result.shape[0] == rows * self._rows and (rows == 1 or func in _TILES)

    def _joined(self, results: list[Any]) -> Any:
        """The results of all copies, one after the other."""
        result = _pytree.tree_map(lambda *parts: torch.cat(parts) if _tensors(parts) else self._one(parts), *results)
        self._mark(result, SAMPLE)
        return result

    def _kept(self, results: list[Any]) -> Any:
        """The first copy's result, which stands for those of all copies."""
        return _pytree.tree_map(lambda *parts: self._keep(parts) if _tensors(parts) else self._one(parts), *results)

    def _keep(self, tensors: Sequence[Tensor]) -> Tensor:
        """The first of the copies' tensors, which stands for all of them as long as it lives."""
        first, *others = tensors
        own = id(first)
        self._of_copies[own] = _ResultsOfCopies(weakref.ref(first, lambda _: self._of_copies.pop(own, None)), others)
        self._mark(first, 0)
        return first

    def _one(self, parts: Sequence[Any]) -> Any:
        """A value that is no tensor and the same for all copies."""
        if any(part is not parts[0] and part != parts[0] for part in parts):
            raise ValueError(
                "ulr.optim: a forward with several copies must not decide by numbers that it reads from trained "
                f"parameters (step(closure) evaluates one copy at a time), got {parts[0]!r} and others"
            )
        return parts[0]

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        """Several copies: inputs and output have the samples on their second axis, masks on the first if on any."""
        if self.copies == 1:
            return NotImplemented
        given = _ATTENTION.bind(*args, **kwargs).arguments
        axes: dict[int, int | None] = {id(given[name]): 1 for name in ("query", "key", "value")}
        mask = given.get("attn_mask")
        if mask is not None and mask.dim() == 2:
            axes[id(mask)] = None
        results, samples = self._by_copy(F.multi_head_attention_forward, (), given, axes)
        if not samples:
            return self._kept(results)
        outputs, weights = zip(*results, strict=True)
        return torch.cat(outputs, 1), None if weights[0] is None else torch.cat(weights)

    def _recurrent(self, input: Tensor, state: Any, *rest: Any, func: Callable) -> Any:
        """Several copies: samples are on the second axis of states, and of input and output unless `batch_first`."""
        if self.copies == 1:
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
        results, samples = self._by_copy(func, (input, state, *rest), {}, axes)
        if not samples:
            return self._kept(results)
        outputs, *states = zip(*results, strict=True)
        return torch.cat(outputs, axis), *(torch.cat(parts, 1) for parts in states)


def _tensors(parts: Sequence[Any]) -> bool:
    return isinstance(parts[0], Tensor)


def _name(func: Callable) -> str:
    return getattr(func, "__name__", str(func))


_ATTENTION = inspect.signature(F.multi_head_attention_forward)
_BAG = inspect.signature(F.embedding_bag)

_FUSED: dict[Callable, Callable] = {
    F.linear: PerturbedWeights._linear,
    F.conv2d: PerturbedWeights._conv2d,
    F.embedding: PerturbedWeights._embedding,
    F.embedding_bag: PerturbedWeights._embedding_bag,
    F.multi_head_attention_forward: PerturbedWeights._attention,
    **{
        func: functools.partial(PerturbedWeights._recurrent, func=func)
        for func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
    },
}

# Functions that may make a row for each sample: of a tensor, or of one that stands in a list again and again.
_REPEATS = EXPAND_FUNCTIONS | {Tensor.repeat_interleave, torch.repeat_interleave}
_TILES = {Tensor.repeat, Tensor.tile, torch.tile}
_JOINS = {torch.stack, torch.cat, torch.concat}

# Attributes that hold the parameter's values; all others describe the tensor.
_VALUES = {"T", "mT", "H", "mH", "data", "real", "imag"}
_DESCRIBING = {
    getattr(Tensor, name)
    for name in (
        "__hash__ __len__ data_ptr dim element_size get_device is_contiguous is_floating_point ndimension nelement "
        "numel size storage_offset stride"
    ).split()
} | {torch.is_floating_point, torch.is_tensor, torch.numel}

# Functions whose result has no more of a tensor than its shape, its dtype or its device.
_LIKES = {getattr(Tensor, f"new_{name}") for name in "empty full ones tensor zeros".split()} | {
    getattr(torch, f"{name}_like") for name in "empty full ones rand randint randn zeros".split()
}


def reads_only_metadata(func: Callable) -> bool:
    """Whether a torch function reads no value of its tensor."""
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func.__self__, "__name__", "") not in _VALUES  # type: ignore[attr-defined]
    return func in _DESCRIBING


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_IN_PLACE = {f"__{name}__" for name in "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor".split()}


def _writes(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return func == _SET_DATA or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _leaves(args: Sequence, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments, and the elements of lists among them (recurrent layers pass their weights in one)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value

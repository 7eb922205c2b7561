"""An op (its schema, arguments, check, reference and cost), and its registration with torch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from ulr_kernels import dispatch, noise_contract
from ulr_kernels.ops._overlap import refuse_overlap, tensors_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NOISE_SCHEMA = (
    'str dist="normal", str sampler="iid", int positions=1, int draw=0, int row_offset=0, int col_offset=0, int width=0'
)

# The contract's indices are below these powers of two.
DRAW_BITS, ROW_BITS, COL_BITS = 32, 32, 34

_library = torch.library.Library("ulr", "DEF")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
FP32 = torch.finfo(torch.float32)
_NO_NUMBER = (TypeError, ValueError, OverflowError)  # what float() raises
OPS: dict[str, Op] = {}  # every op, by name


@dataclasses.dataclass(frozen=True)
class Cost:
    """The floor of a call: the fewest bytes to move, multiply-add operations (2 each) and noise values to make."""

    bytes: int
    flops: int
    noise: int


class NoiseSpec(NamedTuple):
    """The noise that an op uses: NOISE_SCHEMA, the key before it, and whether copies come in antithetic pairs.

    An op whose schema lacks some of these has their defaults.
    """

    key: Tensor
    antithetic: bool = False
    dist: str = "normal"
    sampler: str = "iid"
    positions: int = 1
    draw: int = 0
    row_offset: int = 0
    col_offset: int = 0
    width: int = 0  # columns of the whole noise; 0: this block's are the last ones

    def draws(self, copies: int) -> int:
        """The number of draws of `copies` copies."""
        return copies // 2 if self.antithetic else copies


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        function: the public function, `ulr.ops.<name>`.
        schema: arguments and results, in torch's schema language; all arguments are positional.
        arguments: a NamedTuple with a field for each argument of the schema, or with NamedTuples of some of them. It is
            the one value that `check`, `reference`, `cost` and every provider take.
        check: takes `arguments`; raises on bad input, else returns the op's `Output` (None if the op only writes into
            its arguments). It reads no tensor's values, so it is the fake too.
        reference: the torch back end. Takes the output (where there is one), then `arguments`. Like any provider it may
            return an output of its own instead of filling the given one.
        cost: takes `arguments`; the floor of a call.
        autocast: positions of the operands of a matrix product, which autocast casts.
    """

    function: Callable
    schema: str
    arguments: type
    check: Callable
    reference: Callable
    cost: Callable[..., Cost]
    autocast: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """`torch.ops.ulr.<name>`; also the stem of the files that implement it."""
        return self.function.__name__

    @functools.cached_property
    def bind(self) -> Callable[..., Any]:
        """A function from the schema's arguments, less trailing ones that equal their defaults, to `arguments`."""
        return _binder(self.arguments, getattr(torch.ops.ulr, self.name).default._schema)

    def floor(self, *args) -> Cost:
        """The cost of a call with the schema's arguments."""
        return self.cost(self.bind(*args))


def _binder(kind: type, schema: torch._C.FunctionSchema) -> Callable[..., Any]:
    """A function from the schema's arguments to a `kind`, generated as source like `collections.namedtuple`'s."""
    names = {argument.name for argument in schema.arguments}
    scope: dict[str, Any] = {}

    def constant(name: str, value: Any) -> str:
        scope[name] = value
        return name

    def expression(kind: type) -> str:
        fields = []
        for field, hint in get_type_hints(kind).items():
            if field in names:
                fields.append(field)
            elif hasattr(hint, "_fields"):
                fields.append(expression(hint))
            else:
                fields.append(constant(f"{kind.__name__}_{field}", kind._field_defaults[field]))  # type: ignore[attr-defined]
        make = constant(f"make_{kind.__name__}", getattr(kind, "of", functools.partial(tuple.__new__, kind)))
        return f"{make}({', '.join(fields)})" if hasattr(kind, "of") else f"{make}(({', '.join(fields)},))"

    parameters = [
        f"{a.name}={constant(f'given_{a.name}', a.default_value)}" if a.has_default_value() else a.name
        for a in schema.arguments
    ]
    return eval(f"lambda {', '.join(parameters)}: {expression(kind)}", scope)


class Output(NamedTuple):
    """Shape, dtype and memory layout of an op's result (cheaper than a meta tensor)."""

    shape: Sequence[int]
    dtype: torch.dtype
    innermost: int = -1  # the axis whose elements are neighbours in memory; the others follow in their order

    def numel(self) -> int:
        return math.prod(self.shape)

    def allocate(self, device: torch.device) -> Tensor:
        if self.innermost == -1:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        others = [size for axis, size in enumerate(self.shape) if axis != self.innermost]
        stored = torch.empty(*others, self.shape[self.innermost], dtype=self.dtype, device=device)
        return stored.movedim(-1, self.innermost)


def register(op: Op) -> None:
    """Define `torch.ops.ulr.<name>` and route its calls through the table of back ends."""
    name = op.name
    _library.define(f"{name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    schema, bind = getattr(torch.ops.ulr, name).default._schema, op.bind
    returns = bool(schema.returns)
    mutates = [
        i for i, argument in enumerate(schema.arguments) if argument.alias_info is not None
    ]  # lists: all of them
    # The first tensor that is not optional gives the device, or else the first list, which the check keeps non-empty.
    kinds = [str(argument.type) for argument in schema.arguments]
    place = kinds.index("Tensor") if "Tensor" in kinds else kinds.index("List[Tensor]")
    is_list = kinds[place] != "Tensor"

    def device_of(args: tuple) -> torch.device:
        return args[place][0].device if is_list else args[place].device

    def fake(*args):
        output = op.check(bind(*args))
        return output.allocate(device_of(args)) if returns else None

    def run(*args):
        bound = bind(*args)
        output, device = op.check(bound), device_of(args)
        if mutates:
            given = [i for i in mutates if i < len(args)]  # torch leaves out trailing arguments at their defaults
            written = [t for i in given for t in tensors_of(args[i])]
            refuse_overlap(name, given, args)
            # Providers write through raw pointers; without this autograd would not notice (and compute wrong values).
            torch.autograd.graph.increment_version(written)
        provider = dispatch.lookup(name, device)
        with torch._C._AutoDispatchBelowAutograd():  # a provider's calls are no part of any autograd graph
            if not returns:
                return provider(bound)
            if getattr(provider, "allocates", False):
                return provider(output, bound)
            out = output.allocate(device)
            made = provider(out, bound)
        return out if made is None else made

    def cast(device: str, *args):
        dtype = torch.get_autocast_dtype(device)

        def cast_one(value):
            if isinstance(value, list):
                return [cast_one(t) for t in value]
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        args = tuple(cast_one(a) if i in op.autocast else a for i, a in enumerate(args))
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):  # an op's own arithmetic is never cast
            return getattr(torch.ops.ulr, name).default(*args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
        _library.impl(name, functools.partial(cast, key.lower()), f"Autocast{key}")
    torch.library.register_fake(f"ulr::{name}", fake, lib=_library)
    dispatch.add_op(name, op.reference)
    OPS[name] = op


# ---------------------------------------------------------------------------------------------------------------------
# Checks. One form: ulr::<op>: '<argument>' must <rule>, got <value>.


class Check:
    """Raises ValueError naming the op, the argument, the rule and the value."""

    def __init__(self, op: str) -> None:
        self.op = op

    def fail(self, argument: str, rule: str, value: object) -> NoReturn:
        raise ValueError(f"ulr::{self.op}: '{argument}' must {rule}, got {value}")

    def shape(self, argument: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
        if tuple(tensor.shape) != shape:
            self.fail(argument, f"be {list(shape)} ({why})", list(tensor.shape))

    def dtype(self, argument: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
        if tensor.dtype not in allowed:
            self.fail(argument, "be " + " or ".join(str(d).removeprefix("torch.") for d in allowed), tensor.dtype)

    def device(self, like: str, device: torch.device, **others: Tensor | None) -> None:
        for argument, tensor in others.items():
            if tensor is not None and tensor.device != device:
                self.fail(argument, f"be on {device} like '{like}'", tensor.device)

    def dist(self, dist: str) -> None:
        if dist not in noise_contract.DISTRIBUTIONS:
            self.fail("dist", f"be one of {', '.join(noise_contract.DISTRIBUTIONS)}", repr(dist))

    def sampler(self, sampler: str, dist: str) -> None:
        if sampler not in noise_contract.SAMPLERS:
            self.fail("sampler", f"be one of {', '.join(noise_contract.SAMPLERS)}", repr(sampler))
        if sampler == "sobol" and dist == "rademacher":
            self.fail("sampler", "be 'iid' or 'hadamard' where dist is 'rademacher'", "'sobol'")
        if sampler == "hadamard" and dist != "rademacher":
            self.fail("dist", "be 'rademacher' where sampler is 'hadamard'", repr(dist))

    def width(self, argument: str, width: int, col_offset: int, cols: int, needed: bool) -> None:
        """The rules of the number of all columns; `needed`: coordinates of the sampler depend on it."""
        if width and width < col_offset + cols:
            self.fail(argument, f"be at least {col_offset + cols} (col_offset + columns), or 0", width)
        if needed and col_offset and not width:
            rule = "count the columns of the whole noise where col_offset is given and the sampler is not 'iid'"
            self.fail(argument, rule, width)

    def room(self, argument: str, value: int, extent: int, bits: int) -> None:
        """Check that `extent` indices of the contract from `value` on are in range."""
        if value < 0:
            self.fail(argument, "be at least 0", value)
        if value + extent > 2**bits:
            self.fail(argument, f"leave room for {extent} below 2^{bits}", value)

    def noise(self, noise: NoiseSpec, rows: int, cols: int, draws: int) -> None:
        """The index rules of the contract, for a block of rows x cols and a number of draws."""
        key, _, dist, sampler, positions, draw, row_offset, col_offset, width = noise
        if key.dtype != torch.int64 or key.dim() != 0:
            self.fail("key", "be an int64 scalar tensor", f"{key.dtype} {list(key.shape)}")
        self.dist(dist)
        self.sampler(sampler, dist)
        if positions < 1:
            self.fail("positions", "be at least 1", positions)
        self.room("draw", draw, draws, DRAW_BITS)
        self.room("row_offset", row_offset, rows, ROW_BITS)
        self.room("col_offset", col_offset, cols, COL_BITS)
        self.width("width", width, col_offset, cols, sampler != "iid" and positions > 1)
        if sampler == "sobol":
            width = width or col_offset + cols
            if positions * width > noise_contract.MAX_SOBOL_DIMENSIONS:
                self.fail(
                    "sampler",
                    f"be 'iid' beyond {noise_contract.MAX_SOBOL_DIMENSIONS} dimensions (positions x columns)",
                    f"'sobol' with {positions} x {width}",
                )
            if draw + draws > noise_contract.MAX_SOBOL_DRAWS:
                self.fail("draw", f"leave room for {draws} below 2^30 where sampler is 'sobol'", draw)

    def copies(self, copies: int, antithetic: bool, argument: str = "copies") -> int:
        """Check the number of copies; return their number of draws."""
        if copies < 1:
            self.fail(argument, "be at least 1", copies)
        if antithetic and copies % 2:
            self.fail(argument, "be even where antithetic is set", copies)
        return copies // 2 if antithetic else copies


def needs_gradient(op: str, instead: str, *inputs: Tensor | None) -> bool:
    """Whether autograd records a call; raises if an input carries a forward-mode tangent, which an op would drop."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs
    ):
        raise NotImplementedError(
            f"ulr::{op}: forward-mode derivatives are not implemented; use reverse mode, or {instead}"
        )
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Host numbers to tensors. A Python number in the schema would make torch.compile build one graph per value.


def key_and_sigma(
    op: str, key: int | Tensor, sigma: float | Tensor, device: torch.device, *, zero: bool = False
) -> tuple[Tensor, Tensor]:
    """`key_tensor` and `sigma_tensor`, which most ops need."""
    return key_tensor(op, key, device), sigma_tensor(op, sigma, device, zero=zero)


def key_tensor(op: str, key: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(key, Tensor):
        return key
    if not isinstance(key, int) or isinstance(key, bool) or not -(2**63) <= key <= 2**64 - 1:
        raise ValueError(f"ulr::{op}: 'key' must be an integer in [-2^63, 2^64) or an int64 scalar tensor, got {key!r}")
    return torch.full((), noise_contract.signed64(key), dtype=torch.int64, device=device)


def sigma_tensor(op: str, sigma: float | Tensor, device: torch.device, *, zero: bool) -> Tensor:
    """Sigma as fp32. Numbers and host tensors are checked: finite, and positive, or at least 0 where `zero`."""
    if not isinstance(sigma, Tensor):
        try:
            value = float(sigma)
        except _NO_NUMBER:
            Check(op).fail("sigma", "be a finite number or a tensor", repr(sigma))
        _check_sigma(op, value, zero)
        return torch.full((), value, dtype=torch.float32, device=device)
    readable = sigma.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(sigma, FakeTensor)
    if readable and sigma.numel():
        for extreme in (sigma,) if sigma.dim() == 0 else (sigma.min(), sigma.max()):
            _check_sigma(op, extreme.item(), zero)
    return sigma if sigma.dtype == torch.float32 else sigma.to(torch.float32)


def fp32_tensor(op: str, argument: str, value: float | Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """A number, or a sequence of numbers, as fp32. Values on the host must be finite in fp32."""
    if not isinstance(value, Tensor | Sequence):
        try:
            number = float(value)
        except _NO_NUMBER:
            Check(op).fail(argument, "be a finite number or a tensor", repr(value))
        if not abs(number) <= FP32.max:
            Check(op).fail(argument, "be finite in fp32", value)
        return torch.full((), number, dtype=torch.float32, device=device)
    if isinstance(value, Tensor):
        result = value if value.dtype == torch.float32 else value.to(torch.float32)
    else:
        try:
            result = torch.tensor(value, dtype=torch.float32, device="cpu")
        except (*_NO_NUMBER, RuntimeError):
            Check(op).fail(argument, "hold finite numbers", repr(value))
    readable = not torch.compiler.is_compiling() and not isinstance(result, FakeTensor)
    if readable and result.device.type == "cpu" and not bool(result.isfinite().all()):
        Check(op).fail(argument, "be finite in fp32", value)
    return result if isinstance(value, Tensor) else result.to(device)


def _check_sigma(op: str, value: float, zero: bool) -> None:
    if not (0 < value < math.inf or (zero and value == 0)):
        rule = "be finite and " + ("at least 0" if zero else "positive")
        raise ValueError(f"ulr::{op}: 'sigma' must {rule}, got {value}")
    # The kernels use the fp32 number: a sigma that vanishes or overflows there is refused as well.
    if value and not FP32.smallest_normal <= value <= FP32.max:
        raise ValueError(f"ulr::{op}: 'sigma' must be a normal fp32 number, got {value}")

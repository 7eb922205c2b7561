"""perturbed_conv2d: a convolution with weight noise, without writing the weight."""

from __future__ import annotations

from torch import Tensor

from ulr_kernels.ops import _conv, _perturbed
from ulr_kernels.ops._conv import Pair, Window
from ulr_kernels.ops._op import Check, Cost, Op, Output, fp32_tensor, key_tensor, register
from ulr_kernels.ops._parameters import grid
from ulr_kernels.ops._perturbed import MEMBERS_SCHEMA, Members

# Of the schema: padding is (top, bottom, left, right).
WINDOW_SCHEMA = "int[2] stride=1, int[4] padding=0, int[2] dilation=1, int groups=1"


def perturbed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    members: int = 1,
    antithetic: bool = False,
    rank: int | None = None,
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """y[p] = conv2d(x[p], W'_p) + b for each member p, W'_p = round_to_dtype(fma(sigma, eps_p, W)).

    The weight's noise is that of its view [O, I / groups * kh * kw]; low rank: as in `perturbed_linear`, W' rounded.

    Args:
        x: `[B, I, H, W]`, shared by the members, or `[P, B, I, H, W]`; fp32, bf16 or fp16; any strides.
        weight: `[O, I / groups, kh, kw]`, of x's dtype; any strides.
        bias: `[O]`, or `[P, O]` with one for each member, of x's dtype, or None. The caller perturbs it.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding also "same" or "valid".
        sigma, key, members, antithetic, rank, dist, draw, row_offset, col_offset: as in `perturbed_linear`.
        mask: bool or uint8 of weight's shape: noise only where it is set; not with `rank`.

    Returns:
        `[P, B, O, H', W']` of x's dtype, channels last where x or the weight is. Differentiable in x, weight,
        bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    _conv.check_kernel(Check("perturbed_conv2d"), "weight", weight, False)
    kernel = weight.shape[2:]
    window = _conv.resolve_window("perturbed_conv2d", kernel, stride, padding, dilation, groups, False, 0)
    key = key_tensor("perturbed_conv2d", key, x.device)
    scale = fp32_tensor("perturbed_conv2d", "sigma", sigma, x.device)
    how = Members(members, antithetic, rank, dist, draw, row_offset, col_offset, mask)
    return _perturbed.call("perturbed_conv2d", window.convolve, 4, (x, weight, bias, scale), key, window[:4], how)


def window_of(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Window:
    return Window.of(stride, padding, dilation, groups, False)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *rest,
) -> Output:
    rules, how, window = Check("perturbed_conv2d"), Members(*rest), window_of(stride, padding, dilation, groups)
    _conv.check_kernel(rules, "weight", weight, False)
    _conv.check_window(rules, window)
    _perturbed.check_members(rules, weight, sigma, key, how)
    if x.dim() not in (4, 5):
        rules.fail("x", "be [B, I, H, W] or [P, B, I, H, W]", list(x.shape))
    if x.dim() == 5 and x.shape[0] != how.members:
        rules.fail("x", f"have {how.members} members on its first axis, or no such axis", list(x.shape))
    sizes = _conv.check_sizes(rules, x, weight.shape, window, how.members, "weight")
    rules.dtype("weight", weight, (x.dtype,))
    _perturbed.check_bias(rules, weight, bias, how.members)
    rules.device("x", x.device, weight=weight, bias=bias, sigma=sigma, key=key, mask=how.mask)
    return _conv.output(x, weight, sizes, window)


def reference(y, x, weight, bias, sigma, key, stride, padding, dilation, groups, *rest) -> None:
    how, window = Members(*rest), window_of(stride, padding, dilation, groups)
    for member in range(how.members if y.numel() else 0):
        own = _perturbed.member_weight(weight, sigma, key, how, member).float()
        own_bias = _perturbed.of_member(bias, member, 1)
        own_bias = own_bias if own_bias is None else own_bias.float()
        y[member] = window.convolve(_perturbed.of_member(x, member, 4).float(), own, own_bias)


def cost(x, weight, bias, sigma, key, stride, padding, dilation, groups, *rest) -> Cost:
    how, window = Members(*rest), window_of(stride, padding, dilation, groups)
    sizes = _conv.sizes_of(x, weight.shape, window, how.members)
    out = how.members * sizes.rows * sizes.features
    rows, cols = grid(weight)
    noise = how.draws * (rows * cols if how.rank is None else how.rank * (rows + cols))
    return Cost(x.element_size() * (x.numel() + weight.numel() + out), 2 * out * sizes.inputs, noise)


register(
    Op(
        name="perturbed_conv2d",
        schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {WINDOW_SCHEMA}, "
        f"{MEMBERS_SCHEMA}) -> Tensor",
        function=perturbed_conv2d,
        check=check,
        reference=reference,
        cost=cost,
        autocast=(0, 1, 2),
    )
)

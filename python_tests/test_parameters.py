"""The ops on lists of parameters, perturb_ and combine_: against fp64, bit for bit between back ends, their rules."""

from __future__ import annotations

import fractions
import math

import pytest
import torch
import torch._dynamo.testing
import truth
from samples import Sample, values
from test_ops import clone, pick, poison, samples  # noqa: F401 -- poison applies itself

import ulr_kernels as ulr
from ulr_kernels.backends import cpp
from ulr_kernels.ops import combine_, perturb_
from ulr_kernels.ops._op import FLOATS, OPS

PARAMETERS = ("perturb_", "combine_")
STATES = ("momentum_buffers", "exp_avgs", "exp_avg_sqs")
CALLS = [(op, dtype, i) for op in PARAMETERS for dtype in FLOATS for i in samples(op, True) if dtype != torch.float16]
CALLS += [(op, torch.float16, i) for op, dtype, i in CALLS if dtype == torch.bfloat16 and i in ("normal", "momentum")]


def run(op: str, sample: Sample) -> dict[str, list[torch.Tensor]]:
    """The tensors that a sample's call writes, from copies."""
    tensors, *rest = clone(list(sample.args[0])), *sample.args[1:]
    kwargs = {k: clone(v) if k in STATES else v for k, v in sample.kwargs.items()}
    OPS[op].function(tensors, *rest, **kwargs)
    return {"tensors": tensors} | {k: kwargs[k] for k in STATES if k in kwargs}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def compare_bitwise(op: str, sample_id: str, device: str, dtype: torch.dtype) -> None:
    found = run(op, pick(op, sample_id, device, dtype))
    with ulr.use_backend("torch"):
        expected = run(op, pick(op, sample_id, "cpu", dtype))
    for name, tensors in expected.items():
        for i, (ours, theirs) in enumerate(zip(found[name], tensors, strict=True)):
            assert torch.equal(bits(ours), bits(theirs)), f"{name}[{i}] {list(ours.shape)}"


@pytest.mark.parametrize("op,dtype,sample_id", CALLS)
def test_bitwise_the_reference(op, dtype, sample_id, device) -> None:
    compare_bitwise(op, sample_id, device, dtype)


@pytest.mark.pair("cpp/cpu")
def test_instruction_sets_give_the_same_bits() -> None:
    chosen = {"perturb_": ("laplace", "rank-signs", "stochastic"), "combine_": ("rademacher", "adam-stochastic")}
    try:
        for isa in cpp.available_isas():
            cpp.set_isa(isa)
            for op, sample_ids in chosen.items():
                for sample_id in sample_ids:
                    with ulr.use_backend("cpp"):
                        compare_bitwise(op, sample_id, "cpu", torch.bfloat16)
    finally:
        cpp.set_isa(None)


# --- the reference ---------------------------------------------------------------------------------------------------


def adam(g, m, v, lr, step, weight_decay, betas, epsilon, t):
    """Kingma and Ba, algorithm 1, with decoupled decay."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    corrected = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    return t - lr * weight_decay * t - lr * corrected[0] / (corrected[1].sqrt() + epsilon), m, v


@pytest.mark.parametrize("op,dtype,sample_id", CALLS)
def test_within_rounding_of_the_definition(op, dtype, sample_id) -> None:
    sample = pick(op, sample_id, "cpu", dtype)
    tensors, keys, amount = sample.args
    known = ("draw", "dist", "rank", "row_offset", "col_offset", "sampler", "width")
    spec = {k: v for k, v in sample.kwargs.items() if k in known}
    rule = {k: v for k, v in sample.kwargs.items() if k not in known}
    with ulr.use_backend("torch"):
        found = run(op, sample)
    coefficients = [amount] if op == "perturb_" else amount
    lr, wd = float(rule.get("lr", 0.0)), rule.get("weight_decay", 0.0)
    for i, (g, magnitude) in enumerate(truth.combined_noise(tensors, keys, coefficients, **spec)):
        t = tensors[i].double()
        states = {k: rule[k][i].double() for k in STATES if k in rule}
        if "momentum_buffers" in states:
            b = rule["momentum"] * states["momentum_buffers"] + g
            expected = {"tensors": t - lr * wd * t - lr * b, "momentum_buffers": b}
        elif "exp_avgs" in states:
            now = (lr, int(rule["step"]), wd, rule.get("betas", (0.9, 0.999)), rule.get("epsilon", 1e-8), t)
            expected = dict(zip(("tensors", "exp_avgs", "exp_avg_sqs"), adam(g, *states.values(), *now), strict=True))
        else:
            expected = {"tensors": t - lr * wd * t + g}
        for name, value in expected.items():
            ours = found[name][i]
            last_place = torch.finfo(ours.dtype).eps * (2 if rule.get("stochastic") else 1)
            scale = value.abs() + magnitude + t.abs() + sum(s.abs() for s in states.values())
            allowed = last_place * value.abs() + 2e-6 * scale * (1 + scale) + torch.finfo(ours.dtype).smallest_normal
            top = torch.finfo(ours.dtype).max
            inside = value.abs() < top * (1 - last_place)
            error = (ours.double() - value)[inside].abs()
            assert not (error.isnan() | (error > allowed[inside])).any(), f"{name}[{i}]"
            assert (ours[~inside].double().abs() >= top * (1 - last_place)).all()


# --- the order of roundings, by exact arithmetic ---------------------------------------------------------------------

Exact = fractions.Fraction


def fp32(exact: Exact) -> Exact:
    """To nearest, ties to even; normal numbers."""
    if exact == 0:
        return exact
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Exact(2) ** exponent > size:
        exponent -= 1
    place = Exact(2) ** (exponent - 23)
    return round(exact / place) * place


def root(exact: Exact) -> Exact:
    """The square root to 80 bits and a sticky one, which rounds to fp32 as the exact root does."""
    shifted = exact * Exact(4) ** 100
    return Exact(math.isqrt(shifted.numerator // shifted.denominator) * 2 + 1, 2**101)


@pytest.mark.parametrize("rule", ["perturb", "sum", "momentum", "adam"])
def test_the_order_of_roundings_is_the_written_one(rule, device) -> None:
    """docs/noise.md, term by term, over rationals."""
    count, key, coefficients = 64, 77, [0.3, -0.2, 0.9]
    t, b = values(1, count, device=device, dtype=torch.float32), values(2, count, device=device, dtype=torch.float32)
    v = b.square()
    before = [[Exact(x.item()) for x in state] for state in (t, b, v)]
    eps = [[Exact(x.item()) for x in ulr.noise(count, key, draw=p, device=device)] for p in range(3)]
    single = torch.tensor([*coefficients, 0.05, 0.1, 0.9, 0.99, 1e-6])
    *c, lr, wd, beta1, beta2, epsilon = (Exact(x.item()) for x in single)
    states = {"momentum": dict(momentum=0.9, momentum_buffers=[b]), "adam": dict(exp_avgs=[b], exp_avg_sqs=[v])}
    if rule == "perturb":
        perturb_([t], [key], coefficients[0])
    else:
        more = states.get(rule, {}) | ({"betas": (0.9, 0.99), "epsilon": 1e-6, "step": 3} if rule == "adam" else {})
        combine_([t], [key], coefficients, lr=0.05, weight_decay=0.1, **more)
    decay = fp32(lr * wd)
    for i in range(count):
        old, b_old, v_old = (state[i] for state in before)
        if rule == "perturb":
            assert Exact(t[i].item()) == fp32(c[0] * eps[0][i] + old)
            continue
        g = Exact(0)
        for p in range(3):
            g = fp32(c[p] * eps[p][i] + g)
        kept = fp32(-decay * old + old)
        if rule == "sum":
            assert Exact(t[i].item()) == fp32(kept + g)
        elif rule == "momentum":
            new = fp32(beta1 * b_old + g)
            assert Exact(b[i].item()) == new and Exact(t[i].item()) == fp32(-lr * new + kept)
        else:
            m = fp32(beta1 * b_old + fp32(fp32(1 - beta1) * g))
            w = fp32(beta2 * v_old + fp32(fp32(fp32(1 - beta2) * g) * g))
            cube1, cube2 = (fp32(x * fp32(x * x)) for x in (beta1, beta2))
            rate, scale = fp32(lr / fp32(1 - cube1)), fp32(root(fp32(1 - cube2)))
            below = fp32(fp32(fp32(root(w)) / scale) + epsilon)
            assert Exact(b[i].item()) == m and Exact(v[i].item()) == w
            assert Exact(t[i].item()) == fp32(-rate * fp32(m / below) + kept)


# --- properties ------------------------------------------------------------------------------------------------------


def zeros(device: str, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes.values()]


SHAPES = {"large": (200, 150), "vector": (20000,), "kernel": (20, 15, 3, 3), "tiny": (3,), "wide": (3, 3000)}


@pytest.mark.parametrize("dist", ["normal", "laplace", "rademacher"])
def test_adds_the_noise_of_noise_like(dist, device) -> None:
    tensors, keys = zeros(device, **SHAPES), list(range(5))
    perturb_(tensors, keys, 1.0, draw=9, dist=dist)
    for tensor, key in zip(tensors, keys, strict=True):
        assert torch.equal(tensor, ulr.noise_like(tensor, key, draw=9, dist=dist))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_shards_make_their_part_of_the_whole(dist, rank, device) -> None:
    whole = values(1, 40, 300, device=device, dtype=torch.bfloat16)
    shards = [whole[:7, :130].clone(), whole[7:, :130].clone(), whole[:, 130:].clone()]
    at = {"row_offset": [0, 7, 0], "col_offset": [0, 0, 130]}
    for stochastic in (False, True):
        spec = {"dist": dist, "rank": rank, "draw": 4, "stochastic": stochastic}
        perturb_([whole], [5], 0.01, **spec)
        perturb_(shards, [5] * 3, 0.01, **spec, **at)
        combine_([whole], [5], [0.1, -0.2], lr=0.1, weight_decay=0.1, **spec)
        combine_(shards, [5] * 3, [0.1, -0.2], lr=0.1, weight_decay=0.1, **spec, **at)
        assert torch.equal(whole, torch.cat([torch.cat(shards[:2]), shards[2]], 1))


def test_thread_count_changes_no_bit(device) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tensors = zeros(device, torch.bfloat16, **SHAPES)
            perturb_(tensors, range(5), 0.1, rank=2, stochastic=True)
            combine_(tensors, range(5), [0.1, -0.3], draw=7, stochastic=True)
            found.append(tensors)
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def test_memory_format_does_not_enter(device) -> None:
    plain = values(1, 8, 6, 3, 3, device=device, dtype=torch.float32)
    last = plain.to(memory_format=torch.channels_last)
    for tensor in (plain, last):
        perturb_([tensor], [3], 0.5)
        combine_([tensor], [3], [0.5, 0.25], rank=2)
    assert torch.equal(plain, last) and last.is_contiguous(memory_format=torch.channels_last)


def test_a_vector_has_full_noise_whatever_the_rank(device) -> None:
    full, low = zeros(device, a=(50,), b=(50,))
    perturb_([full], [1], 1.0)
    perturb_([low], [1], 1.0, rank=1)
    assert torch.equal(full, low)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dist", ["normal", "laplace", "rademacher"])
def test_low_rank_noise_has_its_rank_and_unit_variance(dist, rank, device) -> None:
    copies = []
    for draw in range(40):
        (e,) = zeros(device, e=(64, 48))
        perturb_([e], [7], 1.0, dist=dist, rank=rank, draw=draw)
        assert torch.linalg.matrix_rank(e.cpu().double(), rtol=1e-5) == rank
        copies.append(e.cpu())
    squares = torch.stack(copies).double().square()
    factors = 40 * rank * 48  # independent values in the smaller factor
    assert abs(squares.mean() - 1) < 6 * math.sqrt(6 / factors)


def test_stochastic_rounding_is_unbiased(device) -> None:
    """The mean over draws of a weight plus less than its last place; and a few per cent off would be seen."""
    weight, step, draws = 1.0, 0.3 * 2**-7, 200
    total = torch.zeros(100, 100, dtype=torch.float64)
    for draw in range(draws):
        tensor = torch.full((100, 100), weight, dtype=torch.bfloat16, device=device)
        combine_([tensor], [draw], [], stochastic=True)
        assert (tensor == weight).all(), "what bf16 holds is kept"
        perturb_([tensor.zero_().add_(weight)], [draw], step, dist="rademacher", stochastic=True)
        moved = (tensor.double().cpu() - weight) / ulr.noise_like(tensor, draw, dist="rademacher").cpu()
        total += moved
    # Up one place of 2^-7 with probability 0.3, or down one of 2^-8 with probability 0.6.
    spread = math.sqrt((0.3 * 0.7 * 2**-14 + 0.6 * 0.4 * 2**-16) / 2 / total.numel() / draws)
    mean = total.mean() / draws
    assert abs(mean - step) < 5 * spread
    assert 0.03 * step > 5 * spread, "the test must notice 3 %"


def test_rounding_has_a_stream_of_its_own(device) -> None:
    """Whether an element was rounded up is uncorrelated with its noise, in sign and size."""
    tensor = torch.full((500, 500), 1.0, dtype=torch.bfloat16, device=device)
    perturb_([tensor], [3], 2**-10, stochastic=True)
    eps = ulr.noise_like(tensor, 3).cpu().double()
    exact = 1 + eps * 2**-10
    error = tensor.cpu().double() - exact
    for feature in (eps, eps.abs(), eps.roll(1, 1), eps.roll(1, 0)):
        assert abs((error * (feature - feature.mean())).mean()) < 5 * error.std() * feature.std() / 500


def test_every_version_counter_moves(device) -> None:
    tensors, states = zeros(device, **SHAPES), zeros(device, **SHAPES)
    perturb_(tensors, range(5), 1.0)
    combine_(tensors, range(5), [1.0], lr=0.1, momentum=0.9, momentum_buffers=states)
    assert all(t._version >= 2 for t in tensors) and all(s._version >= 1 for s in states)


def test_parameters_that_require_gradients_are_stepped_without_a_graph(device) -> None:
    parameters = [torch.nn.Parameter(t) for t in zeros(device, weight=(4, 3), bias=(4,))]
    perturb_(parameters, [1, 2], 1.0)
    for parameter, key in zip(parameters, (1, 2), strict=True):
        assert parameter.requires_grad and parameter.is_leaf and parameter.grad_fn is None
        assert torch.equal(parameter, ulr.noise_like(parameter, key))


def test_compiled_steps_share_one_graph(device) -> None:
    """Keys, rates, coefficients and step numbers change without another graph."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(tensors, states, keys, coefficients, lr, number):
        perturb_(tensors, keys, lr)
        combine_(tensors, keys, coefficients, lr=lr, exp_avgs=states[0], exp_avg_sqs=states[1], step=number)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    ours, theirs = (([*zeros(device, a=(5, 4), b=(3,))], [zeros(device, a=(5, 4), b=(3,)) for _ in "mv"]) for _ in "ab")
    for number in range(1, 4):
        tensors = [torch.tensor(x, device=device) for x in ([number, -number], [0.5 * number], 0.1 * number, number)]
        compiled(*ours, *tensors)
        step(*theirs, *tensors)
    assert counter.frame_count == 1
    assert all(map(torch.equal, ours[0], theirs[0]))


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ulr::perturb_: 'keys' must be on meta like 'tensors\[1\]', got cpu"):
        perturb_([torch.zeros(3), torch.zeros(3, device="meta")], [1, 2], 0.1)

"""A training step as a CUDA graph takes it: the same operations on the same memory, again and again.

A graph can be captured on a GPU alone; elsewhere what may go wrong with one is looked for. A recording runs a step once
and then repeats its operations without the Python that made them, so that a key which the host had put in would come
again, and a value that the host had read would be a synchronisation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import unfilled
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import ulr_kernels as ulr
from ulr_kernels import dispatch, noise_contract
from ulr_kernels.backends.capture import capturing
from ulr_kernels.backends.triton import device_tables
from ulr_kernels.estimators.step_keys import StepKeys
from ulr_kernels.ops._linear import LinearGradient
from ulr_kernels.ops._op import NoiseSpec
from ulr_kernels.ops.foreach_noisy_linear_grad_ import LinearGradients

READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")


class Recording(TorchDispatchMode):
    """The operations of a block, in order; `replay()` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict[str, Any], list[Tensor]]] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] in READS:
            self.reads.append(str(func))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(result)))
        return result

    def operations(self) -> list[str]:
        return [str(func) for func, *_ in self.calls]

    @torch.no_grad()
    def replay(self) -> None:
        made: dict[int, Tensor] = {}  # by the recorded result, which is kept alive
        for func, args, kwargs, results in self.calls:
            now = tree_map_only(Tensor, lambda t: made.get(id(t), t), (args, kwargs))
            again = _tensors(func(*now[0], **now[1]))
            made.update((id(old), new) for old, new in zip(results, again, strict=True))


def _tensors(result: Any) -> list[Tensor]:
    leaves = result if isinstance(result, list | tuple) else [result]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def filled(*widths: int, device: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        layer = unfilled(nn.Linear, inputs, outputs).to(device)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(ulr.noise_like(parameter, number) / inputs**0.5)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def training(
    device: str = "cpu", whole: bool = False, rows: bool = False, **settings
) -> tuple[nn.Sequential, ulr.ULR, Callable[[], None]]:
    """A model, its estimator, and a step of training that keeps to the same memory; `whole`: with a loss that the
    estimator knows, so that one op does it; `rows`: a sample has several, with a loss each."""
    model = filled(8, 6, 3, device=device)
    estimator = ulr.ULR(model, copies=4, seed=7, **settings)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = ulr.noise((5, 8), 3, device=device), torch.arange(5, device=device) % 3
    by_row = nn.CrossEntropyLoss(reduction="none")
    loss_fn, affects = by_row if whole else lambda *rows: by_row(*rows), None
    if rows:
        x, y, affects = x.unflatten(0, (1, 5)), y.unsqueeze(0), torch.ones(5, 5, device=device).triu()
        loss_fn = lambda outputs, labels: by_row(outputs.flatten(0, 1), labels.flatten()).view_as(labels)  # noqa: E731

    def step() -> None:
        estimator.backward(x, y, loss_fn, affects)
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)

    return model, estimator, step


def bits(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).view(torch.int32)


RECORDED = (
    {},
    {"injection": "joint"},
    {"baseline": "clean"},
    {"whole": True},
    {"whole": True, "injection": "joint"},
    {"rows": True},
)


@pytest.mark.parametrize("settings", RECORDED, ids=str)
def test_a_recorded_step_goes_on_with_fresh_noise_and_reads_nothing(settings) -> None:
    model, estimator, step = training(**settings)
    step()  # the first batch of a shape is looked at more closely
    with Recording() as recording:
        step()
    labels = 2 if "whole" in settings and "ulr.noisy_mlp_step.default" in recording.operations() else 0
    assert recording.reads == ["aten._local_scalar_dense.default"] * labels  # on a CPU alone: the classes are looked at
    recording.replay()
    recording.replay()
    expected, reference, run = training(**settings)
    for _ in range(4):
        run()
    assert estimator.step == reference.step == 4
    assert torch.equal(bits(model), bits(expected))


def test_a_key_from_the_host_is_seen(monkeypatch) -> None:
    """The same with the planted mistake: a step number that Python has put in."""

    def from_host(self, layers, sites):
        key = noise_contract.fold_in(self.seed, self.step)
        return dict(zip(layers, ulr.ops.fold_in(torch.tensor(key), sites).unbind(), strict=True))

    expected, _, run = training()
    for _ in range(3):
        run()
    monkeypatch.setattr(StepKeys, "of_sites", from_host)
    model, _, step = training()
    step()
    with Recording() as recording:
        step()
    recording.replay()
    assert recording.reads
    assert not torch.equal(bits(model), bits(expected))


@pytest.mark.parametrize("together", [False, True], ids=["closure", "batch"])
def test_an_optimiser_s_step_is_told_no_places_by_the_host(together) -> None:
    """Indexing by a list or a range copies it to the device, which the host waits for."""
    model, loss_fn = filled(8, 6, 3, device="cpu"), nn.CrossEntropyLoss(reduction="none")
    optimiser = ulr.optim.EGGROLL(model, lr=1e-3, sigma=0.01, population=8)
    x, y = ulr.noise((5, 8), 3), torch.arange(5) % 3

    def step() -> None:
        if together:
            optimiser.step_batch(x, y, loss_fn, chunk=3)
        else:
            optimiser.step(lambda: loss_fn(model(x), y).mean())

    step()  # the first batch of a shape is looked at more closely
    with Recording() as recording:
        step()
    assert not [name for name in recording.operations() if name.startswith("aten.index")]


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `step`, which has run before: on a stream of its own, as a capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_a_captured_step_goes_on_with_fresh_noise(device) -> None:
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    model, _, step = training(device)
    step()
    graph = captured(step)
    graph.replay()
    graph.replay()
    expected, _, run = training(device)
    for _ in range(4):
        run()
    assert torch.allclose(
        torch.cat([p.detach().flatten() for p in model.parameters()]),
        torch.cat([p.detach().flatten() for p in expected.parameters()]),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("op", ["noisy_mlp_step", "scale_shift_grad_"])
def test_what_blocks_leave_each_other_is_there_at_every_replay(op, device) -> None:
    """Kernels whose blocks wait for each other, or whose last block adds up."""
    buffers, run = adding(op, device)
    run()
    once = [buffer.clone() for buffer in buffers]
    replay = run if device == "cpu" else captured(run).replay
    for buffer in buffers:
        buffer.zero_()
    for _ in range(3):
        replay()
    for buffer, first in zip(buffers, once, strict=True):
        assert first.abs().max() > 0
        assert torch.allclose(buffer, 3 * first, rtol=1e-4, atol=1e-5)


def adding(op: str, device: str) -> tuple[list[Tensor], Callable[[], Any]]:
    """Buffers, and a call that adds to them."""

    def v(seed: int, *shape: int) -> Tensor:
        return ulr.noise(shape, seed, device=device)

    key, x = torch.tensor([7, 8], device=device), v(1, 70, 9)
    if op == "scale_shift_grad_":
        bias = torch.zeros(9, device=device)
        return [bias], lambda: ulr.ops.scale_shift_grad_(None, bias, x, v(2, 4, 35), 0.1, key[0], positions=2)
    weights, biases = [v(3, 40, 9), v(4, 5, 40)], [v(5, 40), v(6, 5)]
    buffers = [torch.zeros_like(t) for t in (*weights, *biases)]
    target = torch.arange(70, device=device) % 5
    return buffers, lambda: ulr.ops.noisy_mlp_step(
        buffers[:2], buffers[2:], x, target, weights, biases, 0.1, key, copies=4
    )


def changing(op: str, device: str, seed: int = 1) -> tuple[list[Tensor], Callable[[], Any]]:
    """Buffers, and a call that changes them all, told of them by a list."""

    def v(number: int, *shape: int) -> Tensor:
        return ulr.noise(shape, 10 * seed + number, device=device)

    buffers, keys = [v(1, 30, 7), v(2, 9), v(3, 4, 5)], torch.tensor([7, 8, 9], device=device)
    amounts = torch.tensor([0.1, -0.2], device=device)
    if op == "perturb_":
        return buffers, lambda: ulr.ops.perturb_(buffers, keys, amounts[0])
    if op == "combine_":
        return buffers, lambda: ulr.ops.combine_(buffers, keys, amounts)
    weights, xs, losses, key = [buffers[0], buffers[2]], [v(4, 6, 7), v(5, 6, 5)], [v(6, 2, 6)] * 2, list(keys[:2])
    return weights, lambda: ulr.ops.foreach_noisy_linear_grad_(weights, [None] * 2, xs, losses, [amounts[0]] * 2, key)


@pytest.mark.parametrize("op", ["perturb_", "combine_", "foreach_noisy_linear_grad_"])
def test_a_captured_list_is_there_at_every_replay_whatever_lists_follow(op, device) -> None:
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    buffers, run = changing(op, device)
    graph = captured(run)
    others = [changing(op, device, seed) for seed in range(2, device_tables.LISTS + 8)]
    for _, change in others:
        change()
    for _ in range(2):
        graph.replay()
    expected, run = changing(op, device)
    for _ in range(3):  # the first as `captured` does
        run()
    for buffer, reference in zip(buffers, expected, strict=True):
        assert torch.allclose(buffer, reference, rtol=1e-5, atol=1e-6)


@pytest.fixture
def tables(monkeypatch) -> Callable[[int], device_tables.Tables]:
    """Triton's tables of a list that a number stands for, with none at the start."""
    monkeypatch.setattr(device_tables, "_recent", {})
    monkeypatch.setattr(device_tables, "_captured", {})
    return lambda number: device_tables.on_device(((number, 5), (number, 6)), (2, 1), torch.device("cpu"))


def test_tables_of_a_list_are_kept_if_a_graph_reads_them(tables, monkeypatch) -> None:
    entries, owners = tables(0)
    assert entries.tolist() == [[0, 5], [0, 6]] and owners.tolist() == [0, 0, 1]
    with monkeypatch.context() as capture:
        capture.setattr(device_tables, "capturing", lambda device: True)
        assert tables(0)[0] is entries
    kept, dropped = weakref.ref(entries), weakref.ref(tables(1)[0])
    del entries, owners
    for number in range(2, device_tables.LISTS + 2):
        tables(number)
    assert kept() is not None and dropped() is None
    monkeypatch.setattr(device_tables, "capturing", lambda device: True)
    assert tables(0)[0] is kept()
    with pytest.raises(dispatch.BackendError, match="run the same call on the same tensors once"):
        tables(1)


def test_tables_of_a_list_belong_to_a_stream(tables, monkeypatch) -> None:
    """A stream does not wait for the copies of another, and memory is freed in the order of its own stream."""
    first = tables(0)[0]
    assert tables(0)[0] is first
    monkeypatch.setattr(device_tables, "_stream", lambda device: 1)
    second = tables(0)[0]
    assert second is not first and tables(0)[0] is second


def test_a_capture_is_that_of_the_list_s_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert capturing(torch.device("cuda:1"))
    assert not capturing(torch.device("cpu"))


@pytest.mark.parametrize("why", ["captured", "long"])
def test_layers_one_by_one_where_no_table_tells_of_them(why, monkeypatch) -> None:
    pytest.importorskip("triton")
    from ulr_kernels.backends.triton import foreach_noisy_linear_grad_ as module

    rows, calls = 2**31 if why == "long" else 6, []
    monkeypatch.setattr(module, "noisy_linear_grad_", calls.append)
    monkeypatch.setattr(module, "launches", lambda *args: pytest.fail("a table was made"))
    monkeypatch.setattr(module, "capturing", lambda device: why == "captured")
    weights, xs = [torch.zeros(3, 2)] * 2, [torch.zeros(6, 2), torch.zeros(1, 2).expand(rows, 2)]
    ones = [torch.ones(())] * 2
    losses, biases = [torch.ones(2, 6), torch.ones(2, 1)], [torch.empty(0)] * 2
    keys = [torch.tensor(1)] * 2
    a = LinearGradients(weights, biases, xs, losses, ones, keys, False, "normal", "iid", [1, rows], 0, [], [], [])
    module.foreach_noisy_linear_grad_(a)
    assert [layer.x.shape[0] for layer in calls] == [6, rows]


def test_kernels_that_a_capture_takes_have_run_before_it(monkeypatch) -> None:
    """Triton would load them in the capture, which CUDA refuses: the first call of a form runs them, for nothing."""
    pytest.importorskip("triton")
    from ulr_kernels.backends.triton import foreach_noisy_linear_grad_ as module

    ran: list[LinearGradient] = []
    monkeypatch.setattr(module, "noisy_linear_grad_", ran.append)
    monkeypatch.setattr(module, "_rehearsed", set())

    def layer(rows: int, draw: int) -> LinearGradient:
        weight, bias, x, losses = torch.zeros(3, 2), torch.zeros(3), torch.ones(rows, 2), torch.ones(2, rows)
        noise = NoiseSpec(torch.tensor(1), draw=draw)
        return LinearGradient(weight, bias, None, x, losses, torch.ones(()), noise)

    first, second = layer(6, 0), layer(16, 0)  # Triton compiles for what 16 divides
    module.rehearse([first, second, first, layer(6, 32), layer(5, 0)])
    assert [layer.x.shape[0] for layer in ran] == [6, 16]
    scratch = ran[0]
    assert scratch.grad_weight is not first.grad_weight and scratch.grad_bias is not first.grad_bias
    assert scratch.x is first.x
    module.rehearse([layer(6, 1)])  # and for a 1
    assert len(ran) == 3

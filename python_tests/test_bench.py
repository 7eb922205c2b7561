"""The benchmark is held to account too: rivals compute what they should, ratios, floors and verdicts are right."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import unfilled
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels import dispatch
from ulr_kernels.jobs import JobError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import goals, gpu_bench, machine, measured, memory, record, report, rivals, rows, run  # noqa: E402
from bench.goals import Goal  # noqa: E402
from bench.report import Line, Measurement  # noqa: E402
from bench.rows import noise, row, step  # noqa: E402

native = pytest.mark.skipif(
    isinstance(dispatch.find("cpp", "noise", "cpu"), str), reason="takes minutes without the C++ back end"
)
CEILINGS = {"2": {"overlap": False, "bytes": 1e9, "flops fp32": 1e9, "normal": 1e9}}


def normal(seed: int, *shape: int) -> Tensor:
    return row.normal(seed, *shape, device="cpu")


# --- rivals ----------------------------------------------------------------------------------------------------------


def forward_rivals(copies: int, source: torch.Generator) -> dict:
    return {
        "repeat_input": lambda x, w, b: rivals.repeat_input(x, w, b, 0.5, copies, source),
        "repeat_product": lambda x, w, b: rivals.repeat_product(x, w, b, 0.5, copies, source),
        "compilable": lambda x, w, b: rivals.compilable(x, w, b, 0.5, copies),
        "ulr": lambda x, w, b: ulr.ops.noisy_linear(x, w, b, 0.5, 3, copies=copies),
    }


@pytest.mark.parametrize("name", ["repeat_input", "repeat_product", "compilable", "ulr"])
def test_forward_rivals_add_the_same_noise_to_the_same_product(name: str) -> None:
    x, weight, bias = normal(1, 16, 20), normal(2, 24, 20), normal(3, 24)
    with torch.random.fork_rng():
        y = forward_rivals(50, rivals.generator("cpu"))[name](x, weight, bias)
    assert y.shape == (50, 16, 24)
    eps = (y - F.linear(x, weight, bias)) / 0.5
    error = 1 / math.sqrt(eps.numel())
    assert abs(eps.mean()) < 5 * error and abs(eps.var() - 1) < 5 * math.sqrt(2) * error
    assert abs((eps[0] * eps[1]).mean()) < 5 / math.sqrt(16 * 24), "copies must not share their noise"


def test_gradient_rivals_agree_given_the_same_noise() -> None:
    x, loss_weight, half = normal(1, 16, 20), normal(2, 8, 16), normal(3, 4 * 16, 24)
    eps = torch.cat([half, -half])
    authors = rivals.authors_gradient(x.repeat(8, 1), eps, loss_weight, 0.5)
    for other in (
        rivals.reduced_gradient(x, eps, loss_weight, 0.5),
        rivals.paired_gradient(x, half, loss_weight, 0.5),
    ):
        torch.testing.assert_close(other, authors, rtol=1e-4, atol=1e-4)


def test_gradient_rivals_agree_with_the_op_given_its_noise() -> None:
    x, loss_weight = normal(1, 16, 20), normal(2, 8, 16)
    eps = torch.cat([ulr.noise((16, 24), 5, draw=c % 4) * (1 if c < 4 else -1) for c in range(8)])
    weight, bias = torch.zeros(24, 20), torch.zeros(24)
    ulr.ops.noisy_linear_grad_(weight, bias, x, loss_weight, 0.5, 5, antithetic=True)
    authors = rivals.authors_gradient(x.repeat(8, 1), eps, loss_weight, 0.5)
    torch.testing.assert_close((weight, bias), authors, rtol=1e-4, atol=1e-4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quadratic(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets[:, None]).square().sum(1)


def mean_and_error(gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(gradients).double()
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(gradients))


def linear_network() -> torch.nn.Sequential:
    """A convolution and a linear layer: 9 pixels, 4 outputs."""
    layers = unfilled(torch.nn.Conv2d, 1, 2, 3, padding=1), torch.nn.Flatten(), unfilled(torch.nn.Linear, 18, 4)
    for i, parameter in enumerate(p for layer in layers for p in layer.parameters()):
        parameter.data.copy_(normal(20 + i, *parameter.shape) / 4)
    return torch.nn.Sequential(layers[0], layers[1], layers[2])


@pytest.mark.parametrize("at_once", [None, 4])
def test_authors_step_is_unbiased(at_once, one_thread: None) -> None:
    """A linear network and a quadratic loss: smoothing by noise leaves the gradient as it is; chunks of copies too."""
    model, source = rivals.as_noisy(linear_network()), rivals.generator("cpu")
    x, y = normal(1, 10, 1, 3, 3), torch.arange(10.0) / 5
    found = []
    for _ in range(200):
        rivals.authors_step(model, x, y, quadratic, 0.3, (16, 8), source, at_once)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    rivals.backprop_step(model, x, y, quadratic)
    truth = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    mean, error = mean_and_error(found)
    assert ((mean - truth) / error).abs().max() < 4.5
    assert ((mean - 1.2 * truth) / error).abs().max() > 4.5, "the test must notice 20 %"


def test_authors_step_and_the_estimator_agree(one_thread: None) -> None:
    """Two layers: the same expectation of every gradient, in the rows' settings."""
    sizes, x, y = (6, 5, 3), normal(1, 10, 6), torch.arange(10) % 3

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    theirs, mine, source = rivals.mlp(sizes, rivals.NoisyLinear), rivals.mlp(sizes), rivals.generator("cpu")
    estimator = ulr.ULR(mine, sigma=0.3, copies=16, antithetic=True, injection="layerwise", baseline="clean", seed=0)
    found: dict[str, list[Tensor]] = {"theirs": [], "mine": []}
    for _ in range(300):
        rivals.authors_step(theirs, x, y, loss_fn, 0.3, 16, source)
        found["theirs"].append(torch.cat([p.grad.flatten() for p in theirs.parameters()]))
        mine.zero_grad()
        estimator.backward(x, y, loss_fn)
        found["mine"].append(torch.cat([p.grad.flatten() for p in mine.parameters()]))
    (a, a_error), (b, b_error) = mean_and_error(found["theirs"]), mean_and_error(found["mine"])
    error = (a_error**2 + b_error**2).sqrt()
    assert ((a - b) / error).abs().max() < 4.5
    assert ((a - 1.3 * b) / error).abs().max() > 4.5, "the test must notice 30 %"


# --- the table -------------------------------------------------------------------------------------------------------


def cost(size: int = 0, flops: int = 0, noise: int = 0) -> dict:
    return {"bytes": size, "flops": flops, "noise": noise, "kind": "fp32", "dist": "normal"}


def sweeps(contestant: str, *seconds: float, extra_bytes: int | None = None) -> list[Measurement]:
    return [Measurement("row", "a row", contestant, i, s, cost(10**6), "2", extra_bytes) for i, s in enumerate(seconds)]


def test_ratios_are_taken_sweep_by_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "GOALS", (Goal("row", "rival", 4), Goal("row", "rival", 30, "memory")))
    measured = sweeps("ulr", 0.002, 0.004, 0.002, extra_bytes=10**6) + sweeps("ulr, one thread", 0.004, 0.008, 0.004)
    measured += sweeps("rival", 0.008, 0.016, 0.010, extra_bytes=2 * 10**7)
    thread, rival, held = report.lines(measured, CEILINGS)
    assert (thread.rival, thread.ratio, thread.goal, thread.met) == ("ulr, one thread", 2, None, None)
    assert (rival.rival, rival.ratio, rival.goal, rival.met) == ("rival", 4, 4, True)
    assert rival.floor == pytest.approx(2), "a megabyte at 1e9 bytes/s takes 1 ms"
    assert (held.what, held.ratio, held.met) == ("memory", 20, False)
    text = report.table([thread, rival, held])
    assert "NOT MET" in text and ">= 4x" in text and "20.00 MB" in text


def test_figures_of_a_table_are_never_powers_of_ten() -> None:
    """Three digits of %g give 1e+03 from 999.5 on."""
    shown = {9.997e-5: "100 us", 9.994e-4: "999 us", 9.997e-4: "1 ms", 0.9996: "1 s", 1234.0: "1230 s"}
    for seconds, text in shown.items():
        line = Line("a row", "time", "ulr", seconds, "a rival", seconds, 34816.0, 1000.0, None)
        assert report.table([line]).splitlines()[1] == f"a row  {text}         a rival  {text}  34800x  >= 1000x  met"


def test_floor_adds_arithmetic_on_a_cpu_and_overlaps_it_on_a_gpu() -> None:
    work = cost(size=10**6, flops=2 * 10**6, noise=3 * 10**6)
    assert report.floor_seconds(work, CEILINGS["2"]) == pytest.approx(5e-3)
    assert report.floor_seconds(work, CEILINGS["2"] | {"overlap": True}) == pytest.approx(3e-3)
    assert report.floor_seconds(cost(size=10**7, noise=1), CEILINGS["2"]) == pytest.approx(1e-2)


def test_every_row_has_its_ceilings_however_many_threads_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "median_seconds", lambda run, budget=0.0: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert {str(make().threads or 5) for make in rows.cpu_rows().values()} <= set(machine.cpu_ceilings())


def test_every_goal_has_its_row_and_rival() -> None:
    made = {key: make() for key, make in rows.cpu_rows().items()}
    on_gpu, wanted = rows.gpu_rows(("torch",), small=True, device="cpu"), {goal.row for goal in goals.GOALS}
    made |= {f"gpu-{key}": make() for key, make in on_gpu.items() if f"gpu-{key}" in wanted}
    for goal in goals.GOALS:
        if goal.row == "normal-2-threads" and goal.row not in made:
            continue  # this machine has one core
        if goal.row.startswith("mezo-") and goal.row not in made:
            continue  # the model's package is not installed
        if goal.rival in rivals.PACKAGES and not rivals.installed(rivals.PACKAGES[goal.rival]):
            continue
        assert goal.rival in made[goal.row].contestants, goal
        assert goal.what == "time" or made[goal.row].memory, goal


def test_cost_of_a_step_by_hand() -> None:
    """Sizes 4-3-2, batch 5, 6 copies."""
    model = rivals.mlp((4, 3, 2))
    found = step.layerwise_cost(step.layers_of(model, normal(0, 1, 4)), 5, (6, 6))
    clean_and_gradient = 2 * 2 * 5 * (4 * 3 + 3 * 2)
    assert found.flops == clean_and_gradient + 2 * 6 * 5 * 3 * 2
    assert found.noise == 2 * 3 * 5 * (3 + 2), "antithetic: half the copies, made twice"
    assert step.layers_of(linear_network(), normal(0, 1, 1, 3, 3)) == [(9, 18, 18, 18 * 9), (18, 72, 4, 72)]


@native
def test_bench_from_one_end_to_the_other(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # under which pytest-benchmark measures nothing
    found = run.run(tmp_path, quick=True, only="rademacher and not perturb")
    assert [(line.rival, line.goal) for line in found] == [("tensor.bernoulli_", 60)]
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["lines"][0]["ratio"] == found[0].ratio > 1
    assert {"device", "torch", "triton", "commit", "backends"} <= set(content["ulr"])
    with (tmp_path / "bench.csv").open() as file:
        assert next(csv.DictReader(file))["row"] == found[0].row
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert "tensor.bernoulli_" in capsys.readouterr().out


def test_a_rival_that_the_machine_lacks_is_a_dash_with_its_reason(monkeypatch) -> None:
    monkeypatch.setattr(rivals.products, "supports", lambda dtype: False)
    with pytest.raises(rivals.RivalAbsent, match="oneDNN multiplies no bfloat16 on this CPU") as reason:
        rivals.onednn_linear(*(normal(i, 2, 2).bfloat16() for i in (1, 2)), None)
    absent = Measurement("row", "a row", "rival", 0, None, cost(10**6), "2", absent=str(reason.value))
    (line,) = report.lines([*sweeps("ulr", 0.002), absent], CEILINGS)
    assert (line.rival_value, line.ratio, line.met) == (None, None, None)
    shown = report.table([line]).splitlines()[1]
    assert shown.split("rival")[1].split()[:2] == ["-", "-"] and shown.endswith("no bfloat16 on this CPU")


def test_ceilings_of_products_need_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without AVX-512 has no oneDNN product of bf16."""
    monkeypatch.setattr(rivals.products, "supports", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(machine, "median_seconds", lambda call, budget=0.0: call(0) is None or 1.0)
    for ceilings in machine.cpu_ceilings().values():
        assert ceilings["flops bf16"] == ceilings["flops fp32"] == 2 * 1024**3


def kept(monkeypatch: pytest.MonkeyPatch, out: Path) -> record.Record:
    monkeypatch.setattr(record.machine, "cpu_ceilings", lambda: CEILINGS)
    return record.Record(out)


def test_a_row_is_on_the_disk_when_the_next_one_begins(tmp_path: Path, monkeypatch) -> None:
    found = kept(monkeypatch, tmp_path / "out")
    for measurement in sweeps("ulr", 0.002) + sweeps("rival", 0.008):
        found.add(measurement)
    assert not (tmp_path / "out").exists()
    found.add(Measurement("next", "the next row", "ulr", 0, 1.0, cost(10**6), "2"))
    (line,) = json.loads((tmp_path / "out" / "bench.json").read_text())["lines"]
    assert (line["row"], line["ratio"]) == ("a row", 4)


def test_rows_without_rivals_make_no_table(tmp_path: Path, monkeypatch) -> None:
    found = kept(monkeypatch, tmp_path / "out")
    found.add(sweeps("ulr", 0.002)[0])
    found.write()
    assert not (tmp_path / "out").exists()
    pytest_that(monkeypatch, pytest.ExitCode.OK)
    with pytest.raises(JobError, match="no rival was measured"):
        run.run(tmp_path / "out")


def pytest_that(monkeypatch: pytest.MonkeyPatch, code: int, measurements: Sequence[Measurement] = ()) -> None:
    """Instead of the benchmarks: ends with this exit code, and has measured this."""

    def done(command: list[str], **options) -> subprocess.CompletedProcess:
        written = kept(monkeypatch, Path(next(c for c in command if c.startswith("--out=")).removeprefix("--out=")))
        written.found.extend(measurements)
        written.write()
        return subprocess.CompletedProcess(command, code)

    facts = machine.facts("cpu")
    monkeypatch.setattr(record.machine, "facts", lambda device: facts)
    monkeypatch.setattr(run.subprocess, "run", done)


def test_a_benchmark_that_fails_does_not_take_the_others_with_it(tmp_path: Path, monkeypatch) -> None:
    pytest_that(monkeypatch, pytest.ExitCode.TESTS_FAILED, sweeps("ulr", 0.002) + sweeps("rival", 0.008))
    with pytest.raises(ChildProcessError, match="a benchmark failed"):
        run.run(tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["lines"][0]["ratio"] == 4


def test_nothing_is_measured_for_a_table_that_cannot_be_made(tmp_path: Path, monkeypatch) -> None:
    pytest_that(monkeypatch, pytest.ExitCode.USAGE_ERROR)
    with pytest.raises(JobError, match="--only must be an expression of pytest's -k, got 'a b'"):
        run.run(tmp_path, only="a b")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(JobError, match="cannot be written"):
            run.run(out)


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not keep a process's peak")
def test_memory_is_seen() -> None:
    """The authors' way keeps the repeated batch and the noise; the op keeps nothing."""
    kept = 4 * 64 * 128 * (784 + 512)
    theirs, mine = memory.extra_bytes("gradient", "authors' way"), memory.extra_bytes("gradient", "ulr")
    assert theirs is not None and mine is not None
    assert kept < theirs < 4 * kept
    assert mine < kept / 20


def test_the_tables_of_the_docs_are_those_of_the_committed_results() -> None:
    assert measured.PAGE.read_text() == measured.page(), "python -m bench.measured makes them anew"


# --- the GPU's script ------------------------------------------------------------------------------------------------


def test_gpu_script_names_its_stages(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "bench/gpu.sh", str(tmp_path), "tiles", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == ""  # nothing has run
    assert done.returncode == 2 and "unknown stage 'nonsense'" in done.stderr
    assert subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, capture_output=True).returncode == 2


def test_samples_are_compared_with_the_reference(tmp_path: Path, monkeypatch, capsys) -> None:
    """The part of the script that runs every kernel once; a wrong value and an infinite one are seen."""
    monkeypatch.setattr(gpu_bench, "OPS", {"noise": gpu_bench.OPS["noise"]})
    options = ["gpu_bench", "samples", "--device", "cpu", "--backends", "torch", "--check", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    gpu_bench.main()
    entries = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert len(entries) == 2 and all(e["samples"] > 10 and not e["failed"] and e["error"] == 0 for e in entries)

    call = gpu_bench.call
    for wrong in (1.1, torch.inf, torch.nan):
        results = iter([wrong, 1.0] * 200)
        monkeypatch.setattr(gpu_bench, "call", lambda *args, r=results: [t * next(r) for t in call(*args)[:1]])
        with pytest.raises(SystemExit, match="failed samples: torch noise torch.float32"):
            gpu_bench.main()
    assert "relative error 1.0e-01, more than 1e-04" in capsys.readouterr().out


def test_the_rows_of_the_table_are_rows_of_the_gpu() -> None:
    assert set(rows.GPU_TABLE) < set(rows.gpu_rows(("torch",)))


@pytest.mark.parametrize("how", ["it loses the device", "it never ends"])
def test_a_row_that_ends_its_process_costs_itself_alone(how: str, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")

    def sized(size: int) -> row.Row:
        if size == 2**11 and how == "it never ends":
            threading.Event().wait(20)
        return noise.noise_row("rademacher", size, "cpu", names=("torch",))

    def end(code: int) -> None:
        """Instead of ending this process: leave the rows, which run on the main thread."""
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(code)
        os.kill(os.getpid(), signal.SIGALRM)

    def wake(number: int, frame: object) -> None:
        raise SystemExit(gpu_bench.LOST)

    makers = {str(2**k): functools.partial(sized, 2**k) for k in (10, 11, 12)}
    monkeypatch.setattr(rows, "gpu_rows", lambda *arguments: makers)
    monkeypatch.setattr(gpu_bench, "SWEEPS", 1)
    monkeypatch.setattr(gpu_bench.os, "_exit", end)
    if how == "it never ends":
        monkeypatch.setattr(gpu_bench, "ROW_SECONDS", 2)
    else:
        ends = iter([False, True, False])
        monkeypatch.setattr(gpu_bench, "lost", lambda device: next(ends))
    before = signal.signal(signal.SIGALRM, wake)
    options = ["gpu_bench", "rows", "--device", "cpu", "--small", "--backends", "torch", "--out", str(tmp_path)]
    try:
        monkeypatch.setattr(sys, "argv", options)
        with pytest.raises(SystemExit) as left:
            gpu_bench.main()
        assert left.value.code == gpu_bench.LOST
        monkeypatch.setattr(sys, "argv", [*options, "--go-on"])
        with pytest.raises(SystemExit, match="failed rows: 2048"):
            gpu_bench.main()
    finally:
        signal.signal(signal.SIGALRM, before)
    found = {line["row"] for line in json.loads((tmp_path / "gpu.json").read_text())["lines"]}
    assert {"rademacher fill 2^10", "rademacher fill 2^12"} <= found


def test_gpu_script_goes_on_after_a_row_that_ended_its_process(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(
        'echo "$*" >>"$0.log"\ncase "$*" in *facts) echo facts ;; *--go-on) echo rest ;; *) exit 75 ;; esac\n'
    )
    command = ["bash", "bench/gpu.sh", str(tmp_path / "out"), "table"]
    environment = {**os.environ, "PYTHON": f"bash {tmp_path / 'python'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "failed: table" in done.stdout
    called = (tmp_path / "python.log").read_text().splitlines()
    assert [line.endswith("--go-on") for line in called if "rows" in line] == [False, True]
    assert "exit code 75" in (tmp_path / "out" / "table" / "gpu.txt").read_text()


def test_every_row_of_the_gpu_runs_in_small() -> None:
    for key, make in rows.gpu_rows(("torch",), small=True, device="cpu").items():
        row = make()
        mine = [c for name, c in row.contestants.items() if name.startswith("ulr torch")]
        assert mine, key
        with mine[0].settings(row), torch.no_grad():
            mine[0].run(*row.inputs(0))


def test_tile_candidates_begin_with_the_one_in_use() -> None:
    pytest.importorskip("triton")
    for table in (gpu_bench.tiles.NOISE, gpu_bench.tiles.FORWARD, gpu_bench.tiles.GRADIENT):
        for key, used in table.items():
            found = gpu_bench.candidates(table, key)
            assert found[0] == used and len(found) == len(set(found)) > 3


def test_a_tile_that_loses_the_device_is_the_last_one(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton")

    def median(*call) -> float:
        if not (found := tmp_path / "tiles.json").exists() or len(json.loads(found.read_text())["tiles"]) < 2:
            return 1.0
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_bench, "median", median)
    monkeypatch.setattr(gpu_bench, "lost", lambda device: True)
    monkeypatch.setattr(sys, "argv", ["gpu_bench", "tiles", "--device", "cpu", "--small", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="has lost the device"):
        gpu_bench.main()
    tiles = json.loads((tmp_path / "tiles.json").read_text())["tiles"]
    assert ["error" in tile for tile in tiles] == [False, False, True]

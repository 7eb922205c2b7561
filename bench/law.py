"""Measure each layer's error of an estimate against the forwards spent, by technique.

    python -m bench.law --model mlp --data mnist5k
    python -m bench.law --model resnet5 --data FOLDER --copies 16 64 --out law-resnet5

The error is |estimate - gradient|^2 / |gradient|^2 of a layer's parameters, the mean over steps and seeds, on one batch
at weights that backpropagation has trained for some steps. Guides learn on other batches at these weights. Plain
Monte Carlo has the law (d + 1) / M for M directions of d coordinates. A spiking network has no gradient: the mean of
very many pairs takes its place.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels.estimators.settings import PRESETS
from ulr_kernels.recipes import data, models

SIGNS = {"dist": "rademacher", "sampler": "hadamard"}
WITHOUT_GRADIENT = {"spiking": 16384}
"""By model: the copies of the estimate that takes the gradient's place."""
MOST_PANELS = 8  # layers in a picture, evenly chosen

TECHNIQUES: dict[str, dict[str, Any]] = {
    "pairs": {"antithetic": True},
    "single copies": {"antithetic": False},
    "orthogonal pairs": {"antithetic": True, **SIGNS},
    "orthogonal": {"antithetic": False, "baseline": "clean", **SIGNS},
    "guide": {"antithetic": False, "guide": "feedback"},
    "support": {"antithetic": False, "support": "active"},
    "best": PRESETS["best"],
}


class Problem:
    """A model, half-trained, with one batch whose gradient is known and others for guides to learn from."""

    def __init__(self, args: argparse.Namespace, seed: int, steps: int) -> None:
        dataset = data.load(args.data)
        mean, deviation = dataset.scale()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dataset.train), generator=generator)[: args.images]
        self.x = (dataset.train.images[order].float() - mean) / deviation
        self.y = dataset.train.labels[order]
        self.model = models.build(args.model, dataset.shape, len(dataset.classes), seed, torch.device("cpu"))
        self.loss_fn = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
        self.batch, self.generator = args.batch, generator
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        for _ in range(steps):
            x, y = self.other()
            optimizer.zero_grad()
            self.loss_fn(self.model(x), y).mean().backward()
            optimizer.step()
        own = self.x[: self.batch], self.y[: self.batch]
        self.model.zero_grad()
        if args.model in WITHOUT_GRADIENT:
            copies = WITHOUT_GRADIENT[args.model]
            ulr.ULR(self.model, args.sigma, copies, antithetic=True, seed=10**6 + seed).backward(*own, self.loss_fn)
        else:
            self.loss_fn(self.model(own[0]), own[1]).mean().backward()
        self.gradients = gradients_of(self.model)

    def other(self) -> tuple[Tensor, Tensor]:
        """A batch without the images of the first one."""
        rows = torch.randint(self.batch, len(self.x), (self.batch,), generator=self.generator)
        return self.x[rows], self.y[rows]

    def errors(self, technique: dict[str, Any], copies: int, args: argparse.Namespace, seed: int) -> dict[str, float]:
        """The squared error of each layer."""
        estimator = ulr.ULR(self.model, args.sigma, copies, seed=seed, **technique)
        for _ in range(args.learn if technique.get("guide") else 0):
            estimator.backward(*self.other(), self.loss_fn)
        totals = dict.fromkeys(self.gradients, 0.0)
        for _ in range(args.steps):
            self.model.zero_grad()
            estimator.backward(self.x[: self.batch], self.y[: self.batch], self.loss_fn)
            found = gradients_of(self.model)
            for layer, gradient in self.gradients.items():
                error = (found[layer] - gradient).square().sum() / gradient.square().sum()
                totals[layer] += float(error) / args.steps
        return totals


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """`.grad` of each module as one vector."""
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(name.rpartition(".")[0], []).append(parameter.grad.flatten().clone())
    return {layer: torch.cat(parts) for layer, parts in layers.items()}


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of training steps, technique and number of copies: the median error over seeds."""
    rows = []
    for steps in args.trained:
        problems = [Problem(args, seed, steps) for seed in range(args.seeds)]
        for name in args.techniques:
            technique = TECHNIQUES[name]
            for copies in args.copies:
                each = [problem.errors(technique, copies, args, seed) for seed, problem in enumerate(problems)]
                layers = {layer: statistics.median(one[layer] for one in each) for layer in each[0]}
                rows.append({"trained": steps, "technique": name, "copies": copies, "errors": layers})
                print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    errors = "  ".join(f"{layer} {error:8.3g}" for layer, error in row["errors"].items())
    return f"{row['trained']:5d} steps  {row['technique']:16s} {row['copies']:4d} copies   {errors}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against copies, a panel for each layer and number of training steps."""
    from matplotlib import pyplot

    layers, trained = list(rows[0]["errors"]), sorted({row["trained"] for row in rows})
    layers = layers[:: -(-len(layers) // MOST_PANELS)]
    size = (3 * len(layers) + 1.5, 3 * len(trained))
    figure, panels = pyplot.subplots(
        len(trained), len(layers), figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    for down, steps in enumerate(trained):
        for across, layer in enumerate(layers):
            panel = panels[down][across]
            for name in dict.fromkeys(row["technique"] for row in rows):
                points = [row for row in rows if (row["trained"], row["technique"]) == (steps, name)]
                panel.loglog(
                    [p["copies"] for p in points], [max(p["errors"][layer], 1e-6) for p in points], ".-", label=name
                )
            panel.set_title(f"{layer}, {steps} steps")
            panel.set_xlabel("copies")
    panels[0][0].set_ylabel("squared error / squared gradient")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mlp", choices=list(models.MODELS))
    parser.add_argument("--data", default="mnist5k", help="as for `ulr train`")
    parser.add_argument("--images", type=int, default=2000, help="of the training set")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--copies", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--techniques", nargs="+", default=list(TECHNIQUES), choices=list(TECHNIQUES))
    parser.add_argument("--trained", type=int, nargs="+", default=[0, 100], help="steps of backpropagation before")
    parser.add_argument("--learn", type=int, default=60, help="steps in which a guide learns")
    parser.add_argument("--steps", type=int, default=8, help="estimates of a measurement")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("law"), help="without suffix: .json and .png are written")
    args = parser.parse_args()
    rows = measured(args)
    args.out.with_suffix(".json").write_text(json.dumps({"arguments": vars(args), "rows": rows}, default=str, indent=1))
    draw(rows, args.out.with_suffix(".png"))
    print(f"written: {args.out.with_suffix('.json')}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()

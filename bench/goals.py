"""The goals of `ulr bench`: how much faster or smaller than a rival the library is to be."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Goal:
    """The rival's time, or extra memory, is to be at least so many times the library's."""

    row: str
    rival: str
    at_least: float
    what: str = "time"


GOALS = (
    Goal("normal", "tensor.normal_", 7),
    Goal("normal-2-threads", "ulr, one thread", 1.9),
    Goal("rademacher", "tensor.bernoulli_", 60),
    Goal("linear-fp32", "noiseless F.linear", 1 / 0.50),
    Goal("linear-fp32", "noiseless oneDNN", 1 / 1.06),
    Goal("linear-bf16", "noiseless F.linear", 1 / 1.10),
    Goal("linear-fp32-1-thread", "noiseless F.linear", 1 / 0.50),
    Goal("linear-fp32-1-thread", "noiseless oneDNN", 1 / 1.06),
    Goal("linear-bf16-1-thread", "noiseless F.linear", 1 / 1.10),
    Goal("linear-copies", "eager, input repeated", 20),
    Goal("linear-copies", "eager, product repeated", 7),
    Goal("gradient", "authors' way", 25),
    Goal("gradient", "eager, reduced first", 1.5),
    Goal("gradient", "authors' way", 20, "memory"),
    Goal("gradient", "eager, reduced first", 20, "memory"),
    Goal("step", "authors' way", 12),
    *(
        Goal(f"perturbed-{dist}-{shape}", "noiseless oneDNN", share)
        for dist, share in (("normal", 0.75), ("rademacher", 0.85))
        for shape in ("384x384", "384x1536", "1536x384", "576x576", "576x1536", "1536x576")
    ),
    Goal("eggroll", "plain forward, F.linear", 0.45),
    Goal("eggroll", "torcheggroll", 5),
    Goal("eggroll", "eggroll-es", 5),
    Goal("population", "EvoX", 10),
    *(
        goal
        for model in ("minilm", "smollm2")
        for dist, share in (("gaussian", 0.75), ("signs", 0.85))
        for goal in (
            Goal(f"mezo-{model}-{dist}", "two plain forwards", share),
            Goal(f"mezo-{model}-{dist}", "MeZO as published", 2),
            Goal(f"mezo-{model}-{dist}", "two plain forwards", 1 / 1.03, "memory"),
        )
    ),
    Goal("perturb-normal", "mul_", 1 / 1.9),
    Goal("perturb-rademacher", "mul_", 1 / 1.2),
    Goal("combine-16", "noise of each probe, one pass", 1 / 1.15),
    Goal("gpu-step-small", "eager, product repeated", 10),
    Goal("gpu-step-small", "torch.compile, CUDA graph", 3),
)

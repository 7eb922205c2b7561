"""The Trainer of transformers with an optimiser that needs forward passes only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ulr_kernels.optim.optimizer import ForwardOptimizer


class ForwardTrainer(Trainer):
    """`transformers.Trainer` for the optimisers of `ulr_kernels.optim`: a training step probes, and nothing goes back.

        optimizer = ulr.optim.MeZO(model, lr=1e-6, eps=1e-3)
        ForwardTrainer(model, args, train_dataset=..., eval_dataset=..., optimizers=(optimizer, None)).train()

    Gradient accumulation, evaluation, learning rate schedules, callbacks, logs and checkpoints are the Trainer's own.
    Accumulated micro-batches count alike, whatever the number of their tokens. `max_grad_norm` has nothing to clip.

    Raises:
        ValueError: `optimizers` holds none of these optimisers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.optimizer, ForwardOptimizer):
            got = type(self.optimizer).__name__
            raise ValueError(f"ulr.finetune.ForwardTrainer: 'optimizers' must hold one of ulr.optim, got {got}")
        self.probing = self.optimizer  # while training, `optimizer` is what accelerate has put around it

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Evaluate the probes of the coming step on one micro-batch; its part of the step's loss, for the log."""

        def closure() -> Any:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, inputs)

        inputs = {
            name: value.to(self.args.device) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        with torch.no_grad():
            return self.probing.accumulate(closure) / self.args.gradient_accumulation_steps

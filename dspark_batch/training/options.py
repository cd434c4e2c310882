"""How to train, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dspark_batch.training.losses import LossWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How to train. One step sees `batch_size` sequences with up to `num_anchors` blocks each."""

    num_steps: int
    batch_size: int = 8
    num_anchors: int = 32
    learning_rate: float = 6e-4
    warmup_share: float = 0.04
    max_grad_norm: float = 1.0
    loss: LossWeights = field(default_factory=LossWeights)
    bf16: bool = False
    """Autocast matrix products to bf16; weights and optimiser stay fp32."""
    compile: bool = False
    """Compile the backbone and the loss: a quarter less CPU per step, minutes at the start."""
    ema_decay: float | None = None
    """Evaluate and export a moving average of the weights."""
    seed: int = 42
    log_every: int = 20
    """Steps between training lines in the log."""
    checkpoint_seconds: float = 180.0
    evaluate_seconds: float = 300.0


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then cosine to zero at `num_steps`."""
    warmup = max(1, round(options.warmup_share * options.num_steps))
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, options.num_steps - warmup))
    return options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))

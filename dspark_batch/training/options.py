"""How to train, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dspark_batch.training.losses import LossWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How to train. One step sees `batch_size` sequences with up to `num_anchors` blocks each.

    Exactly one of `num_steps` and `seconds` says how long; ValueError otherwise. By the clock a
    run ends when the machine has had its time, however loaded it was; only by steps does a
    resumed run end with the weights of one that was never stopped.
    """

    num_steps: int | None = None
    seconds: float | None = None
    """Wall clock of the steps themselves: capturing features and evaluating come on top."""
    batch_size: int = 8
    num_anchors: int = 32
    lookup_weight: float = 1.0
    """How likely an anchor is drawn where prompt lookup would propose, against others."""
    num_passes: int = 1
    """Times that a chunk of captured sequences is trained on before the next is captured."""
    learning_rate: float = 6e-4
    warmup_share: float = 0.04
    max_grad_norm: float = 1.0
    loss: LossWeights = field(default_factory=LossWeights)
    bf16: bool = False
    """Autocast matrix products to bf16; weights and optimiser stay fp32."""
    compile: bool = False
    """Compile the backbone: less CPU per step, minutes at the start."""
    ema_decay: float | None = None
    """Evaluate and export a moving average of the weights."""
    seed: int = 42
    log_every: int = 20
    """Steps between training lines in the log."""
    checkpoint_seconds: float = 180.0
    evaluate_seconds: float = 300.0

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.seconds is None):
            raise ValueError("give num_steps or seconds, not both")


def learning_rate_at(progress: float, options: TrainingOptions) -> float:
    """Linear warm-up, then cosine to zero; `progress` is the share of the run done, in [0, 1]."""
    warmup = options.warmup_share
    if progress < warmup:
        return options.learning_rate * progress / warmup
    done = min(1.0, (progress - warmup) / (1.0 - warmup))
    return options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))

"""Public figures of GPUs, and shapes of models: what a roofline can be asked for by name.

GPU figures are NVIDIA's, dense (without 2:4 sparsity). The datasheets' numbers were checked in
copies of them on other people's pages; NVIDIA's own pages were not read. No GPU was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Of a weight."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU's public figures."""

    title: str
    memory_gb: float
    bandwidth_gbs: float
    tflops: Mapping[str, float]
    """Dense, of the tensor cores with fp32 (int32) accumulation, by dtype."""
    source: str


GPUS = {
    "t4": Gpu(
        "NVIDIA T4",
        16,
        300,
        {"fp16": 65, "int8": 130},
        "NVIDIA T4 datasheet; other pages give 320 GB/s",
    ),
    "a10": Gpu(
        "NVIDIA A10",
        24,
        600,
        {"bf16": 125, "fp16": 125, "int8": 250},
        "NVIDIA A10 datasheet",
    ),
    "l4": Gpu(
        "NVIDIA L4",
        24,
        300,
        {"bf16": 121, "fp16": 121, "fp8": 242.5, "int8": 242.5},
        "NVIDIA L4 datasheet, halved: it counts sparsity",
    ),
    "l40s": Gpu(
        "NVIDIA L40S",
        48,
        864,
        {"bf16": 362, "fp16": 362, "fp8": 733, "int8": 733},
        "NVIDIA L40S datasheet",
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090",
        24,
        1008,
        {"bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "int8": 660.6},
        "NVIDIA Ada GPU architecture whitepaper",
    ),
    "a100": Gpu(
        "NVIDIA A100 80 GB SXM",
        80,
        2039,
        {"bf16": 312, "fp16": 312, "int8": 624},
        "NVIDIA A100 datasheet",
    ),
    "h100": Gpu(
        "NVIDIA H100 SXM",
        80,
        3350,
        {"bf16": 989.5, "fp16": 989.5, "fp8": 1979, "int8": 1979},
        "NVIDIA H100 datasheet, halved: it counts sparsity",
    ),
    "h200": Gpu(
        "NVIDIA H200 SXM",
        141,
        4800,
        {"bf16": 989.5, "fp16": 989.5, "fp8": 1979, "int8": 1979},
        "NVIDIA H200 datasheet, halved: it counts sparsity",
    ),
    "b200": Gpu(
        "NVIDIA B200",
        180,
        8000,
        {"bf16": 2250, "fp16": 2250, "fp8": 4500},
        "NVIDIA HGX B200 figures as others quote them: not checked against a datasheet",
    ),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The shape of a target and its DSpark draft; norms and biases are left out."""

    title: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_head: bool
    num_draft_layers: int = 5
    num_taps: int = 5
    markov_rank: int = 256
    draft_vocab_size: int | None = None
    """None: the target's."""

    @property
    def layer_params(self) -> int:
        """Weights of one layer, of the target as of the draft."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (queries + keys)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_params(self) -> int:
        """Weights of the target's output head."""
        return self.vocab_size * self.hidden_size

    @property
    def target_params(self) -> int:
        """All of the target's weights."""
        tables = self.head_params * (1 if self.tied_head else 2)
        return self.num_layers * self.layer_params + tables

    @property
    def draft_params(self) -> int:
        """The draft's own weights; embedding and head are the target's."""
        size = self.draft_vocab_size or self.vocab_size
        markov = self.markov_rank * (self.vocab_size + size)
        context = self.num_taps * self.hidden_size**2
        return self.num_draft_layers * self.layer_params + context + markov

    @property
    def draft_head_params(self) -> int:
        """Weights of the head's rows that the draft uses."""
        return (self.draft_vocab_size or self.vocab_size) * self.hidden_size

    @property
    def markov_step_params(self) -> int:
        """Weights that a step of the Markov head reads."""
        return (self.draft_vocab_size or self.vocab_size) * self.markov_rank


PAIRS = {
    "smollm2-135m": Pair(
        "SmolLM2-135M with the default recipe's draft",
        576,
        1536,
        30,
        9,
        3,
        64,
        49152,
        True,
        num_draft_layers=3,
        markov_rank=96,
        draft_vocab_size=8192,
    ),
    "qwen3-4b": Pair("Qwen3-4B with DeepSpec's draft", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": Pair("Qwen3-8B with DeepSpec's draft", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b": Pair(
        "Qwen3-14B with DeepSpec's draft", 5120, 17408, 40, 40, 8, 128, 151936, False
    ),
}

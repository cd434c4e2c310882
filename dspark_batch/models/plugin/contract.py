"""The contract of the verification op `dspark::DSparkVerify`: the one place that describes it.

The op ends a target's graph. Given the target's logits and the tokens that were drafted, it says
how many drafts of each row are accepted and which token the target adds after them. Everything that
feeds, holds, implements or launches the op reads names, order, types and shapes from here: the
NumPy specification, the ONNX, Triton and TensorRT bodies, the graphs, the runtimes and the tests.

Arrays are contiguous. Cells beyond a row's length are padding: they may hold anything, as long as
an index stays within what it points into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DOMAIN = "dspark"
OP_TYPE = "DSparkVerify"
PLUGIN_VERSION = "1"

ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": PLUGIN_VERSION}
"""Of the ONNX node: how TensorRT's parser finds the plugin that takes the place of the function."""

DIMENSIONS = {
    "R": "rows",
    "N": "tokens of this pass whose logits were computed",
    "V": "vocabulary of the target",
    "K": "drafts that are verified, of the row that has most; may be 0",
    "K1": "K + 1: the anchor, then the drafts",
    "G": "γ, the drafts of a block; at least K",
    "G1": "γ + 1: one for each draft, then one for the bonus token",
    "D": "vocabulary of the draft",
}


@dataclass(frozen=True, slots=True)
class Operand:
    """An input or output of the op."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[str, ...]
    """Names in `DIMENSIONS`."""
    meaning: str


INPUTS = (
    Operand("logits", "float32", ("N", "V"), "the target's"),
    Operand("logit_rows", "int64", ("R", "K1"), "where in `logits` the anchor and each draft are"),
    Operand("draft_tokens", "int64", ("R", "K"), "in the target's vocabulary"),
    Operand("lengths", "int64", ("R",), "ℓ <= K: how many drafts of the row to verify"),
    Operand("certain", "int64", ("R",), "1: the drafts were proposed with probability 1"),
    Operand("draft_logits", "float32", ("R", "G", "D"), "what they were sampled from, if not so"),
    Operand("draft_vocab", "int64", ("D",), "draft id -> target id, strictly ascending"),
    Operand("temperature", "float32", ("R",), "0 is greedy"),
    Operand("top_k", "int64", ("R",), "filter of the target's distribution; 0 keeps everything"),
    Operand("top_p", "float32", ("R",), "filter of the target's distribution; 1 keeps everything"),
    Operand("uniforms", "float32", ("R", "G1"), "in [0, 1): one decides on each draft"),
)
OUTPUTS = (
    Operand("num_accepted", "int64", ("R",), "accepted drafts, 0 to ℓ"),
    Operand("bonus", "int64", ("R",), "the target's next token; -1 if a logit is not finite"),
)
INPUT_NAMES = tuple(operand.name for operand in INPUTS)
OUTPUT_NAMES = tuple(operand.name for operand in OUTPUTS)
OPERANDS = {operand.name: operand for operand in (*INPUTS, *OUTPUTS)}

SAMPLING = ("temperature", "top_k", "top_p", "uniforms")
"""How a row samples. The draft's graph takes the same, with γ uniforms."""

FED = tuple(name for name in INPUT_NAMES if name not in ("logits", "draft_vocab"))
"""Inputs of the target's graph: it computes the logits and stores the vocabulary."""

MIN_RESIDUAL_MASS = 1e-8
"""A residual of less is rounding noise: target and draft have the same distribution."""

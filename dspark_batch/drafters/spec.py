"""What a draft is, as data; `layouts` reads it from the `config.json` of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dspark_batch.models import RopeSpec

CERTAIN = 30.0  # a confidence logit whose sigmoid is 1: the slot of a draft without the head


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """A draft's shape; the flags are the differences between layouts."""

    block_size: int
    """Tokens that it drafts in a round."""
    vocab_size: int
    """The target's; the draft's own may be smaller."""
    mask_token_id: int
    taps: tuple[int, ...]
    """Target layers whose outputs it reads, -1 the embedding: DeepSpec's counting."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    markov_rank: int
    markov_head: str | None
    confidence_head: bool
    confidence_with_markov: bool
    rope: RopeSpec
    anchor_drafts: bool = True
    """Slot k predicts the token after its position; else the one at it, and slot 0, the anchor,
    predicts nothing (DFlash)."""
    qk_norm: bool = True
    """RMSNorm over each head's query and key before RoPE."""
    activation: str = "silu"
    sandwich_norms: bool = False
    """Norms after attention and after the MLP too (Gemma)."""
    keys_as_values: bool = False
    """No value projection: values are the raw key projection (Gemma 4)."""
    v_norm: bool = False
    """RMSNorm without a weight over each head's value (Gemma 4)."""
    layer_scalar: bool = False
    """A stored factor on each layer's output (Gemma 4)."""
    attention_scale: float | None = None
    """None: head_dim ** -0.5."""
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    """Soft cap of the base logits, before the Markov head's bias."""

    @property
    def num_slots(self) -> int:
        """Positions of the block that go through the backbone."""
        return self.block_size + (not self.anchor_drafts)

    def tensor_names(self) -> Iterator[str]:
        """Every tensor of the network but its embedding and output head."""
        yield from ("fc.weight", "hidden_norm.weight", "norm.weight")
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.sandwich_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        attention = ["q_proj", "k_proj", "o_proj"]
        attention += [] if self.keys_as_values else ["v_proj"]
        attention += ["q_norm", "k_norm"] if self.qk_norm else []
        for i in range(self.num_layers):
            yield from (f"layers.{i}.{name}.weight" for name in norms)
            yield from (f"layers.{i}.self_attn.{name}.weight" for name in attention)
            yield from (f"layers.{i}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
            if self.layer_scalar:
                yield f"layers.{i}.layer_scalar"
        if self.markov_head is not None:
            yield from ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
            joint = {"gated": "gate_proj", "rnn": "joint_proj"}.get(self.markov_head)
            if joint:
                yield from (f"markov_head.{joint}.{leaf}" for leaf in ("weight", "bias"))
        if self.confidence_head:
            yield from (f"confidence_head.proj.{leaf}" for leaf in ("weight", "bias"))

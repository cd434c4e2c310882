"""The DSpark draft in torch: a Qwen3-style block backbone, a Markov head, a confidence head.

Two forwards, equal in exact arithmetic: `forward_packed` scores many anchors of a sequence at once
(training), `forward_block` extends one sequence's cache by its new positions and drafts one block
(decoding, the slow twin). Symbols: b sequences, S positions, A anchors, γ block size, d hidden
size, m tapped layers, V' draft vocabulary, r Markov rank. Slot k sits at position anchor + k and
predicts the token at anchor + k + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark_batch.errors import EngineError
from dspark_batch.training.draft_config import DraftConfig


class RMSNorm(nn.Module):
    """Normalise the last axis in fp32, cast back, scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` to the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def rope_frequencies(config: DraftConfig) -> Tensor:
    """Inverse frequencies `[head_dim / 2]` in fp32; `rope_type` default, linear or llama3."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies: Tensor = 1.0 / (float(rope["rope_theta"]) ** exponents)
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / float(rope["factor"])
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies * (kept + (1 - kept) / float(rope["factor"]))
    raise EngineError(f"draft config: rope_type {kind!r} is not supported in training")


class Rotation(NamedTuple):
    """Cosines and sines `[..., 1, head_dim]` of a set of positions (the 1 spans the heads)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate `[..., heads, head_dim]` by halves (NeoX order)."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * self.cos.to(x.dtype) + turned * self.sin.to(x.dtype)


class PackedShape(NamedTuple):
    """Sizes of a packed forward and its context mask: `visible [b, A, S]` is position < anchor."""

    num_anchors: int
    block_size: int
    visible: Tensor


class Attention(nn.Module):
    """Block rows attend to the context rows before their anchor and to their whole block."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = size
        self.q_proj = nn.Linear(hidden, self.num_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.num_heads * size, hidden, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """`[..., d]` to rotated queries `[..., heads, head_dim]`."""
        return rotation(self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))))

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """`[..., d]` to rotated keys and values, each `[..., kv_heads, head_dim]`."""
        heads = (self.num_kv_heads, self.head_dim)
        keys = rotation(self.k_norm(self.k_proj(x).unflatten(-1, heads)))
        return keys, self.v_proj(x).unflatten(-1, heads)

    def forward_packed(
        self,
        x: Tensor,  # [b, A, γ, d]
        context: Tensor,  # [b, S, d]
        *,
        shape: PackedShape,
        block_rotation: Rotation,
        context_rotation: Rotation,
    ) -> Tensor:
        """All blocks of the batch at once; `[b, A, γ, d]`."""
        b, num_anchors, block, _ = x.shape
        groups = self.num_heads // self.num_kv_heads
        ctx_keys, ctx_values = self.keys_values(context, context_rotation)
        keys, values = self.keys_values(x, block_rotation)
        queries = self.queries(x, block_rotation) * self.head_dim**-0.5
        # Rows ordered anchor, group, slot: one matrix product against the context for all blocks,
        # one small one per block against itself.
        queries = queries.unflatten(-2, (self.num_kv_heads, groups)).permute(0, 3, 1, 4, 2, 5)
        queries = queries.reshape(b, self.num_kv_heads, num_anchors, groups * block, self.head_dim)
        ctx_keys, ctx_values = ctx_keys.transpose(1, 2), ctx_values.transpose(1, 2)
        keys, values = keys.permute(0, 3, 1, 2, 4), values.permute(0, 3, 1, 2, 4)

        to_context = (queries.flatten(2, 3) @ ctx_keys.mT).unflatten(2, (num_anchors, -1))
        to_context = to_context.masked_fill(~shape.visible[:, None, :, None, :], float("-inf"))
        to_block = queries @ keys.mT
        scores = torch.cat([to_context, to_block], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        ctx_weights, block_weights = torch.split(weights, [context.shape[1], block], dim=-1)
        from_context = ctx_weights.flatten(2, 3) @ ctx_values
        mixed = from_context.reshape(queries.shape) + block_weights @ values
        mixed = mixed.reshape(b, self.num_kv_heads, num_anchors, groups, block, self.head_dim)
        mixed = mixed.permute(0, 2, 4, 1, 3, 5).reshape(b, num_anchors, block, -1)
        out: Tensor = self.o_proj(mixed)
        return out

    def forward_block(self, x: Tensor, keys: Tensor, values: Tensor, rotation: Rotation) -> Tensor:
        """One block `[1, γ, d]` on cached context keys and values `[1, n, kv_heads, head_dim]`."""
        own_keys, own_values = self.keys_values(x, rotation)
        groups = self.num_heads // self.num_kv_heads
        keys = torch.cat([keys, own_keys], dim=1).repeat_interleave(groups, dim=2)
        values = torch.cat([values, own_values], dim=1).repeat_interleave(groups, dim=2)
        mixed = functional.scaled_dot_product_attention(
            self.queries(x, rotation).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """Pre-norm attention and MLP; the context rows pass no layer norm, they come normalised."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """The residual MLP half of the layer."""
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class MarkovHead(nn.Module):
    """A low-rank bias on slot k's logits from the token chosen in slot k - 1.

    `markov_w1` is indexed by target ids, `markov_w2` outputs draft ids.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, config.hidden_size
        self.rank, self.kind = rank, config.markov_head_type
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.num_draft_ids, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def embed(self, previous: Tensor) -> Tensor:
        """Target ids `[...]` to `[..., r]`."""
        out: Tensor = self.markov_w1(previous)
        return out

    def initial_state(self, hidden: Tensor) -> Tensor:
        """The RNN state before slot 0: zeros `[..., r]` for hidden rows `[..., γ, d]`."""
        return hidden.new_zeros(*hidden.shape[:-2], self.rank)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Bias `[..., V']` of one slot and the next state; `embedded [..., r]`, `hidden [..., d]`.

        Only the RNN kind has a state; the others pass it through.
        """
        if self.kind == "rnn":
            joint = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1))
            gate, candidate, output = joint.chunk(3, dim=-1)
            keep = torch.sigmoid(gate)
            state = keep * state + (1 - keep) * torch.tanh(candidate)
            return self.markov_w2(torch.tanh(output)), state
        return self.markov_w2(self.gated(embedded, hidden)), state

    def gated(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What a stateless kind feeds to `markov_w2`, for any leading axes."""
        if self.kind == "gated":
            gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1)))
            return gate * embedded
        return embedded

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Biases `[..., γ, V']` of whole blocks, `embedded [..., γ, r]`, `hidden [..., γ, d]`."""
        if self.kind != "rnn":
            stateless: Tensor = self.markov_w2(self.gated(embedded, hidden))
            return stateless
        state, rows = self.initial_state(hidden), []
        for slot in range(hidden.shape[-2]):
            bias, state = self.step(embedded[..., slot, :], hidden[..., slot, :], state)
            rows.append(bias)
        return torch.stack(rows, dim=-2)


class ConfidenceHead(nn.Module):
    """One linear to the logit of c_k, known before token k is drawn."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        extra = config.markov_rank if config.uses_markov_confidence else 0
        self.proj = nn.Linear(config.hidden_size + extra, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., d (+ r)]` to fp32 logits `[...]`."""
        out: Tensor = self.proj(rows).squeeze(-1).float()
        return out


@dataclass(frozen=True, slots=True)
class DraftScores:
    """What the draft says about blocks; leading axes as those of the call."""

    hidden: Tensor
    """[..., γ, d]"""
    base_logits: Tensor
    """[..., γ, V'] before the Markov bias."""
    logits: Tensor
    """[..., γ, V']"""
    confidence_logits: Tensor | None
    """[..., γ] fp32; None without a confidence head."""
    tokens: Tensor | None = None
    """[..., γ] target ids, where the block was drafted rather than scored."""


class DraftCache:
    """Keys and values per layer of the context positions `0 .. length - 1`, nothing else."""

    def __init__(self) -> None:
        self.length = 0
        self.layers: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows `[1, n, kv_heads, head_dim]` to a layer; returns all of that layer."""
        if layer == len(self.layers):
            self.layers.append((keys, values))
        else:
            old_keys, old_values = self.layers[layer]
            self.layers[layer] = (
                torch.cat([old_keys, keys], dim=1),
                torch.cat([old_values, values], dim=1),
            )
        return self.layers[layer]


class DSparkDraft(nn.Module):
    """The draft network. Embedding and head rows are the target's, frozen and never saved.

    `draft_vocab [V']` maps draft ids to target ids (None: the identity); `lm_head [V', d]` holds
    the target's head rows of those ids. Parameter names are the published tensor names.
    """

    embed_weight: Tensor
    head_weight: Tensor
    draft_vocab: Tensor
    draft_ids: Tensor
    inverse_frequencies: Tensor

    def __init__(
        self,
        config: DraftConfig,
        *,
        embed_tokens: Tensor,
        lm_head: Tensor,
        draft_vocab: Tensor | None = None,
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        embed_shape, head_shape = (config.vocab_size, size), (config.num_draft_ids, size)
        if tuple(embed_tokens.shape) != embed_shape or tuple(lm_head.shape) != head_shape:
            raise EngineError(
                f"the target's embedding {tuple(embed_tokens.shape)} and head rows "
                f"{tuple(lm_head.shape)} do not fit the draft config"
            )
        self.config = config
        self.fc = nn.Linear(config.feature_size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, eps)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        if draft_vocab is None:
            draft_vocab = torch.arange(config.vocab_size)
        draft_ids = torch.full((config.vocab_size,), -1)
        draft_ids[draft_vocab] = torch.arange(config.num_draft_ids)
        for name, tensor in (
            ("embed_weight", embed_tokens.detach()),
            ("head_weight", lm_head.detach()),
            ("draft_vocab", draft_vocab),
            ("draft_ids", draft_ids),
            ("inverse_frequencies", rope_frequencies(config)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def rotation(self, positions: Tensor) -> Rotation:
        """Rotation of positions `[...]`; angles in fp32 whatever the model's dtype."""
        angles = positions[..., None].float() * self.inverse_frequencies.float()
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
        return Rotation(angles.cos(), angles.sin())

    def context(self, features: Tensor) -> Tensor:
        """Target features `[..., m·d]` to the rows `[..., d]` that every layer attends to."""
        out: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return out

    def block_inputs(self, anchor_tokens: Tensor) -> Tensor:
        """Embeddings `[..., γ, d]` of anchor tokens `[...]` followed by γ - 1 masks."""
        num_masks, mask = self.config.block_size - 1, self.config.mask_token_id
        masks = anchor_tokens.new_full((*anchor_tokens.shape, num_masks), mask)
        block = torch.cat([anchor_tokens.unsqueeze(-1), masks], dim=-1)
        return functional.embedding(block, self.embed_weight)

    def hidden_packed(self, features: Tensor, anchor_tokens: Tensor, anchors: Tensor) -> Tensor:
        """Block hidden rows `[b, A, γ, d]` of anchors at positions `[b, A]` in one forward.

        `features [b, S, m·d]`: rows at and after an anchor are masked out for its block, so right
        padding is harmless.
        """
        device, block = features.device, self.config.block_size
        positions = torch.arange(features.shape[1], device=device)
        shape = PackedShape(anchors.shape[1], block, positions < anchors[..., None])
        context_rotation = self.rotation(positions[None])
        block_rotation = self.rotation(anchors[..., None] + torch.arange(block, device=device))
        context, hidden = self.context(features), self.block_inputs(anchor_tokens)
        for layer in self.layers:
            assert isinstance(layer, DraftLayer)
            hidden = hidden + layer.self_attn.forward_packed(
                layer.input_layernorm(hidden),
                context,
                shape=shape,
                block_rotation=block_rotation,
                context_rotation=context_rotation,
            )
            hidden = layer.feed_forward(hidden)
        out: Tensor = self.norm(hidden)
        return out

    def forward_packed(
        self,
        features: Tensor,  # [b, S, m·d]
        *,
        anchors: Tensor,  # [b, A] positions
        previous: Tensor,  # [b, A, γ] target ids: the anchor, then teacher tokens
    ) -> DraftScores:
        """Score blocks with known previous tokens (teacher forcing)."""
        hidden = self.hidden_packed(features, previous[..., 0], anchors)
        return self.score(hidden, previous)

    def score(self, hidden: Tensor, previous: Tensor) -> DraftScores:
        """Heads over block hidden rows `[..., γ, d]` for known previous tokens `[..., γ]`."""
        base = functional.linear(hidden, self.head_weight)
        if self.markov_head is None:
            return DraftScores(hidden, base, base, self.confidence(hidden, None))
        embedded = self.markov_head.embed(previous)
        logits = base + self.markov_head(embedded, hidden)
        return DraftScores(hidden, base, logits, self.confidence(hidden, embedded))

    def confidence(self, hidden: Tensor, embedded: Tensor | None) -> Tensor | None:
        """Logits of c_k for rows `[..., d]` and Markov embeddings `[..., r]`."""
        if self.confidence_head is None:
            return None
        rows = hidden
        if self.config.uses_markov_confidence:
            assert embedded is not None
            rows = torch.cat([hidden, embedded.to(hidden.dtype)], dim=-1)
        out: Tensor = self.confidence_head(rows)
        return out

    def draft_greedy(self, hidden: Tensor, anchor_tokens: Tensor) -> DraftScores:
        """Walk the Markov head over rows `[..., γ, d]`, taking the argmax in every slot."""
        base = functional.linear(hidden, self.head_weight)
        head = self.markov_head
        state = None if head is None else head.initial_state(hidden)
        previous, tokens, rows, confidences = anchor_tokens, [], [], []
        for slot in range(self.config.block_size):
            row, embedded = base[..., slot, :], None
            if head is not None and state is not None:
                embedded = head.embed(previous)
                bias, state = head.step(embedded, hidden[..., slot, :], state)
                row = row + bias
            confidences.append(self.confidence(hidden[..., slot, :], embedded))
            previous = self.draft_vocab[row.argmax(dim=-1)]
            tokens.append(previous)
            rows.append(row)
        known = [c for c in confidences if c is not None]
        return DraftScores(
            hidden,
            base,
            torch.stack(rows, dim=-2),
            torch.stack(known, dim=-1) if known else None,
            torch.stack(tokens, dim=-1),
        )

    def forward_block(
        self, anchor_token: Tensor, features: Tensor, cache: DraftCache
    ) -> DraftScores:
        """Draft one block greedily: `anchor_token [1]`, `features [1, n, m·d]` of the n positions
        that are committed but not yet in the cache; the cache grows by them.
        """
        device, block = features.device, self.config.block_size
        end = cache.length + features.shape[1]
        context_rotation = self.rotation(torch.arange(cache.length, end, device=device)[None])
        block_rotation = self.rotation(torch.arange(end, end + block, device=device)[None])
        context, hidden = self.context(features), self.block_inputs(anchor_token)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DraftLayer)
            new_keys, new_values = layer.self_attn.keys_values(context, context_rotation)
            keys, values = cache.append(index, new_keys, new_values)
            hidden = hidden + layer.self_attn.forward_block(
                layer.input_layernorm(hidden), keys, values, block_rotation
            )
            hidden = layer.feed_forward(hidden)
        cache.length = end
        return self.draft_greedy(self.norm(hidden), anchor_token)

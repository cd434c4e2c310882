"""The DSpark draft in torch: a Qwen3-style block backbone, a Markov head, a confidence head.

Two forwards, equal in exact arithmetic: `forward_packed` scores many anchors of a sequence at once
(training), `forward_block` extends one sequence's cache by its new positions and drafts one block
(decoding, the reference). Symbols: b sequences, S positions, A anchors, γ block size, d hidden
size, m tapped layers, V' draft vocabulary, r Markov rank. Slot k sits at position anchor + k and
predicts the token at anchor + k + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark_batch.drafters import DraftConfig
from dspark_batch.errors import EngineError
from dspark_batch.training.backbone import (
    DraftLayer,
    RMSNorm,
    Rotation,
    rope_of,
)
from dspark_batch.training.heads import ConfidenceHead, MarkovHead


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
    the target's head rows of those ids. Parameter names are the published tensor names. `dropout`
    acts on the context rows and on what each half layer adds, in training mode of a packed forward.
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
        dropout: float = 0.0,
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
        self.dropout = nn.Dropout(dropout)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        if draft_vocab is None:
            draft_vocab = torch.arange(config.vocab_size)
        rope = rope_of(config)
        self.rope_factor = rope.attention_factor
        draft_ids = torch.full((config.vocab_size,), -1)
        draft_ids[draft_vocab] = torch.arange(config.num_draft_ids)
        for name, tensor in (
            ("embed_weight", embed_tokens.detach()),
            ("head_weight", lm_head.detach()),
            ("draft_vocab", draft_vocab),
            ("draft_ids", draft_ids),
            ("inverse_frequencies", torch.tensor(rope.inverse_frequencies)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def rotation(self, positions: Tensor) -> Rotation:
        """Rotation of positions `[...]`; angles in fp32 whatever the model's dtype."""
        angles = positions[..., None].float() * self.inverse_frequencies.float()
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
        return Rotation(angles.cos() * self.rope_factor, angles.sin() * self.rope_factor)

    def context(self, features: Tensor) -> Tensor:
        """Target features `[..., m·d]` to the rows `[..., d]` that every layer attends to."""
        out: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return out

    def block_inputs(self, anchor_tokens: Tensor) -> Tensor:
        """Embeddings `[..., γ, d]` of anchor tokens `[...]` followed by γ - 1 masks."""
        num_masks, mask = self.config.block_size - 1, self.config.mask_token_id
        masks = anchor_tokens.new_full((*anchor_tokens.shape, num_masks), mask)
        block = torch.cat([anchor_tokens.unsqueeze(-1), masks], dim=-1)
        return functional.embedding(block, self.embed_weight) * self.config.embedding_scale

    def hidden_packed(self, features: Tensor, anchor_tokens: Tensor, anchors: Tensor) -> Tensor:
        """Block hidden rows `[b, A, γ, d]` of anchors at positions `[b, A]` in one forward.

        `features [b, S, m·d]`: rows at and after an anchor are masked out for its block, so right
        padding is harmless.
        """
        device, block = features.device, self.config.block_size
        positions = torch.arange(features.shape[1], device=device)
        context_rotation = self.rotation(positions[None])
        block_rotation = self.rotation(anchors[..., None] + torch.arange(block, device=device))
        visible = positions < anchors[..., None]
        context, hidden = self.dropout(self.context(features)), self.block_inputs(anchor_tokens)
        for layer in self.layers:
            assert isinstance(layer, DraftLayer)
            mixed = layer.self_attn.forward_packed(
                layer.input_layernorm(hidden),
                context,
                visible=visible,
                block_rotation=block_rotation,
                context_rotation=context_rotation,
            )
            hidden = hidden + self.dropout(mixed)
            hidden = hidden + self.dropout(layer.feed_forward(hidden))
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
            hidden = hidden + layer.feed_forward(hidden)
        cache.length = end
        return self.draft_greedy(self.norm(hidden), anchor_token)

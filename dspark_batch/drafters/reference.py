"""A reference of the draft in NumPy: whole rows, no cache, fp32.

It shares nothing with the graph but the spec and the weights. The export compares the two; tests
compare the graph with DeepSpec's network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.spec import CERTAIN, DraftSpec
from dspark_batch.models import activate, cap, plain_norm, product, rotate, softmax
from dspark_batch.models.weights import ReadTensor

Array = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Greedy blocks of one row, after every γ tokens of it: block b has the anchor (b + 1) γ."""

    tokens: Ints
    """[B, γ] in the target's vocabulary."""
    logits: Array
    """[B, γ, D] corrected by the Markov head."""
    confidence: Array
    """[B, γ] logits."""


class ReferenceDraft:
    """One draft. Embedding and head are read once, other weights when they are used."""

    def __init__(
        self,
        spec: DraftSpec,
        tensor: ReadTensor,
        *,
        embed: NDArray[Any],
        head: NDArray[Any],
        vocab: Ints,
    ) -> None:
        """`embed` [V, hidden], `head` [D, hidden], `vocab` [D] from draft id to target id."""
        self.spec, self._tensor = spec, tensor
        self._embed, self._head, self._vocab = embed, head, vocab

    def blocks(self, rows: Sequence[Sequence[int]], contexts: Sequence[Array]) -> list[Blocks]:
        """Blocks of each row; `contexts` [n, taps * hidden] are of its n tokens.

        A row of γ tokens or fewer has none.
        """
        gamma = self.spec.block_size
        ends = [np.arange(gamma, len(row), gamma) for row in rows]
        anchors = [np.asarray(row, np.int64)[e] for row, e in zip(rows, ends, strict=True)]
        hidden = self._hidden(contexts, np.concatenate(anchors), ends)
        tokens, logits, confidence = self._walk(hidden, np.concatenate(anchors))
        parts = (_split(found, ends) for found in (tokens, logits, confidence))
        return [Blocks(*found) for found in zip(*parts, strict=True)]

    def _hidden(self, contexts: Sequence[Array], anchors: Ints, ends: Sequence[Ints]) -> Array:
        """Normed states of the slots that draft, of all blocks of all rows: `[B, γ, hidden]`."""
        spec = self.spec
        taken = self._norm("hidden_norm", self._apply("fc", np.concatenate(contexts)))
        ids = np.full((len(anchors), spec.num_slots), spec.mask_token_id)
        ids[:, 0] = anchors
        x = np.asarray(self._embed[ids], np.float32) * np.float32(spec.embedding_scale)
        for i in range(spec.num_layers):
            name = f"layers.{i}"
            y = self._norm(f"{name}.input_layernorm", x)
            y = self._attention(f"{name}.self_attn", y, _split(taken, contexts), ends)
            if spec.sandwich_norms:
                y = self._norm(f"{name}.post_attention_layernorm", y)
            x = x + y
            before = "pre_feedforward" if spec.sandwich_norms else "post_attention"
            y = self._mlp(name, self._norm(f"{name}.{before}_layernorm", x))
            if spec.sandwich_norms:
                y = self._norm(f"{name}.post_feedforward_layernorm", y)
            x = x + y
            if spec.layer_scalar:
                x = x * np.asarray(self._tensor(f"{name}.layer_scalar"), np.float32)
        return self._norm("norm", x)[:, spec.num_slots - spec.block_size :]

    def _attention(
        self, name: str, x: Array, contexts: Sequence[Array], ends: Sequence[Ints]
    ) -> Array:
        """`[B, slots, hidden]`: a slot sees its row's context before the block, and the block."""
        spec = self.spec
        slots = np.arange(spec.num_slots)
        places = np.concatenate([e[:, None] + slots for e in ends])
        q = self._head_norm(f"{name}.q_norm", self._heads(f"{name}.q_proj", x))
        q = rotate(spec.rope, q, places)
        own = self._keys_values(name, x, places)
        positions = np.concatenate([np.arange(len(context)) for context in contexts])
        old = self._keys_values(name, np.concatenate(contexts), positions)
        rows = zip(
            _split(q, ends),
            *(_split(part, ends) for part in own),
            *(_split(part, contexts) for part in old),
            ends,
            strict=True,
        )
        mixed = np.concatenate([self._mix(*row) for row in rows])
        return self._apply(f"{name}.o_proj", mixed.reshape(*x.shape[:2], -1))

    def _mix(
        self, q: Array, own_keys: Array, own_values: Array, keys: Array, values: Array, ends: Ints
    ) -> Array:
        """One row's `[B, slots, heads, d]`, head by head."""
        spec, num_old = self.spec, len(keys)
        seen = np.arange(num_old) < ends[:, None, None]
        scale = np.float32(spec.attention_scale or spec.head_dim**-0.5)
        mixed = np.empty_like(q)
        for h in range(spec.num_heads):
            g = h // (spec.num_heads // spec.num_kv_heads)
            old = np.where(seen, q[:, :, h] @ keys[:, g].T, -np.inf)
            new = q[:, :, h] @ own_keys[:, :, g].transpose(0, 2, 1)
            probs = softmax(np.concatenate([old, new], axis=2) * scale)
            mixed[:, :, h] = probs[..., :num_old] @ values[:, g]
            mixed[:, :, h] += probs[..., num_old:] @ own_values[:, :, g]
        return mixed

    def _keys_values(self, name: str, x: Array, places: Ints) -> tuple[Array, Array]:
        spec = self.spec
        k = self._heads(f"{name}.k_proj", x)
        v = k if spec.keys_as_values else self._heads(f"{name}.v_proj", x)
        if spec.v_norm:
            v = plain_norm(v, spec.epsilon)
        return rotate(spec.rope, self._head_norm(f"{name}.k_norm", k), places), v

    def _heads(self, name: str, x: Array) -> Array:
        """`[.., heads, d]`."""
        y = self._apply(name, x)
        return y.reshape(*y.shape[:-1], -1, self.spec.head_dim)

    def _head_norm(self, name: str, x: Array) -> Array:
        return self._norm(name, x) if self.spec.qk_norm else x

    def _mlp(self, name: str, x: Array) -> Array:
        gate, up = (self._apply(f"{name}.mlp.{part}_proj", x) for part in ("gate", "up"))
        return self._apply(f"{name}.mlp.down_proj", activate(self.spec.activation, gate) * up)

    def _walk(self, hidden: Array, anchors: Ints) -> tuple[Ints, Array, Array]:
        """Tokens, logits and confidence of blocks `[B, γ, hidden]`, slot after slot."""
        spec = self.spec
        logits = cap(product(hidden.reshape(-1, hidden.shape[2]), self._head), spec.logit_cap)
        logits = logits.reshape(*hidden.shape[:2], -1)
        tokens = np.empty(hidden.shape[:2], np.int64)
        confidence = np.full(hidden.shape[:2], CERTAIN, np.float32)
        previous, state = anchors, np.zeros((len(anchors), spec.markov_rank), np.float32)
        for k in range(spec.block_size):
            feature = np.zeros((len(anchors), 0), np.float32)
            if spec.markov_rank:
                feature = self._weight("markov_head.markov_w1")[previous]
                out, state = self._markov(hidden[:, k], feature, state)
                logits[:, k] += self._apply("markov_head.markov_w2", out)
            if spec.confidence_head:
                parts = [hidden[:, k], feature] if spec.confidence_with_markov else [hidden[:, k]]
                confidence[:, k] = self._affine("confidence_head.proj", parts)[:, 0]
            previous = self._vocab[logits[:, k].argmax(axis=1)]
            tokens[:, k] = previous
        return tokens, logits, confidence

    def _markov(self, hidden: Array, feature: Array, state: Array) -> tuple[Array, Array]:
        """What the bias is made of, and the state of the RNN behind it."""
        if self.spec.markov_head == "gated":
            gate = self._affine("markov_head.gate_proj", [hidden, feature])
            return _sigmoid(gate) * feature, state
        if self.spec.markov_head == "rnn":
            joint = self._affine("markov_head.joint_proj", [state, feature, hidden])
            gate, candidate, out = np.split(joint, 3, axis=1)
            keep = _sigmoid(gate)
            return np.tanh(out), keep * state + (1 - keep) * np.tanh(candidate)
        return feature, state

    def _weight(self, name: str) -> Array:
        return np.asarray(self._tensor(f"{name}.weight"), np.float32)

    def _apply(self, name: str, x: Array) -> Array:
        flat = product(x.reshape(-1, x.shape[-1]), self._tensor(f"{name}.weight"))
        return flat.reshape(*x.shape[:-1], -1)

    def _affine(self, name: str, parts: Sequence[Array]) -> Array:
        bias = np.asarray(self._tensor(f"{name}.bias"), np.float32)
        return self._apply(name, np.concatenate(parts, axis=1)) + bias

    def _norm(self, name: str, x: Array) -> Array:
        return plain_norm(x, self.spec.epsilon) * self._weight(name)


def _split(x: NDArray[Any], parts: Sequence[Any]) -> list[NDArray[Any]]:
    """By row: as many as each part has."""
    return np.split(x, np.cumsum([len(part) for part in parts])[:-1])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)), np.float32)

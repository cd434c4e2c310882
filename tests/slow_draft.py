"""A draft as the paper and the published checkpoints define it: float64, no cache, no batching.

Written from the formulas, with layers of its own: nothing here comes from the package. A round is
computed from every context position at once, so what a cache does wrong shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class SlowDraft:
    """`config` is a flat one (DeepSpec's keys); `embed` [V, d], `head` [D, d], `vocab` [D]."""

    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, NDArray[Any]],
        *,
        embed: NDArray[Any],
        head: NDArray[Any],
        vocab: NDArray[np.int64] | None = None,
    ) -> None:
        self.config = config
        self.tensors = {name: np.asarray(t, np.float64) for name, t in tensors.items()}
        self.embed, self.head = np.asarray(embed, np.float64), np.asarray(head, np.float64)
        self.vocab = np.arange(len(head)) if vocab is None else vocab
        self.gemma = config["architectures"][0] == "Gemma4DSparkModel"
        self.anchor_drafts = config.get("sample_from_anchor", True)
        self.head_dim = config["global_head_dim" if self.gemma else "head_dim"]

    def __call__(self, features: NDArray[Any], anchor: int) -> tuple[list[int], Array, Array]:
        """Greedy tokens, logits [γ, D] and confidence logits [γ]; features of positions 0 .. n-1,
        the anchor at n."""
        hidden = self.hidden(np.asarray(features, np.float64), anchor)
        if not self.anchor_drafts:
            hidden = hidden[1:]
        base = hidden @ self.head.T
        cap = self.config.get("final_logit_softcapping")
        if cap:
            base = cap * np.tanh(base / cap)
        tokens, rows, confidence = [], [], []
        previous, state = anchor, np.zeros(self.config["markov_rank"])
        for k in range(len(base)):
            row, embedded = base[k], np.zeros(0)
            if self.config["markov_rank"]:
                embedded = self.tensors["markov_head.markov_w1.weight"][previous]
                mixed, state = self.markov(embedded, hidden[k], state)
                row = row + self.tensors["markov_head.markov_w2.weight"] @ mixed
            confidence.append(self.confidence(hidden[k], embedded))
            previous = int(self.vocab[row.argmax()])
            tokens.append(previous)
            rows.append(row)
        return tokens, np.stack(rows), np.array(confidence)

    def hidden(self, features: Array, anchor: int) -> Array:
        """Normed hidden states of the block's slots, [slots, d]."""
        config = self.config
        context = self.norm(features @ self.tensors["fc.weight"].T, "hidden_norm")
        ids = [anchor, *[config["mask_token_id"]] * (config["block_size"] - 1)]
        x = self.embed[ids] * (config["hidden_size"] ** 0.5 if self.gemma else 1.0)
        for i in range(config["num_hidden_layers"]):
            name = f"layers.{i}"
            mixed = self.attention(
                f"{name}.self_attn", self.norm(x, f"{name}.input_layernorm"), context
            )
            if self.gemma:
                x = x + self.norm(mixed, f"{name}.post_attention_layernorm")
                inner = self.mlp(name, self.norm(x, f"{name}.pre_feedforward_layernorm"))
                x = x + self.norm(inner, f"{name}.post_feedforward_layernorm")
                x = x * self.tensors[f"{name}.layer_scalar"]
            else:
                x = x + mixed
                x = x + self.mlp(name, self.norm(x, f"{name}.post_attention_layernorm"))
        return self.norm(x, "norm")

    def attention(self, name: str, x: Array, context: Array) -> Array:
        """Every slot sees the whole context and the whole block."""
        start, size = len(context), self.head_dim
        both = np.concatenate([context, x])
        q = (x @ self.tensors[f"{name}.q_proj.weight"].T).reshape(len(x), -1, size)
        raw = (both @ self.tensors[f"{name}.k_proj.weight"].T).reshape(len(both), -1, size)
        v = raw
        if f"{name}.v_proj.weight" in self.tensors:
            v = (both @ self.tensors[f"{name}.v_proj.weight"].T).reshape(len(both), -1, size)
        if self.gemma:
            v = v / np.sqrt((v**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        if f"{name}.q_norm.weight" in self.tensors:
            q, raw = self.norm(q, f"{name}.q_norm"), self.norm(raw, f"{name}.k_norm")
        positions = np.arange(len(both))
        q, k = self.rotate(q, positions[start:]), self.rotate(raw, positions)
        group = q.shape[1] // k.shape[1]
        out = np.zeros_like(q)
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T * (1.0 if self.gemma else size**-0.5)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, head // group]
        return out.reshape(len(x), -1) @ self.tensors[f"{name}.o_proj.weight"].T

    def rotate(self, x: Array, positions: NDArray[np.int64]) -> Array:
        """Half-split rotation; Gemma 4 turns a quarter of the frequencies only."""
        rope = self.config["rope_parameters"]
        rope = rope.get("full_attention", rope)
        half = self.head_dim // 2
        inverse = rope["rope_theta"] ** (-np.arange(half) / half)
        if rope["rope_type"] == "proportional":
            inverse[int(rope["partial_rotary_factor"] * half) :] = 0.0
        angles = positions[:, None, None] * inverse
        one, two = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    def norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.tensors[f"{name}.weight"]

    def mlp(self, name: str, x: Array) -> Array:
        gate, up, down = (
            self.tensors[f"{name}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")
        )
        gated = x @ gate.T
        if self.gemma:
            curve = np.tanh(np.sqrt(2 / np.pi) * (gated + 0.044715 * gated**3))
            return (0.5 * gated * (1 + curve) * (x @ up.T)) @ down.T
        return (gated / (1 + np.exp(-gated)) * (x @ up.T)) @ down.T

    def markov(self, embedded: Array, hidden: Array, state: Array) -> tuple[Array, Array]:
        """What `markov_w2` is applied to, and the RNN's next state."""
        kind = self.config["markov_head_type"]
        if kind == "gated":
            weight, bias = self.linear("markov_head.gate_proj")
            return sigmoid(weight @ np.concatenate([hidden, embedded]) + bias) * embedded, state
        if kind == "rnn":
            weight, bias = self.linear("markov_head.joint_proj")
            joint = weight @ np.concatenate([state, embedded, hidden]) + bias
            gate, candidate, output = np.split(joint, 3)
            keep = sigmoid(gate)
            return np.tanh(output), keep * state + (1 - keep) * np.tanh(candidate)
        return embedded, state

    def confidence(self, hidden: Array, embedded: Array) -> float:
        if not self.config["enable_confidence_head"]:
            return float("inf")
        weight, bias = self.linear("confidence_head.proj")
        with_markov = self.config["confidence_head_with_markov"]
        row = np.concatenate([hidden, embedded]) if with_markov else hidden
        return float((weight @ row + bias)[0])

    def linear(self, name: str) -> tuple[Array, Array]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))

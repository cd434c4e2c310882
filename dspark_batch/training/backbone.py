"""The draft's Qwen3-style layers: RMSNorm, rotary positions, block attention, SwiGLU.

Symbols: b sequences, S positions, A anchors, γ block size, d hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark_batch.drafters import DraftConfig
from dspark_batch.errors import EngineError
from dspark_batch.models import RopeSpec, rope_from_parameters


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


def rope_of(config: DraftConfig) -> RopeSpec:
    """The rotation that the exported graph has too. Raises `EngineError` for an unknown kind."""
    try:
        return rope_from_parameters(
            config.rope_parameters,
            head_dim=config.head_dim,
            max_positions=config.max_position_embeddings,
        )
    except (KeyError, ValueError) as error:
        raise EngineError(f"draft config: rope_parameters: {error}") from error


class Rotation(NamedTuple):
    """Cosines and sines `[..., 1, head_dim]` of a set of positions (the 1 spans the heads)."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate `[..., heads, head_dim]` by halves (NeoX order)."""
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * self.cos.to(x.dtype) + turned * self.sin.to(x.dtype)


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
        visible: Tensor,  # [b, A, S] bool: position < anchor
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
        to_context = to_context.masked_fill(~visible[:, None, :, None, :], float("-inf"))
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
        """What the MLP half of the layer adds to the residual stream."""
        out: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return out

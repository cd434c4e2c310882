"""The small heads over block hidden rows: Markov (vanilla, gated, rnn) and confidence.

Symbols: γ block size, d hidden size, V' draft vocabulary, r Markov rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_batch.drafters import DraftConfig


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
        rows, state = self.step_rows(embedded, hidden, state)
        return self.markov_w2(rows), state

    def step_rows(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """As `step`, without `markov_w2`: `[..., r]`."""
        if self.kind == "rnn":
            joint = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1))
            gate, candidate, output = joint.chunk(3, dim=-1)
            keep = torch.sigmoid(gate)
            state = keep * state + (1 - keep) * torch.tanh(candidate)
            return torch.tanh(output), state
        return self.gated(embedded, hidden), state

    def gated(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """What a stateless kind feeds to `markov_w2`, for any leading axes."""
        if self.kind == "gated":
            gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1)))
            return gate * embedded
        return embedded

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Biases `[..., γ, V']` of whole blocks, `embedded [..., γ, r]`, `hidden [..., γ, d]`."""
        biases: Tensor = self.markov_w2(self.rows(embedded, hidden))
        return biases

    def rows(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """As `forward`, without `markov_w2`: `[..., γ, r]`."""
        if self.kind != "rnn":
            return self.gated(embedded, hidden)
        state, rows = self.initial_state(hidden), []
        for slot in range(hidden.shape[-2]):
            row, state = self.step_rows(embedded[..., slot, :], hidden[..., slot, :], state)
            rows.append(row)
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

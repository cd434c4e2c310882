"""A transformers model as the frozen target of a training: the oracle for our own engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.spec import DecoderSpec


class HFFeatures:
    """`features.TargetFeatures` by forward hooks on raw layer outputs.

    Not `output_hidden_states`: its last entry is already normalised.
    """

    logit_cap = None

    def __init__(self, target: Any, taps: Sequence[int]) -> None:
        self.decoder = target.get_decoder()
        self.head_weight = target.get_output_embeddings().weight.detach()
        self.hidden_size = self.head_weight.shape[1]
        self.feature_size = len(taps) * self.hidden_size
        self._taps = tuple(taps)
        self._found: dict[int, Tensor] = {}
        for tap in self._taps:
            module = target.get_input_embeddings() if tap == -1 else self.decoder.layers[tap]
            module.register_forward_hook(self._recorder(tap))

    def _recorder(self, tap: int) -> Callable[[nn.Module, object, Any], None]:
        def record(_module: nn.Module, _inputs: object, output: Any) -> None:
            # Older transformers return a tuple, hidden states first.
            self._found[tap] = output[0] if isinstance(output, tuple) else output

        return record

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for ids in rows:
            output = self.decoder(input_ids=torch.tensor([list(ids)]), use_cache=False)
            features = torch.cat([self._found[tap][0] for tap in self._taps], dim=-1)
            yield features, output.last_hidden_state[0]


def tensors_and_spec(target: Any) -> tuple[Callable[[str], Any], DecoderSpec]:
    """The weights of a transformers model as `weights.Weights` gives them, and its spec."""
    state, config = target.state_dict(), target.config.to_dict()
    config["head_dim"] = config.get("head_dim") or (
        config["hidden_size"] // config["num_attention_heads"]
    )
    return lambda name: state[name].numpy(), decoder_spec(config)

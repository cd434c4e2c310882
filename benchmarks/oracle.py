"""transformers in fp32 on the CPU, one row and one token at a time: what greedy text should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.models.weights import resolve_source


class Oracle:
    """A causal language model of transformers. Nothing of ours is in its path to the tokens."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    @classmethod
    def open(cls, source: str) -> Oracle:
        """Load a Hugging Face folder or a GGUF file; `package:DISTRIBUTION/path` works as well.

        Raises:
            EngineError: there is nothing at `source`.
        """
        import torch
        import transformers

        models: Any = transformers.AutoModelForCausalLM  # typed in part only
        path = resolve_source(source)
        if path.is_dir():
            return cls(models.from_pretrained(path, dtype=torch.float32))
        loaded = models.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        config = loaded.config
        # The file holds 1e-5 as float32, which read as a double is 9.99999974737875e-06.
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
        # Into a plain model: the loader may leave modules that unpack their weights as they go.
        plain = models.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.tie_weights()
        return cls(plain)

    def greedy(
        self, token_ids: Sequence[int], *, new_tokens: int, stop_token_ids: Sequence[int]
    ) -> tuple[int, ...]:
        """New tokens, with the stop token that ended the row if one did."""
        import torch
        import transformers

        configs: Any = transformers.GenerationConfig
        ids = torch.tensor([list(token_ids)])
        stop = list(stop_token_ids)
        config = configs(
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=stop or None,
            pad_token_id=stop[0] if stop else 0,
        )
        with torch.inference_mode():
            output: Any = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        return tuple(output[0, ids.shape[1] :].tolist())

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n, V] of a full forward over the row."""
        import torch

        with torch.inference_mode():
            output: Any = self._model(torch.tensor([list(token_ids)]), use_cache=False)
        return np.asarray(output.logits[0].numpy())

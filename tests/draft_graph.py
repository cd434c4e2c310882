"""`draft.onnx` by itself: built from checkpoints without an export, run with caches of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_batch.drafters.dspark import DSparkGraph
from dspark_batch.drafters.layouts import draft_spec, draft_vocab
from dspark_batch.drafters.shared import check_fits, embedding, head
from dspark_batch.engine.runtimes.ort import float_type, open_session
from dspark_batch.models.decoder import DecoderGraph
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.graph.builder import GraphBuilder
from dspark_batch.models.graph.linears import PRECISIONS
from dspark_batch.models.smoothing import Smoothing
from dspark_batch.models.weights import open_weights


@dataclass
class DraftGraph:
    """`draft.onnx` with a cache: row r grows by what each call takes in of it."""

    path: Path
    capacity: int = 40

    def __post_init__(self) -> None:
        self._session = open_session(self.path, threads=1)
        self._shapes = {i.name: i.shape for i in self._session.get_inputs()}
        self._dtype = float_type(self._session, "context")
        self._caches: dict[str, NDArray[Any]] = {}
        self._lengths = np.zeros(0, np.int64)

    @property
    def num_features(self) -> int:
        """Width of a position's context."""
        return int(self._shapes["context"][1])

    @property
    def num_drafts(self) -> int:
        """γ."""
        return int(self._shapes["uniforms"][1])

    def __call__(
        self,
        context: list[NDArray[np.float32]],
        anchors: list[int],
        *,
        temperature: Any = 0.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        uniforms: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Tokens, logits and confidence of one round; `context[r]` are row r's new features."""
        num_rows, counts = len(context), np.array([len(part) for part in context])
        if not self._caches:
            self._lengths = np.zeros(num_rows, np.int64)
            for name, shape in self._shapes.items():
                if name.startswith("past_"):
                    # What lies beyond a row's length must not matter.
                    size = (num_rows, shape[1], self.capacity, shape[3])
                    self._caches[name] = np.full(size, 7.0, self._dtype)
        first = np.cumsum(counts) - counts
        cells = np.minimum(np.arange(counts.max())[None, :], counts[:, None] - 1)
        gamma = self.num_drafts
        junk = np.full((1, self.num_features), 3.0, np.float32)
        feeds = {
            # row 0 is not taken in
            "context": np.concatenate([junk, *context]).astype(self._dtype),
            "context_tokens": np.arange(1, 1 + counts.sum()),
            "context_index": first[:, None] + cells,
            "context_starts": self._lengths,
            "anchors": np.array(anchors, np.int64),
            "anchor_positions": self._lengths + counts,
            "temperature": np.broadcast_to(np.float32(temperature), num_rows).copy(),
            "top_k": np.broadcast_to(np.int64(top_k), num_rows).copy(),
            "top_p": np.broadcast_to(np.float32(top_p), num_rows).copy(),
            "uniforms": np.zeros((num_rows, gamma), np.float32) if uniforms is None else uniforms,
            **self._caches,
        }
        outputs = ["draft_tokens", "draft_logits", "confidence"]
        present = [name.replace("past_", "present_") for name in self._caches]
        tokens, logits, confidence, *new = self._session.run(outputs + present, feeds)
        self._caches = dict(zip(self._caches, new, strict=True))
        self._lengths = self._lengths + counts
        return tokens, logits, confidence


def build_draft(
    folder: Path,
    target: Path,
    draft: Path,
    *,
    precision: str = "fp32",
    smoothing: Smoothing | None = None,
) -> DraftGraph:
    """Both graphs of a pair, built as an export does, but not checked and not measured."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_weights(target) as theirs, open_weights(draft) as own:
        spec = draft_spec(own)
        target_spec = decoder_spec(theirs.config)
        check_fits(spec, own, target_spec)
        vocab = draft_vocab(own, spec)
        kind = PRECISIONS[precision].data_type
        builder = GraphBuilder("target", folder, kind)
        graph = DecoderGraph(
            builder, target_spec, theirs.tensor, precision=precision, smoothing=smoothing
        )
        graph.build(taps=spec.taps, draft_vocab=vocab, max_tokens=64)
        builder.save()
        stored, rows = graph.head_weights()
        draft_builder = GraphBuilder("draft", folder, kind)
        DSparkGraph(draft_builder, spec, own.tensor, precision=precision).build(
            embed=embedding(
                own, theirs, builder=draft_builder, stored=builder.stored("model.embed_tokens")
            ),
            head=head(
                own, theirs, tied=target_spec.tied_head, vocab=vocab, stored=stored, rows=rows
            ),
            draft_vocab=vocab,
            max_tokens=64,
        )
        return DraftGraph(draft_builder.save())

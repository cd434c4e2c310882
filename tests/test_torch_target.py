"""The target in torch against the NumPy reference, transformers' greedy text and itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_families import CASES as FAMILIES
from tiny import LAYERS, VOCAB, target_config, write_target

torch = pytest.importorskip("torch")

from dspark_batch.models.families import decoder_spec  # noqa: E402
from dspark_batch.models.reference import forward  # noqa: E402
from dspark_batch.models.weights import open_weights  # noqa: E402
from dspark_batch.training.decoder import Decoder, KeysValues, padded  # noqa: E402

CPU = torch.device("cpu")
GEMMA4 = ("keys-as-values", "own-values", "untied", "layer-inputs", "shared-keys", "e2b")
CASES = [*FAMILIES, *(f"gemma4-{name}" for name in GEMMA4)]
TAPS = (-1, 0, LAYERS - 2)


def write(folder: Path, name: str) -> Path:
    if not name.startswith("gemma4"):
        return write_target(folder, FAMILIES[name])
    pytest.importorskip("transformers")
    from test_gemma4 import CASES as CHANGES
    from test_gemma4 import write_gemma4

    write_gemma4(folder, **CHANGES[name.removeprefix("gemma4-")])
    return folder


def opened(source: Path, dtype: Any = torch.float32) -> tuple[Decoder, Any]:
    weights = open_weights(source)
    return Decoder(decoder_spec(weights.config), weights.tensor, device=CPU, dtype=dtype), weights


@pytest.mark.parametrize("name", CASES)
def test_a_pass_equals_the_reference(name: str, tmp_path: Path) -> None:
    decoder, weights = opened(write(tmp_path / "target", name))
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, VOCAB, n).tolist() for n in (40, 7, 19)]
    wanted = forward(decoder.spec, weights.tensor, rows, taps=TAPS)
    found = decoder.forward(padded(rows, CPU), taps=TAPS)
    for r, row in enumerate(rows):
        n = len(row)
        np.testing.assert_allclose(
            decoder.logits(found.normed)[r, :n], wanted[r].logits, atol=1e-4, rtol=1e-4
        )
        for tap in TAPS:
            np.testing.assert_allclose(
                found.streams[tap][r, :n], wanted[r].streams[tap], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("name", CASES)
def test_a_cache_fed_in_pieces_gives_what_one_pass_gives(name: str, tmp_path: Path) -> None:
    """Rows of unlike length, padded in the first piece; then one is dropped."""
    decoder, _ = opened(write(tmp_path / "target", name))
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, VOCAB, 30).tolist() for _ in range(3)]
    whole = decoder.forward(padded(rows, CPU)).normed
    cache = KeysValues(decoder.spec, 3, 32, device=CPU, dtype=torch.float32)
    lengths = torch.tensor([5, 17, 9])
    first = [row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)]
    tokens = padded(first, CPU)
    places = torch.arange(17).expand(3, -1)
    normed = decoder.forward(tokens, positions=places, cache=cache, end=17).normed
    for r, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(normed[r, :n], whole[r, :n], atol=1e-4, rtol=1e-4)
    kept = torch.tensor([0, 1, 2])
    for step in range(13):
        if step == 4:
            kept = torch.tensor([0, 2])
            cache.keep(kept)
        places = (lengths[kept] + step)[:, None]
        tokens = torch.tensor([[rows[r][p]] for r, p in zip(kept, places[:, 0], strict=True)])
        normed = decoder.forward(tokens, positions=places, cache=cache, end=17 + step + 1).normed
        for i, r in enumerate(kept.tolist()):
            torch.testing.assert_close(normed[i, 0], whole[r, places[i, 0]], atol=1e-4, rtol=1e-4)


def test_bf16_stays_close_to_fp32(tmp_path: Path) -> None:
    source = write_target(tmp_path / "target", target_config("qwen3"))
    rows = [np.random.default_rng(2).integers(1, VOCAB, 20).tolist()]
    exact, near = (
        decoder.logits(decoder.forward(padded(rows, CPU)).normed)
        for decoder, _ in (opened(source), opened(source, torch.bfloat16))
    )
    assert near.dtype == torch.float32
    assert 0 < (exact - near).abs().max() < 0.05 * exact.abs().max()

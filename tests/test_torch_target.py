"""The target in torch against the NumPy reference, and what it says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_families import CASES as FAMILIES
from tiny import LAYERS, VOCAB, target_config, write_target

torch = pytest.importorskip("torch")

from dspark_batch.decode import SamplingParams  # noqa: E402
from dspark_batch.decode.algorithm.sampling import filtered_probs as numpy_probs  # noqa: E402
from dspark_batch.models.families import decoder_spec  # noqa: E402
from dspark_batch.models.reference import forward  # noqa: E402
from dspark_batch.models.weights import open_weights  # noqa: E402
from dspark_batch.training import generation, target  # noqa: E402
from dspark_batch.training.anchors import anchor_batch, sample_anchors  # noqa: E402
from dspark_batch.training.decoder import Decoder, KeysValues, padded  # noqa: E402
from dspark_batch.training.features import FeatureSource, TrainingSequence  # noqa: E402
from dspark_batch.training.generation import filtered_probs, generate, rows_within  # noqa: E402
from dspark_batch.training.target import TorchFeatures  # noqa: E402

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
    cache = KeysValues.empty(decoder.spec, 3, 32, device=CPU, dtype=torch.float32)
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


@pytest.mark.parametrize("name", ["gemma3", "gemma4-e2b"])
def test_a_pass_and_its_features_stay_on_their_device(name: str, tmp_path: Path) -> None:
    """On the meta device, which has no values but refuses to mix with the CPU as CUDA does."""
    meta = torch.device("meta")
    weights = open_weights(write(tmp_path / "target", name))
    spec = decoder_spec(weights.config)
    decoder = Decoder(spec, weights.tensor, device=meta, dtype=torch.bfloat16)
    cache = KeysValues.empty(spec, 2, 9, device=meta, dtype=torch.bfloat16)
    places = torch.arange(4, device=meta).expand(2, -1)
    tokens = padded([[1, 2], [3, 4, 5, 6]], meta)
    normed = decoder.forward(tokens, positions=places, cache=cache, end=4).normed
    assert decoder.logits(normed).device == meta
    sequences = [TrainingSequence((1, 2, 3, 4), 2), TrainingSequence((5, 6, 7), 1)]
    source = FeatureSource(
        TorchFeatures(decoder, TAPS),
        sequences,
        max_bytes=1 << 20,
        dtype=torch.bfloat16,
        device=meta,
    )
    batch = source.batch([0, 1])
    assert {getattr(batch, field.name).device for field in fields(batch)} == {meta}
    anchors = sample_anchors(batch.loss_mask, 3, torch.Generator().manual_seed(0))
    assert anchor_batch(batch, anchors, 4).labels.device == meta


def greedy_text(
    decoder: Decoder, read: Any, prompt: list[int], stops: set[int], n: int
) -> list[int]:
    """By the reference, from the start for each token."""
    tokens = list(prompt)
    for _ in range(n):
        (found,) = forward(decoder.spec, read, [tokens])
        tokens.append(int(found.logits[-1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4-e2b"])
def test_greedy_responses_are_those_of_the_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several passes of the prompts, and with rows that end and leave before the others."""
    monkeypatch.setattr(generation, "_PREFILL_TOKENS", 40)
    monkeypatch.setattr(generation, "_LOOK_EVERY", 3)
    decoder, weights = opened(write(tmp_path / "target", name))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, VOCAB, n).tolist() for n in (3, 21, 9, 14, 1, 17, 4, 8)]
    stops = {0, 5, 9, 13}
    wanted = [greedy_text(decoder, weights.tensor, prompt, stops, 20) for prompt in prompts]
    lengths = [len(response) for response in wanted]
    assert min(lengths) < 6
    assert max(lengths) > 9
    params = SamplingParams(max_new_tokens=20)
    assert generate(decoder, prompts, params, stop_token_ids=sorted(stops)) == wanted


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (7, 0.8)])
def test_a_row_may_emit_what_decoding_lets_it(top_k: int, top_p: float) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p)
    found = filtered_probs(logits, params)
    found = found / found.sum(-1, keepdim=True)
    wanted = numpy_probs(logits.numpy(), np.full(5, 0.7), np.full(5, top_k), np.full(5, top_p))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_sampled_responses_follow_the_seed_and_the_distribution(tmp_path: Path) -> None:
    decoder, _ = opened(write_target(tmp_path / "target", target_config("llama")))
    prompts = [[3, 1, 4]] * 4000
    first, again, other = (
        generate(
            decoder,
            prompts,
            SamplingParams(max_new_tokens=1, temperature=1.5, seed=seed),
            stop_token_ids=(),
        )
        for seed in (1, 1, 2)
    )
    assert first == again != other
    shares = np.bincount(np.ravel(first), minlength=VOCAB) / len(prompts)
    logits = decoder.logits(decoder.forward(padded(prompts[:1], CPU)).normed[0, -1])
    np.testing.assert_allclose(shares, (logits / 1.5).softmax(-1), atol=0.03)


def test_generation_can_be_stopped_on_the_way(tmp_path: Path) -> None:
    decoder, _ = opened(write_target(tmp_path / "target", target_config("llama")))

    def check() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        generate(decoder, [[1]], SamplingParams(), stop_token_ids=(), check=check)


def test_a_wave_fits_its_memory(tmp_path: Path) -> None:
    decoder, _ = opened(write_target(tmp_path / "target", target_config("llama")))
    position = KeysValues.num_bytes(decoder.spec, torch.float32)
    cache = KeysValues.empty(decoder.spec, 1, 1, device=CPU, dtype=torch.float32)
    assert position == sum(pair.nbytes for pair in cache._layers.values())
    prompts = [[1] * 10, [1] * 10, [1] * 30, [1] * 30]
    for room, count in ((0, 1), (39, 1), (40, 2), (119, 2), (120, 3), (160, 4), (999, 4)):
        assert rows_within(decoder, prompts, 10, num_bytes=room * position) == count


def test_features_do_not_depend_on_the_passes_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, weights = opened(write_target(tmp_path / "target", target_config("qwen3")))
    rng = np.random.default_rng(4)
    rows = [rng.integers(1, VOCAB, n).tolist() for n in (5, 6, 30, 2, 9, 9)]
    features = TorchFeatures(decoder, TAPS)
    sizes = []
    monkeypatch.setattr(
        target, "padded", lambda rows, device: sizes.append(len(rows)) or padded(rows, device)
    )
    for limit in (1, 20, 1000):
        monkeypatch.setattr(target, "_PASS_TOKENS", limit)
        for row, (found, normed) in zip(rows, features(rows), strict=True):
            (wanted,) = forward(decoder.spec, weights.tensor, [row], taps=TAPS)
            streams = np.concatenate([wanted.streams[tap] for tap in TAPS], axis=1)
            np.testing.assert_allclose(found, streams, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(normed, wanted.normed, atol=1e-4, rtol=1e-4)
    assert sizes == [1] * 6 + [2, 1, 2, 1] + [6]

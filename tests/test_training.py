"""Properties of the torch draft, its files, its loss and its training loop."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from hf_target import HFFeatures, tensors_and_spec  # noqa: E402

from dspark_batch.drafters import DraftConfig, config_from_json  # noqa: E402
from dspark_batch.errors import EngineError, InputError  # noqa: E402
from dspark_batch.training import fused_loss as fused  # noqa: E402
from dspark_batch.training.anchors import (  # noqa: E402
    aligned_target_probs,
    anchor_batch,
    repeated,
    sample_anchors,
    valid_anchors,
)
from dspark_batch.training.backbone import rope_of  # noqa: E402
from dspark_batch.training.checkpoint import load_draft, save_draft  # noqa: E402
from dspark_batch.training.draft import DraftCache, DSparkDraft  # noqa: E402
from dspark_batch.training.evaluation import evaluate, replay_greedy  # noqa: E402
from dspark_batch.training.features import (  # noqa: E402
    FeatureBatch,
    FeatureSource,
    TrainingSequence,
    capped,
)
from dspark_batch.training.geometry import draft_config_from_target, evenly_tapped  # noqa: E402
from dspark_batch.training.initialise import frequent_ids, initialise_from_target  # noqa: E402
from dspark_batch.training.losses import LossWeights, dspark_loss  # noqa: E402
from dspark_batch.training.options import TrainingOptions, learning_rate_at  # noqa: E402
from dspark_batch.training.trainer import Trainer  # noqa: E402

VOCAB, HIDDEN, LAYERS, STOP, MASK = 40, 32, 3, 1, 0
BASE = DraftConfig(
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    block_size=4,
    mask_token_id=MASK,
    target_layer_ids=(-1, 1),
    num_target_layers=LAYERS,
    markov_rank=6,
)
HEADS = {
    "vanilla": BASE,
    "gated": replace(BASE, markov_head_type="gated"),
    "rnn": replace(BASE, markov_head_type="rnn"),
    "none": replace(BASE, markov_rank=0, confidence_head_with_markov=False),
    "no confidence": replace(BASE, enable_confidence_head=False),
    "reduced": replace(BASE, draft_vocab_size=11),
    "no q/k norm": replace(BASE, qk_norm=False),
}
each_head = pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())


def random_draft(config: DraftConfig, seed: int = 0) -> DSparkDraft:
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    vocab = None
    if config.draft_vocab_size is not None:
        ids = torch.randperm(config.vocab_size, generator=generator)[: config.num_draft_ids]
        vocab = ids.sort().values
    head = embed if vocab is None else embed[vocab]
    draft = DSparkDraft(config, embed_tokens=embed, lm_head=head, draft_vocab=vocab)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return draft.requires_grad_(False)


@pytest.fixture(scope="module")
def target() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@torch.no_grad()
def greedy_sequence(target: Any, prompt: list[int], num_tokens: int) -> TrainingSequence:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(target(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == STOP:
            break
    return TrainingSequence(tuple(tokens), len(prompt))


@pytest.fixture(scope="module")
def sequences(target: Any) -> list[TrainingSequence]:
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(2, VOCAB, (3 + i % 5,), generator=generator).tolist() for i in range(20)
    ]
    return [greedy_sequence(target, prompt, 24) for prompt in prompts]


def fitted_draft(target: Any, config: DraftConfig = BASE, *, dropout: float = 0.0) -> DSparkDraft:
    embed = target.get_input_embeddings().weight
    torch.manual_seed(0)
    draft = DSparkDraft(config, embed_tokens=embed, lm_head=embed, dropout=dropout)
    initialise_from_target(draft, *tensors_and_spec(target))
    return draft


@each_head
def test_packed_scores_equal_one_decode_step_per_anchor(config: DraftConfig) -> None:
    draft, generator = random_draft(config), torch.Generator().manual_seed(1)
    features = torch.randn(2, 15, config.feature_size, generator=generator)
    tokens = torch.randint(VOCAB, (2, 15), generator=generator)
    anchors = torch.tensor([[1, 4, 5, 12], [3, 7, 14, 2]])
    for row in range(2):
        for column, anchor in enumerate(anchors[row].tolist()):
            block = draft.forward_block(
                tokens[row, anchor : anchor + 1], features[row : row + 1, :anchor], DraftCache()
            )
            assert block.tokens is not None
            previous = torch.zeros(2, 4, config.block_size, dtype=torch.long)
            previous[..., 0] = tokens.gather(1, anchors)
            previous[row, column, 1:] = block.tokens[0, :-1]
            packed = draft.forward_packed(features, anchors=anchors, previous=previous)
            torch.testing.assert_close(
                packed.logits[row, column], block.logits[0], atol=2e-5, rtol=1e-5
            )
            if config.enable_confidence_head:
                assert packed.confidence_logits is not None
                assert block.confidence_logits is not None
                torch.testing.assert_close(
                    packed.confidence_logits[row, column],
                    block.confidence_logits[0],
                    atol=2e-5,
                    rtol=1e-5,
                )
            else:
                assert packed.confidence_logits is None


@each_head
def test_a_cache_fed_in_pieces_drafts_as_one_fed_at_once(config: DraftConfig) -> None:
    draft, generator = random_draft(config), torch.Generator().manual_seed(2)
    features = torch.randn(1, 9, config.feature_size, generator=generator)
    anchor, cache = torch.tensor([7]), DraftCache()
    for start, end in ((0, 4), (4, 5), (5, 9)):
        pieces = draft.forward_block(anchor, features[:, start:end], cache)
    whole = draft.forward_block(anchor, features, DraftCache())
    assert cache.length == 9
    torch.testing.assert_close(pieces.logits, whole.logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_markov_head_computes_its_formula(kind: str) -> None:
    draft, rank = random_draft(HEADS[kind]), BASE.markov_rank
    head, generator = draft.markov_head, torch.Generator().manual_seed(6)
    assert head is not None
    hidden = torch.randn(BASE.block_size, HIDDEN, generator=generator)
    previous = torch.randint(VOCAB, (BASE.block_size,), generator=generator)
    weights, state, expected = head.state_dict(), torch.zeros(rank), []
    for h, token in zip(hidden, previous, strict=True):
        row = e = weights["markov_w1.weight"][token]
        if kind == "gated":
            mixed = weights["gate_proj.weight"] @ torch.cat([h, e]) + weights["gate_proj.bias"]
            row = torch.sigmoid(mixed) * e
        if kind == "rnn":
            joint = torch.cat([state, e, h])
            joint = weights["joint_proj.weight"] @ joint + weights["joint_proj.bias"]
            gate = torch.sigmoid(joint[:rank])
            state = gate * state + (1 - gate) * torch.tanh(joint[rank : 2 * rank])
            row = torch.tanh(joint[2 * rank :])
        expected.append(weights["markov_w2.weight"] @ row)
    got = head(head.embed(previous), hidden)
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_drafted_tokens_are_target_ids_of_the_draft_vocabulary() -> None:
    draft = random_draft(HEADS["reduced"])
    features = torch.randn(1, 5, BASE.feature_size, generator=torch.Generator().manual_seed(0))
    scores = draft.forward_block(torch.tensor([2]), features, DraftCache())
    assert scores.tokens is not None
    assert torch.equal(scores.tokens, draft.draft_vocab[scores.logits.argmax(-1)])
    assert scores.logits.shape == (1, BASE.block_size, 11)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rope_frequencies_equal_those_of_transformers(rope: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=rope
    )
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = rope_of(replace(BASE, head_dim=64, rope_parameters=rope)).inverse_frequencies
    torch.testing.assert_close(torch.tensor(ours), module.inv_freq, rtol=1e-6, atol=0)


def test_a_config_from_a_target_keeps_its_width_and_rotation() -> None:
    raw = {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 30,
        "num_attention_heads": 6,
        "vocab_size": 50,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "eos_token_id": [2, 3],
    }
    wanted = {"num_layers": 2, "block_size": 5, "markov_rank": 4, "mask_token_id": 9}
    config = draft_config_from_target(raw, **wanted)
    assert (config.head_dim, config.num_key_value_heads, config.num_target_layers) == (16, 6, 30)
    assert config.target_layer_ids == (1, 8, 15, 21, 28)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    nested = {**raw, "rope_parameters": config.rope_parameters, "rope_scaling": None}
    assert draft_config_from_target(nested, **wanted) == config
    del raw["vocab_size"]
    with pytest.raises(EngineError, match="vocab_size"):
        draft_config_from_target(raw, **wanted)
    assert [evenly_tapped(n) for n in (2, 3, 6)] == [(-1, 0), (0, 1), (0, 1, 2, 3, 4)]


def test_an_unknown_rope_type_is_refused() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(EngineError, match="longrope"):
        rope_of(replace(BASE, rope_parameters=rope))


@each_head
def test_a_saved_draft_scores_as_before(config: DraftConfig, tmp_path: Path) -> None:
    draft = random_draft(config)
    full_head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4))
    draft.head_weight = full_head[draft.draft_vocab]
    save_draft(draft, tmp_path, dtype=torch.float32)
    loaded = load_draft(tmp_path, embed_tokens=draft.embed_weight, lm_head=full_head)
    features = torch.randn(1, 6, config.feature_size, generator=torch.Generator().manual_seed(1))
    scores = [d.forward_block(torch.tensor([5]), features, DraftCache()) for d in (draft, loaded)]
    assert loaded.config == config
    assert torch.equal(scores[0].logits, scores[1].logits)
    assert torch.equal(loaded.draft_vocab, draft.draft_vocab)


def test_the_file_has_the_published_names_and_offsets_for_d2t(tmp_path: Path) -> None:
    draft = random_draft(HEADS["reduced"])
    save_draft(draft, tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    d2t = tensors.pop("d2t")
    assert d2t.dtype == torch.int64
    assert [i + int(offset) for i, offset in enumerate(d2t)] == draft.draft_vocab.tolist()
    attention = [f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    attention += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    mlp = [f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = [f"layers.{i}.{name}" for i in range(2) for name in attention + mlp + norms]
    heads = ["markov_head.markov_w1.weight", "markov_head.markov_w2.weight"]
    heads += ["confidence_head.proj.weight", "confidence_head.proj.bias"]
    trunk = ["fc.weight", "hidden_norm.weight", "norm.weight"]
    assert sorted(tensors) == sorted(layers + heads + trunk)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["markov_head.markov_w1.weight"].shape == (VOCAB, BASE.markov_rank)
    assert tensors["markov_head.markov_w2.weight"].shape == (11, BASE.markov_rank)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["draft_vocab_size"] == 11
    assert config["target_layer_ids"] == [-1, 1]


def test_a_checkpoint_that_does_not_fit_says_why(tmp_path: Path) -> None:
    draft = random_draft(BASE)
    save_draft(draft, tmp_path)
    embed = draft.embed_weight
    with pytest.raises(EngineError, match="give the target's"):
        load_draft(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"draft_vocab_size": 11}, "d2t and draft_vocab_size"),
        ({"intermediate_size": 50}, "does not fit its config"),
        ({"hidden_size": 16}, "do not fit the draft config"),
        ({"target_layer_ids": [1, 1]}, "target_layer_ids"),
        ({"target_layer_ids": [1, 3]}, "beyond 3 layers"),
        ({"markov_rank": 0}, "markov_rank > 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(EngineError, match=words):
            load_draft(tmp_path, embed_tokens=embed, lm_head=embed)
    del config["mask_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="mask_token_id"):
        config_from_json(tmp_path / "config.json")


def test_weights_beyond_fp16_are_not_written(tmp_path: Path) -> None:
    draft = random_draft(BASE)
    draft.fc.weight[0, 0] = 1e6
    with pytest.raises(EngineError, match="not finite"):
        save_draft(draft, tmp_path)
    assert list(tmp_path.iterdir()) == []


def loss_inputs(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 4)
    mask = torch.rand(shape, generator=generator) > 0.3
    return {
        "logits": torch.randn(*shape, 9, generator=generator),
        "confidence_logits": torch.randn(shape, generator=generator),
        "target_probs": torch.randn(*shape, 9, generator=generator).softmax(-1),
        "labels": torch.randint(9, shape, generator=generator),
        "mask": mask,
    }


def total_loss(inputs: dict[str, Any], weights: LossWeights) -> Any:
    rest = {name: value for name, value in inputs.items() if name != "logits"}
    return dspark_loss(inputs["logits"], weights=weights, **rest)


def test_the_loss_equals_its_formula_slot_by_slot() -> None:
    inputs = loss_inputs(0)
    inputs["target_probs"] = inputs["target_probs"] * 0.75  # a quarter is outside
    inputs["labels"][0, 0, 1] = inputs["labels"][1, 2, 0] = -1
    inputs["mask"][0, 0, 1] = inputs["mask"][1, 2, 0] = True
    ce, l1, bce = [[0.0, 0.0] for _ in range(3)]
    for b in range(2):
        for a in range(3):
            for k in range(4):
                if not inputs["mask"][b, a, k]:
                    continue
                weight = float(torch.exp(torch.tensor(-k / 4.0)))
                probs = inputs["logits"][b, a, k].softmax(-1)
                distance = float((probs - inputs["target_probs"][b, a, k]).abs().sum()) + 0.25
                label = int(inputs["labels"][b, a, k])
                if label >= 0:
                    ce[0] += weight * -float(probs[label].log())
                    ce[1] += weight
                l1[0] += weight * distance
                l1[1] += weight
                chance = torch.sigmoid(inputs["confidence_logits"][b, a, k])
                star = 1 - distance / 2
                bce[0] -= weight * float(star * chance.log() + (1 - star) * (1 - chance).log())
                bce[1] += weight
    terms = total_loss(inputs, LossWeights())
    parts = [numerator / (denominator + 1e-6) for numerator, denominator in (ce, l1, bce)]
    assert float(terms.cross_entropy) == pytest.approx(parts[0], rel=1e-5)
    assert float(terms.l1) == pytest.approx(parts[1], rel=1e-5)
    assert float(terms.confidence) == pytest.approx(parts[2], rel=1e-5)
    expected = 0.1 * parts[0] + 0.9 * parts[1] + 1.0 * parts[2]
    assert float(terms.total) == pytest.approx(expected, rel=1e-5)


def test_a_reduced_vocabulary_has_the_l1_of_a_draft_that_never_leaves_it() -> None:
    inputs = loss_inputs(1)
    inputs["logits"][..., 6:] = float("-inf")
    inputs["labels"] %= 6
    whole = total_loss(inputs, LossWeights())
    reduced = dict(inputs)
    reduced["logits"] = inputs["logits"][..., :6]
    reduced["target_probs"] = inputs["target_probs"][..., :6]
    torch.testing.assert_close(total_loss(reduced, LossWeights()).total, whole.total)


def test_the_confidence_target_carries_no_gradient() -> None:
    inputs = loss_inputs(2)
    inputs["logits"].requires_grad_()
    total_loss(inputs, LossWeights(cross_entropy=0.0, l1=0.0)).total.backward()
    assert not inputs["logits"].grad.any()


def test_slots_that_do_not_count_change_nothing() -> None:
    inputs = loss_inputs(3)
    before = total_loss(inputs, LossWeights()).total
    inputs["logits"][~inputs["mask"]] += 3.0 * torch.arange(9)
    assert torch.equal(total_loss(inputs, LossWeights()).total, before)


def test_lk_is_its_formula_and_its_mixture_carries_no_gradient() -> None:
    inputs = loss_inputs(4)
    inputs["logits"].requires_grad_()
    terms = total_loss(inputs, LossWeights(0.0, 0.0, 0.0, 2.0, lk=1.5))
    probs, wanted = inputs["logits"].softmax(-1), inputs["target_probs"]
    shares = inputs["mask"] * torch.exp(-torch.arange(4) / 2.0)
    shares = shares / shares.sum()
    distance = 0.5 * (probs - wanted).abs().sum(-1)
    mixing = torch.exp(-3.0 * (1.0 - distance)).detach()
    kl = torch.nn.functional.kl_div(probs.log(), wanted, reduction="none").sum(-1)
    expected = (shares * (mixing * kl + (1.0 - mixing) * distance)).sum()
    torch.testing.assert_close(terms.lk, expected)
    torch.testing.assert_close(terms.total, 1.5 * expected)
    found = torch.autograd.grad(terms.total, inputs["logits"], retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(1.5 * expected, inputs["logits"]))


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("markov", [True, False])
@pytest.mark.parametrize("lk", [0.0, 0.7])
def test_the_fused_loss_equals_the_loss_over_whole_logits(
    monkeypatch: pytest.MonkeyPatch, lk: float, markov: bool, cap: float | None
) -> None:
    monkeypatch.setattr(fused, "_CHUNK_VALUES", 9 * 5)  # several chunks, the last one shorter
    generator, shape = torch.Generator().manual_seed(7), (3, 4)

    def random(*sizes: int) -> Any:
        return torch.randn(*sizes, generator=generator)

    leaves = [random(*shape, 6), random(*shape, 5), random(9, 5), random(*shape)]
    for leaf in leaves:
        leaf.requires_grad_()
    hidden, rows, w2, confidence = leaves
    head, target_hidden = random(9, 6), random(*shape, 6)
    mask = torch.rand(shape, generator=generator) > 0.2
    labels = torch.randint(-1, 9, shape, generator=generator)
    target_logits = capped(target_hidden @ head.T, cap)
    normalizer = target_logits.logsumexp(-1) + 0.3  # some mass is outside
    weights = LossWeights(0.3, 0.8, 0.5, 3.0, lk)
    logits = hidden @ head.T + (rows @ w2.T if markov else 0.0)
    slow = dspark_loss(
        logits,
        confidence_logits=confidence,
        target_probs=(target_logits - normalizer[..., None]).exp(),
        labels=labels,
        mask=mask,
        weights=weights,
    )
    fast = fused.fused_loss(
        hidden[mask],
        rows[mask] if markov else None,
        markov_w2=w2 if markov else None,
        head=head,
        target=fused.TargetRows(target_hidden[mask], normalizer[mask], labels[mask], cap),
        confidence_logits=confidence[mask],
        slots=torch.arange(4).expand(shape)[mask],
        weights=weights,
        dtype=torch.float32,
    )
    assert bool(slow.lk > 0) == bool(lk)
    for term in ("total", "cross_entropy", "l1", "lk", "confidence"):
        torch.testing.assert_close(getattr(fast, term), getattr(slow, term))
    torch.testing.assert_close(fast.acceptance, slow.acceptance[mask])
    used = leaves if markov else [hidden, confidence]
    expected = torch.autograd.grad(2.0 * slow.total, used)
    torch.testing.assert_close(torch.autograd.grad(2.0 * fast.total, used), expected)


@each_head
def test_a_step_works_on_any_device(config: DraftConfig) -> None:
    """On the meta device, which has no values but refuses to mix with the CPU as CUDA does."""
    meta = torch.device("meta")
    draft = random_draft(config).requires_grad_(True).to(meta)
    tokens = torch.ones(2, 15, dtype=torch.long)
    mask = (torch.arange(15) >= 3).expand(2, -1)
    batch = FeatureBatch(
        *(tokens, mask, torch.zeros(2, 15, config.feature_size), torch.zeros(2, 15, HIDDEN)),
        torch.zeros(2, 15),
    ).to(meta)
    anchors = sample_anchors(mask, 3, torch.Generator().manual_seed(0))
    blocks = anchor_batch(batch, anchors.to(meta), config.block_size)
    hidden = draft.hidden_packed(batch.features, blocks.previous[..., 0], blocks.anchors)
    assert draft.draft_greedy(hidden, blocks.previous[..., 0]).tokens.device == meta
    scores = draft.score(hidden, blocks.previous)
    labels = draft.draft_ids[blocks.labels]
    slow = dspark_loss(
        scores.logits,
        confidence_logits=scores.confidence_logits,
        target_probs=aligned_target_probs(draft, batch, blocks.anchors),
        labels=labels,
        mask=blocks.mask,
        weights=LossWeights(),
    )
    head, num_rows = draft.markov_head, labels.numel()
    markov = None if head is None else head.rows(head.embed(blocks.previous), hidden)
    fast = fused.fused_loss(
        hidden.reshape(num_rows, -1),
        None if markov is None else markov.reshape(num_rows, -1),
        markov_w2=None if head is None else head.markov_w2.weight,
        head=draft.head_weight,
        target=fused.TargetRows(
            torch.zeros(num_rows, HIDDEN, device=meta),
            torch.zeros(num_rows, device=meta),
            labels.flatten(),
        ),
        confidence_logits=None,
        slots=torch.zeros(num_rows, dtype=torch.long, device=meta),
        weights=LossWeights(),
        dtype=torch.float32,
    )
    for terms in (slow, fast):
        draft.zero_grad()
        terms.total.backward(retain_graph=True)
        assert draft.fc.weight.grad.device == meta


def test_anchors_are_valid_distinct_and_sorted() -> None:
    mask = torch.zeros(3, 30, dtype=torch.bool)
    mask[0, 10:25], mask[1, 28:], mask[2, 5] = True, True, True
    generator = torch.Generator().manual_seed(0)
    anchors = sample_anchors(mask, 8, generator)
    valid = valid_anchors(mask)
    for row, wanted in enumerate((8, 1, 0)):
        kept = anchors[row][anchors[row] >= 0].tolist()
        assert len(kept) == wanted
        assert kept == sorted(set(kept))
        assert all(valid[row, position] for position in kept)
    everywhere = sample_anchors(mask, 30, generator)[0]
    assert everywhere[everywhere >= 0].tolist() == list(range(10, 24))


def test_a_place_is_repeated_where_its_last_two_tokens_stood_before() -> None:
    rows = [[7, 8, 7, 8, 8, 8, 3, 7, 8], [1, 2, 1, 3, 2, 1, 2, 2, 1]]
    wanted = [
        [
            p > 0 and any(row[q - 1 : q + 1] == row[p - 1 : p + 1] for q in range(1, p))
            for p in range(9)
        ]
        for row in rows
    ]
    assert sum(wanted[0]) == 3
    assert repeated(torch.tensor(rows)).tolist() == wanted


def test_weights_say_how_likely_an_anchor_is_drawn() -> None:
    mask = torch.ones(4000, 9, dtype=torch.bool)
    weights = torch.where(torch.arange(9) < 4, 0.25, 1.0).expand(4000, -1)
    drawn = sample_anchors(mask, 1, torch.Generator().manual_seed(0), weights=weights)
    shares = drawn.flatten().bincount(minlength=8) / 4000
    torch.testing.assert_close(shares[:4], torch.full((4,), 0.05), atol=0.015, rtol=0)
    torch.testing.assert_close(shares[4:], torch.full((4,), 0.2), atol=0.03, rtol=0)


def test_a_lookup_weight_changes_what_is_trained_on(
    target: Any, sequences: list[TrainingSequence], tmp_path: Path
) -> None:
    source = FeatureSource(HFFeatures(target, (-1, 1)), sequences, max_bytes=1 << 24)
    drawn = {}
    for weight in (1.0, 1e-6):
        options = TrainingOptions(num_steps=1, num_anchors=4, lookup_weight=weight)
        trainer = Trainer(fitted_draft(target), source, options=options, folder=tmp_path)
        batch = source.batch(range(20))
        with pytest.MonkeyPatch.context() as patch:
            seen: list[Any] = []
            patch.setattr(
                "dspark_batch.training.trainer.anchor_batch",
                lambda *given, seen=seen: seen.append(given[1]) or anchor_batch(*given),
            )
            trainer.train_step(batch)
        places = repeated(batch.token_ids).gather(1, seen[0].clamp(min=0)) & (seen[0] >= 0)
        drawn[weight] = int(places.sum())
    assert drawn[1e-6] < drawn[1.0]


def test_blocks_see_the_tokens_after_their_anchor_and_stop_at_the_end() -> None:
    tokens = torch.arange(100, 112)[None]
    mask = (torch.arange(12) >= 4)[None]
    empty = torch.zeros(1, 12, 1)
    batch = FeatureBatch(tokens, mask, empty, empty, empty[..., 0])
    blocks = anchor_batch(batch, torch.tensor([[-1, 4, 9]]), 4)
    assert blocks.previous[0, 1].tolist() == [104, 105, 106, 107]
    assert blocks.labels[0, 1].tolist() == [105, 106, 107, 108]
    assert blocks.mask[0].tolist() == [[False] * 4, [True] * 4, [True, True, False, False]]
    assert blocks.labels[0, 2, :2].tolist() == [110, 111]
    mask[0, 8] = False
    holed = anchor_batch(batch, torch.tensor([[4, 6]]), 4)
    assert holed.mask[0].tolist() == [[True, True, True, False], [True, False, False, False]]


def test_features_are_the_raw_layer_outputs_of_every_row(
    target: Any, sequences: list[TrainingSequence]
) -> None:
    source = FeatureSource(HFFeatures(target, (-1, 1)), sequences, max_bytes=1 << 20)
    batch = source.batch([3, 0, 7])
    for row, index in enumerate((3, 0, 7)):
        sequence = sequences[index]
        length, prompt = len(sequence.token_ids), sequence.num_prompt_tokens
        out = target(torch.tensor([sequence.token_ids]), output_hidden_states=True)
        expected = torch.cat([out.hidden_states[0], out.hidden_states[2]], dim=-1)[0]
        torch.testing.assert_close(batch.features[row, :length], expected, atol=1e-5, rtol=1e-5)
        logits = batch.last_hidden[row, prompt:length] @ target.lm_head.weight.T
        torch.testing.assert_close(logits, out.logits[0, prompt:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            batch.log_normalizer[row, prompt:length],
            out.logits[0, prompt:].logsumexp(-1),
            atol=1e-4,
            rtol=1e-4,
        )
        assert batch.loss_mask[row].nonzero().squeeze(-1).tolist() == list(range(prompt, length))


def test_what_is_held_fits_its_limit_and_changes_no_feature(
    target: Any, sequences: list[TrainingSequence]
) -> None:
    features = HFFeatures(target, (0, 1))
    wide = FeatureSource(features, sequences, max_bytes=1 << 24)
    narrow = FeatureSource(features, sequences, max_bytes=20_000)
    order = [7, 0, 3, *range(8, 20), 5, 6, 1, 2, 4]
    assert wide.chunks(order) == [order]
    chunks = narrow.chunks(order)
    assert [index for chunk in chunks for index in chunk] == order
    assert len(chunks) > 2
    for chunk in chunks:
        assert narrow.hold(chunk)
        expected = sum(narrow.num_bytes(index) for index in chunk)
        assert narrow.num_held_bytes == expected <= 20_000
        first, second = wide.batch(chunk[::-1]), narrow.batch(chunk[::-1])
        torch.testing.assert_close(first.features, second.features, atol=1e-5, rtol=1e-5)
    captured = narrow.num_captured
    assert narrow.hold(chunks[-1][::-1])
    assert narrow.num_captured == captured
    assert not narrow.hold(order, running=lambda: False)
    assert narrow.num_held_bytes == 0
    with pytest.raises(InputError, match="memory_gb"):
        FeatureSource(features, sequences, max_bytes=1000).chunks(order)


def test_target_probs_of_a_reduced_vocabulary_keep_the_full_normaliser(
    target: Any, sequences: list[TrainingSequence]
) -> None:
    vocab = torch.tensor([1, 5, 8, 30])
    embed = target.get_input_embeddings().weight
    config = replace(BASE, draft_vocab_size=4)
    draft = DSparkDraft(config, embed_tokens=embed, lm_head=embed[vocab], draft_vocab=vocab)
    source = FeatureSource(HFFeatures(target, (0,)), sequences, max_bytes=1 << 24)
    batch = source.batch([2])
    anchor = sequences[2].num_prompt_tokens
    got = aligned_target_probs(draft, batch, torch.tensor([[anchor]]))[0, 0, :2]
    probs = target(torch.tensor([sequences[2].token_ids])).logits[0].softmax(-1)
    torch.testing.assert_close(got, probs[anchor : anchor + 2][:, vocab], atol=1e-5, rtol=1e-4)


def test_a_sequence_without_a_response_is_refused() -> None:
    with pytest.raises(InputError):
        TrainingSequence((1, 2, 3), 3)


def test_the_first_context_of_a_new_draft_is_the_targets_own(
    target: Any, sequences: list[TrainingSequence]
) -> None:
    config = replace(
        BASE,
        num_hidden_layers=1,
        target_layer_ids=(0, LAYERS - 2),
        qk_norm=False,
        rms_norm_eps=target.config.rms_norm_eps,
    )
    draft = fitted_draft(target, config)
    ids = torch.tensor([sequences[0].token_ids])
    (features, _), *_ = HFFeatures(target, config.target_layer_ids)(ids.tolist())
    features = features[None]
    positions = torch.arange(ids.shape[1])[None]
    keys, values = draft.layers[0].self_attn.keys_values(
        draft.context(features), draft.rotation(positions)
    )
    cache = target(ids, use_cache=True).past_key_values.layers[LAYERS - 1]
    torch.testing.assert_close(keys.transpose(1, 2), cache.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values.transpose(1, 2), cache.values, atol=1e-4, rtol=1e-4)


def test_a_draft_vocabulary_holds_stop_ids_then_the_most_frequent() -> None:
    counts = torch.tensor([0, 0, 9, 1, 1, 0, 7, 0])
    prompts = torch.tensor([0, 0, 0, 0, 5, 3, 0, 0])
    assert frequent_ids(counts, 4, always=(7,)).tolist() == [2, 3, 6, 7]
    assert frequent_ids(counts, 4, always=(7,), fallback=prompts).tolist() == [2, 4, 6, 7]
    assert frequent_ids(counts, 6, fallback=prompts).tolist() == [0, 2, 3, 4, 5, 6]
    with pytest.raises(EngineError):
        frequent_ids(counts, 9)


@torch.no_grad()
def decode_rounds(target: Any, draft: DSparkDraft, sequence: TrainingSequence) -> list[int]:
    """Committed tokens per round of a real speculative greedy decode to the same length."""
    tokens = list(sequence.token_ids[: sequence.num_prompt_tokens + 1])
    end, cache, committed = len(sequence.token_ids), DraftCache(), []
    while len(tokens) < end:
        anchor = len(tokens) - 1
        out = target(torch.tensor([tokens]), output_hidden_states=True)
        hidden = [out.hidden_states[i + 1] for i in draft.config.target_layer_ids]
        features = torch.cat(hidden, dim=-1)[:, cache.length : anchor]
        block = draft.forward_block(torch.tensor([tokens[-1]]), features, cache)
        assert block.tokens is not None
        drafted = block.tokens[0].tolist()
        choices = target(torch.tensor([tokens + drafted])).logits[0, anchor:].argmax(-1).tolist()
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == choices[accepted]:
            accepted += 1
        new = choices[: accepted + 1][: end - len(tokens)]
        committed.append(len(new))
        tokens += new
    assert tuple(tokens) == sequence.token_ids
    return committed


def test_replay_counts_the_rounds_of_a_real_greedy_decode(
    target: Any, sequences: list[TrainingSequence], tmp_path: Path
) -> None:
    draft = fitted_draft(target)
    source = FeatureSource(HFFeatures(target, (-1, 1)), sequences, max_bytes=1 << 24)
    options = TrainingOptions(num_steps=25, batch_size=8, num_anchors=8, learning_rate=3e-3)
    Trainer(draft, source, options=options, folder=tmp_path).run()
    seen = set()
    for index in range(6):
        committed = decode_rounds(target, draft, sequences[index])
        replay = replay_greedy(draft, source.batch([index]))
        assert replay.num_rounds == len(committed)
        assert replay.num_committed == sum(committed)
        assert replay.confidence_logits is not None
        assert replay.confidence_logits.shape == (replay.num_rounds, BASE.block_size)
        assert [a + 1 for a in replay.accepted.tolist()][:-1] == committed[:-1]
        seen |= set(replay.accepted.tolist())
    assert len(seen) > 2  # the draft is neither useless nor perfect


def test_training_lowers_the_loss_and_raises_accepted_length(
    target: Any, sequences: list[TrainingSequence], tmp_path: Path
) -> None:
    draft = fitted_draft(target)
    taps = HFFeatures(target, (-1, 1))
    source = FeatureSource(taps, sequences[:16], max_bytes=1 << 24)
    held_out = FeatureSource(taps, sequences[16:], max_bytes=1 << 24)
    before, held_before = evaluate(draft, source), evaluate(draft, held_out)
    options = TrainingOptions(
        num_steps=60, batch_size=8, num_anchors=12, learning_rate=3e-3, ema_decay=0.9
    )
    Trainer(draft, source, options=options, folder=tmp_path, held_out=held_out).run()
    after = evaluate(draft, source)
    assert after.loss < 0.7 * before.loss
    assert after.tau_greedy > before.tau_greedy + 0.6
    assert after.tau_probabilistic > before.tau_probabilistic
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["event"] for entry in log] == ["evaluation", *["step"] * 3, "evaluation"]
    assert log[0]["tau_greedy"] == held_before.tau_greedy
    assert log[-1]["tau_greedy"] > held_before.tau_greedy
    embed = draft.embed_weight
    exported = load_draft(tmp_path / "export", embed_tokens=embed, lm_head=embed)
    assert evaluate(exported, held_out).tau_greedy == pytest.approx(log[-1]["tau_greedy"], rel=0.05)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrix products on several threads may add in another order each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("bf16", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.2)])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    target: Any, sequences: list[TrainingSequence], tmp_path: Path, bf16: bool, dropout: float
) -> None:
    taps = HFFeatures(target, (-1, 1))
    options = TrainingOptions(num_steps=9, batch_size=4, num_anchors=4, ema_decay=0.9, bf16=bf16)
    ends = []
    for folder, stops in ((tmp_path / "whole", [None]), (tmp_path / "parts", [2, 7, None])):
        for stop in stops:
            source = FeatureSource(taps, sequences, max_bytes=1 << 24)
            draft = fitted_draft(target, dropout=dropout)
            trainer = Trainer(draft, source, options=options, folder=folder)
            trainer.run(stop_at=stop)
        assert trainer.step == 9
        ends.append((trainer.draft.state_dict(), trainer.average))
    for whole, parts in zip(*ends, strict=True):
        for name, tensor in whole.items():
            assert torch.equal(tensor, parts[name]), name


def test_dropout_acts_in_training_and_not_in_evaluation(
    target: Any, sequences: list[TrainingSequence]
) -> None:
    source = FeatureSource(HFFeatures(target, (-1, 1)), sequences[:4], max_bytes=1 << 24)
    plain, dropped = fitted_draft(target), fitted_draft(target, dropout=0.5)
    assert evaluate(plain, source) == evaluate(dropped, source)
    assert dropped.training
    batch = source.batch([0, 1])
    anchors = torch.tensor([[sequence.num_prompt_tokens] for sequence in sequences[:2]])
    tokens = batch.token_ids.gather(1, anchors)
    first, second = (dropped.hidden_packed(batch.features, tokens, anchors) for _ in range(2))
    assert not torch.allclose(first, second)


def test_an_epoch_visits_every_sequence_in_every_pass_in_an_order_of_its_own(
    target: Any, sequences: list[TrainingSequence], tmp_path: Path
) -> None:
    source = FeatureSource(HFFeatures(target, (-1, 1)), sequences, max_bytes=20_000)
    options = TrainingOptions(num_steps=1, batch_size=3, num_passes=2)
    trainer = Trainer(fitted_draft(target), source, options=options, folder=tmp_path)
    epochs = []
    for epoch in (0, 1, 0):
        chunks = trainer.chunks(epoch)
        assert sorted(i for chunk in chunks for i in chunk) == list(range(len(sequences)))
        batches = [trainer.batches(chunk, epoch) for chunk in chunks]
        for chunk, found in zip(chunks, batches, strict=True):
            assert sorted(i for batch in found for i in batch) == sorted(2 * chunk)
        epochs.append(batches)
    assert epochs[0] == epochs[2] != epochs[1]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    options = TrainingOptions(num_steps=1000, learning_rate=2.0, warmup_share=0.04)
    rates = [learning_rate_at(step / 1000, options) for step in range(1001)]
    assert rates[0] == 0.0
    assert rates[20] == pytest.approx(1.0)
    assert max(rates) == rates[40] == 2.0
    assert rates[520] == pytest.approx(1.0)
    assert rates[1000] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[40:]))


def test_a_run_is_as_long_as_its_steps_or_its_seconds() -> None:
    for wrong in ({}, {"num_steps": 3, "seconds": 3.0}):
        with pytest.raises(ValueError, match="num_steps or seconds"):
            TrainingOptions(**wrong)


def test_a_run_by_the_clock_counts_the_time_before_a_restart(
    target: Any, sequences: list[TrainingSequence], tmp_path: Path
) -> None:
    options = TrainingOptions(seconds=3600.0, batch_size=2, num_anchors=4)

    def trainer() -> Trainer:
        source = FeatureSource(HFFeatures(target, (-1, 1)), sequences, max_bytes=1 << 24)
        return Trainer(fitted_draft(target), source, options=options, folder=tmp_path)

    first = trainer()
    first.run(stop_at=2)
    spent = first.seconds
    assert 0.0 < spent < 3600.0
    second = trainer()
    second.run(stop_at=3)
    assert second.step == 3
    assert second.seconds > spent
    assert second.progress == pytest.approx(second.seconds / 3600.0, abs=1e-3)

"""Layouts of draft checkpoints, as their makers write them; what is not understood is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from draft_graph import build_draft
from safetensors.numpy import load_file, save_file
from slow_draft import SlowDraft
from test_conformance_variants import assert_same_rounds, slow_twin
from test_gemma4 import BASE, write_gemma4
from tiny import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    ROPE,
    VOCAB,
    draft_config,
    export_pair,
    smoothing_factors,
    target_config,
    write_draft,
    write_target,
)

from dspark_batch.decode.loop import DecodeStats, decode
from dspark_batch.decode.types import Prompt, SamplingParams
from dspark_batch.drafters.layouts import draft_spec
from dspark_batch.engine.engine import open_engine
from dspark_batch.errors import EngineError
from dspark_batch.models.families.table import decoder_spec
from dspark_batch.models.smoothing import Smoothing
from dspark_batch.models.weights import open_weights

REDUCED = np.array([1, 2, 5, 7, 11, 12, 20, 28, 33, 39])
TABLES = ("embed_tokens.weight", "lm_head.weight")
Config = dict[str, Any]


def read(folder: Path) -> tuple[Config, dict[str, np.ndarray]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder: Path, config: Config, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def shard(folder: Path, num_files: int) -> None:
    """Cut the checkpoint into files with an index, in bfloat16, as `save_pretrained` does."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for number in range(num_files):
        file = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = names[number::num_files]
        where |= dict.fromkeys(part, file)
        save_torch({n: torch.tensor(tensors[n]).to(torch.bfloat16) for n in part}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rounded(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(ml_dtypes.bfloat16).astype(np.float32)


def with_tables(draft: Path, target: Path) -> None:
    """DeepSpec stores both tables, copies of the target's."""
    config, tensors = read(draft)
    theirs = load_file(target / "model.safetensors")
    embed = theirs["model.embed_tokens.weight"]
    tables = (embed, theirs.get("lm_head.weight", embed))
    write(draft, config, tensors | dict(zip(TABLES, tables, strict=True)))


def stored_in(graph: Path) -> dict[str, str]:
    """File of every weight of a graph."""
    model = onnx.load(graph, load_external_data=False)
    return {
        weight.name: {e.key: e.value for e in weight.external_data}["location"]
        for weight in model.graph.initializer
        if weight.external_data
    }


# DeepSpec -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_deepspec_s_files_load_as_they_are_saved(tied: bool, tmp_path: Path) -> None:
    """Sharded bfloat16 with an index, rope_parameters nested, both tables stored and shared."""
    target = write_target(tmp_path / "target", target_config("qwen3", tie_word_embeddings=tied))
    config, tensors = read(target)
    write(target, config, {name: rounded(tensor) for name, tensor in tensors.items()})
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "dtype": "bfloat16"}
    draft = write_draft(tmp_path / "draft", draft_config(**changes))
    with_tables(draft, target)
    config, tensors = read(draft)
    tables = load_file(target / "model.safetensors")
    embed = tables["model.embed_tokens.weight"]
    slow = SlowDraft(
        config,
        {name: rounded(tensor) for name, tensor in tensors.items() if name not in TABLES},
        embed=embed,
        head=tables.get("lm_head.weight", embed),
    )
    shard(draft, 3)
    graph = build_draft(tmp_path / "graph", target, draft)
    assert_same_rounds(graph, slow)
    files = stored_in(graph.path)
    assert files.pop("embed_tokens") == files.pop("lm_head") == "target.onnx.data"
    assert set(files.values()) == {"draft.onnx.data"}


def test_tables_that_differ_are_the_draft_s_own(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config())
    with_tables(draft, target)
    config, tensors = read(draft)
    for name in TABLES:
        tensors[name][3, 5] += 1
    write(draft, config, tensors)
    own = {name: tensors.pop(name) for name in TABLES}
    slow = SlowDraft(config, tensors, embed=own[TABLES[0]], head=own[TABLES[1]])
    graph = build_draft(tmp_path / "graph", target, draft)
    assert_same_rounds(graph, slow)
    files = stored_in(graph.path)
    assert {files["embed_tokens"], files["lm_head"]} == {"draft.onnx.data"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_smoothed_int8_head_is_shared(tied: bool, tmp_path: Path) -> None:
    """The target's int8 head wants its input divided; one that is the draft's own does not."""
    target = write_target(tmp_path / "target", target_config("llama", tie_word_embeddings=tied))
    draft = write_draft(tmp_path / "draft", draft_config())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, 20).tolist() for _ in range(2)]
    with open_weights(target) as weights:
        factors = smoothing_factors(decoder_spec(weights.config), weights.tensor, prompts)
    assert np.ptp(factors["lm_head"]) > 0.5
    shared = build_draft(
        tmp_path / "shared", target, draft, precision="int8", smoothing=Smoothing(factors)
    )
    files = stored_in(shared.path)
    assert files["lm_head"] == files["lm_head.scale"] == "target.onnx.data"
    exact = slow_twin(target, draft)
    features = rng.standard_normal((9, shared.num_features)).astype(np.float32)
    _, logits, _ = shared([features], [3])
    wanted = exact(features, 3)[1]
    # The first slot's logits do not hang on a token that int8 may have drawn differently.
    error = np.linalg.norm(logits[0, 0] - wanted[0]) / np.linalg.norm(wanted[0])
    assert error < 0.1


# Gemma 4 ------------------------------------------------------------------------------------------

GEMMA_DRAFT: Config = {
    "architectures": ["Gemma4DSparkModel"],
    "model_type": "gemma4_text",
    "target_model_type": "gemma4",
    "target_text_model_type": "gemma4_text",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_target_layers": BASE["num_hidden_layers"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_global_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "attention_bias": False,
    "enable_moe_block": False,
    "final_logit_softcapping": 5.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "layer_types": ["full_attention"] * 2,
    "sliding_window": 6,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
        "sliding_attention": dict(ROPE),
    },
    "tie_word_embeddings": False,
    "block_size": 4,
    "mask_token_id": VOCAB - 1,
    "target_layer_ids": [0, 2, 4],
    "num_anchors": 8,
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "markov_rank": 6,
    "markov_head_type": "vanilla",
}


def write_gemma_draft(folder: Path, *, seed: int = 1, **changes: Any) -> Path:
    """The published tensors: four norms and a scalar per layer, v_proj only with its own values."""
    config = GEMMA_DRAFT | changes
    rng = np.random.default_rng(seed)
    size = config["global_head_dim"]
    own_values = not config["attention_k_eq_v"]
    kv = size * config["num_key_value_heads" if own_values else "num_global_key_value_heads"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    def norm(length: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, length).astype(np.float32)

    tensors = {
        "fc.weight": matrix(HIDDEN, HIDDEN * len(config["target_layer_ids"])),
        "hidden_norm.weight": norm(HIDDEN),
        "norm.weight": norm(HIDDEN) * 3,
        "markov_head.markov_w1.weight": matrix(VOCAB, 6) * 2,
        "markov_head.markov_w2.weight": matrix(VOCAB, 6) * 2,
        "confidence_head.proj.weight": matrix(1, HIDDEN + 6),
        "confidence_head.proj.bias": matrix(1, 1)[0],
    }
    for i in range(config["num_hidden_layers"]):
        name = f"layers.{i}"
        for n in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            tensors[f"{name}.{n}_layernorm.weight"] = norm(HIDDEN)
        tensors[f"{name}.layer_scalar"] = norm(1)
        tensors[f"{name}.self_attn.q_proj.weight"] = matrix(HEADS * size, HIDDEN)
        tensors[f"{name}.self_attn.k_proj.weight"] = matrix(kv, HIDDEN)
        tensors[f"{name}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * size)
        if own_values:
            tensors[f"{name}.self_attn.v_proj.weight"] = matrix(kv, HIDDEN)
        for part in "qk":
            tensors[f"{name}.self_attn.{part}_norm.weight"] = norm(size)
        for part in ("gate", "up"):
            tensors[f"{name}.mlp.{part}_proj.weight"] = matrix(FFN, HIDDEN)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(HIDDEN, FFN)
    return write(folder, config, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_k_eq_v": False},
        {"final_logit_softcapping": None},
        {"markov_head_type": "vanilla", "block_size": 7, "target_layer_ids": [-1, 5]},
    ],
    ids=["published", "own-values", "no-cap", "block-7"],
)
def test_a_gemma4_draft_drafts_as_the_definition_says(changes: Config, tmp_path: Path) -> None:
    write_gemma4(tmp_path / "target")
    draft = write_gemma_draft(tmp_path / "draft", **changes)
    graph = build_draft(tmp_path / "graph", tmp_path / "target", draft)
    slow = slow_twin(tmp_path / "target", draft)
    assert_same_rounds(graph, slow)


def test_the_cap_is_put_on_before_the_markov_bias(tmp_path: Path) -> None:
    """Logits beyond the cap can come from the bias only."""
    write_gemma4(tmp_path / "target")
    draft = write_gemma_draft(tmp_path / "draft", final_logit_softcapping=0.5)
    graph = build_draft(tmp_path / "graph", tmp_path / "target", draft)
    tensors = load_file(draft / "model.safetensors")
    w1, w2 = (tensors[f"markov_head.markov_w{i}.weight"] for i in (1, 2))
    tokens, logits, _ = graph([np.ones((3, graph.num_features), np.float32)], [7])
    base = logits[0] - w1[[7, *tokens[0, :-1]]] @ w2.T
    assert np.abs(base).max() <= 0.5 + 1e-5 < np.abs(logits).max()


def test_heads_by_layer_are_read_in_a_draft_too(tmp_path: Path) -> None:
    """As transformers 5.23 writes the same config."""
    draft = write_gemma_draft(tmp_path / "draft")
    config, tensors = read(draft)
    newer = dict(config)
    del newer["global_head_dim"], newer["num_global_key_value_heads"]
    newer["per_layer_config"] = {str(i): {"head_dim": 16, "num_key_value_heads": 1} for i in (0, 1)}
    other = write(tmp_path / "newer", newer, tensors)
    with open_weights(draft) as one, open_weights(other) as two:
        assert draft_spec(one) == draft_spec(two)


def test_decoding_with_a_gemma4_pair_is_lossless(tmp_path: Path) -> None:
    """Speculative text is plain text, in the recipe's whole way, with tables stored and sharded."""
    write_gemma4(tmp_path / "target", seed=3)
    draft = write_gemma_draft(tmp_path / "draft")
    # A draft that knows something: the Markov head alone repeats what the target's table suggests.
    with_tables(draft, tmp_path / "target")
    shard(draft, 2)
    engine = open_engine(export_pair(tmp_path, tmp_path / "target", draft))
    assert engine.manifest.draft is not None
    assert engine.manifest.draft.cache is not None
    assert engine.manifest.draft.cache.cache_shapes == ((1, 16), (1, 16))
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, VOCAB - 1, n).tolist() for n in (3, 30, 6, 17, 25)]
    found = {}
    for spec in ("off", "on"):
        prompts = [
            Prompt(r, tuple(t), SamplingParams(max_new_tokens=30)) for r, t in enumerate(texts)
        ]
        stats = DecodeStats()
        done = decode(prompts, engine, spec=spec, stats=stats)
        found[spec] = {c.row: c.token_ids for c in done}
    assert stats.spec.num_verified_tokens > 50
    assert found["on"] == found["off"]
    engine.close()


# Others -------------------------------------------------------------------------------------------


def speculators(config: Config) -> Config:
    """The same draft as vLLM's speculators writes it."""
    inner = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    inner += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    inner += ("rope_parameters", "vocab_size", "layer_types")
    kept = ("block_size", "mask_token_id", "markov_rank", "markov_head_type")
    kept += ("enable_confidence_head", "confidence_head_with_markov")
    return {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "speculators_config": {"algorithm": "dspark", "proposal_methods": []},
        "transformer_layer_config": {"model_type": "qwen3"} | {key: config[key] for key in inner},
        "aux_hidden_state_layer_ids": [i + 1 for i in config["target_layer_ids"]],
        "draft_vocab_size": config.get("draft_vocab_size", config["vocab_size"]),
        "sample_from_anchor": True,
        "target_hidden_size": None,
        "dtype": "float32",
    } | {key: config[key] for key in kept}


def specforge(config: Config) -> Config:
    """The same draft as SpecForge writes it."""
    nested = ("mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")
    nested += ("enable_confidence_head", "confidence_head_with_markov")
    flat = {key: value for key, value in config.items() if key not in nested}
    rope = flat.pop("rope_parameters")
    return flat | {
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "use_sliding_window": False,
        "attention_bias": False,
        "dflash_config": {key: config[key] for key in nested}
        | {"projector_type": "dspark", "attention_mode": "gqa", "confidence_head_alpha": 1.0},
    }


@pytest.mark.parametrize("layout", [speculators, specforge])
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
@pytest.mark.parametrize("vocab", [None, REDUCED], ids=["whole", "reduced"])
def test_the_same_draft_in_another_layout_is_the_same_graph(
    layout: Callable[[Config], Config], head: str, vocab: Any, tmp_path: Path
) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    config = draft_config(markov_head_type=head, target_layer_ids=[-1, 1])
    draft = write_draft(tmp_path / "draft", config, draft_vocab=vocab)
    config, tensors = read(draft)
    if layout is speculators:
        mapped = np.arange(VOCAB) if vocab is None else vocab
        tensors["t2d"] = np.isin(np.arange(VOCAB), mapped)
        tensors["verifier_norm.weight"] = np.ones(HIDDEN, np.float32)
        with_head = load_file(target / "model.safetensors")["lm_head.weight"][mapped]
        tensors["lm_head.weight"] = with_head
    other = write(tmp_path / "other", layout(config), tensors)
    graphs = [
        build_draft(tmp_path / name, target, source)
        for name, source in (("one", draft), ("two", other))
    ]
    with open_weights(draft) as one, open_weights(other) as two:
        assert draft_spec(one) == draft_spec(two)
    rng = np.random.default_rng(0)
    context = [rng.standard_normal((5, graphs[0].num_features)).astype(np.float32)] * 2
    for one, two in zip(*(graph(context, [3, 8]) for graph in graphs), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_block_whose_anchor_predicts_nothing_drafts_one_token_fewer(tmp_path: Path) -> None:
    """speculators says so in a key, and before it had that, by the number of tokens."""
    config, tensors = read(write_draft(tmp_path / "draft", draft_config()))
    said = speculators(config) | {"sample_from_anchor": False}
    counted = speculators(config) | {
        "speculators_config": {"proposal_methods": [{"speculative_tokens": 3}]},
        "sample_from_anchor": None,
    }
    four = speculators(config) | {
        "speculators_config": {"proposal_methods": [{"speculative_tokens": 4}]},
        "sample_from_anchor": None,
    }
    specs = []
    for name, other in (("said", said), ("counted", counted), ("four", four)):
        with open_weights(write(tmp_path / name, other, tensors)) as weights:
            specs.append(draft_spec(weights))
    assert specs[0] == specs[1]
    assert (specs[0].block_size, specs[0].num_slots, specs[0].anchor_drafts) == (3, 4, False)
    assert (specs[2].block_size, specs[2].num_slots, specs[2].anchor_drafts) == (4, 4, True)


def test_decoding_is_lossless_with_an_anchor_that_predicts_nothing(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config(sample_from_anchor=False))
    engine = open_engine(export_pair(tmp_path, target, draft))
    assert engine.block_size == 3
    texts = {}
    for spec in ("off", "on"):
        stats = DecodeStats()
        prompts = [Prompt(r, (r + 1, 2, 3), SamplingParams(max_new_tokens=20)) for r in range(4)]
        texts[spec] = {c.row: c.token_ids for c in decode(prompts, engine, spec=spec, stats=stats)}
    assert stats.spec.num_verified_tokens > 20
    assert texts["on"] == texts["off"]
    engine.close()


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_a_trained_draft_is_served_on_the_embeddings_it_was_trained_on(
    family: str, tmp_path: Path
) -> None:
    """Gemma scales its embedding; a draft of ours says so, one of DeepSpec's would not."""
    torch = pytest.importorskip("torch")
    from dspark_batch.drafters import config as configs
    from dspark_batch.training import geometry

    network = pytest.importorskip("dspark_batch.training.draft")
    checkpoint = pytest.importorskip("dspark_batch.training.checkpoint")
    tables = pytest.importorskip("dspark_batch.training.target").TargetTables
    target = write_target(tmp_path / "target", target_config(family))
    with open_weights(target) as weights:
        shared = tables.from_weights(weights)
        config = geometry.draft_config_from_target(
            weights.config,
            num_layers=1,
            block_size=3,
            markov_rank=4,
            mask_token_id=5,
            target_layer_ids=(0, 1),
            embedding_scale=shared.spec.embedding_scale,
        )
    torch.manual_seed(0)
    model = network.DSparkDraft(config, embed_tokens=shared.embed, lm_head=shared.head).eval()
    checkpoint.save_draft(model, tmp_path / "draft", dtype=torch.float32)
    saved = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert saved.get("embedding_scale", 1.0) == shared.spec.embedding_scale
    assert configs.config_from_json(tmp_path / "draft" / "config.json") == config
    graph = build_draft(tmp_path / "graph", target, tmp_path / "draft")
    features = np.random.default_rng(0).standard_normal((6, 2 * HIDDEN)).astype(np.float32)
    tokens, logits, _ = graph([features], [3])
    with torch.no_grad():
        wanted = model.forward_block(
            torch.tensor([3]), torch.tensor(features)[None], network.DraftCache()
        )
    np.testing.assert_array_equal(tokens, wanted.tokens.numpy())
    np.testing.assert_allclose(logits, wanted.logits.numpy(), atol=1e-4, rtol=1e-4)


# Refusals -----------------------------------------------------------------------------------------


def nest(**changes: Any) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        config = specforge(config)
        return config | {"dflash_config": config["dflash_config"] | changes}

    return change


def inner(**changes: Any) -> Callable[[Config], Config]:
    def change(config: Config) -> Config:
        config = speculators(config)
        layers = config["transformer_layer_config"] | changes
        return config | {"transformer_layer_config": layers}

    return change


def flat(**changes: Any) -> Callable[[Config], Config]:
    return lambda config: config | changes


REFUSED: dict[str, tuple[Callable[[Config], Config], str]] = {
    "unknown-layout": (
        flat(architectures=["LlamaForCausalLMEagle3"]),
        "'LlamaForCausalLMEagle3'.*known: Qwen3DSparkModel, Gemma4DSparkModel, DSparkDraftModel, "
        "speculators_model_type dspark",
    ),
    "no-layout": (flat(architectures=None), "'none'.*known: Qwen3DSparkModel"),
    "other-speculator": (flat(speculators_model_type="eagle3"), "'eagle3'.*known: dspark"),
    "attention-bias": (flat(attention_bias=True), "attention_bias True"),
    "sliding": (flat(layer_types=["sliding_attention"] * 2), "layer_types .*sliding_attention"),
    "use-sliding-window": (flat(use_sliding_window=True), "use_sliding_window|layer_types"),
    "causal-block": (flat(is_causal=True), "is_causal True"),
    "quantized": (flat(quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "activation": (flat(hidden_act="gelu"), "'gelu'"),
    "rope": (flat(rope_parameters=dict(ROPE) | {"partial_rotary_factor": 0.5}), "partial_rotary"),
    "no-map": (flat(draft_vocab_size=10), "draft_vocab_size 10, but no d2t"),
    "no-dflash-config": (flat(architectures=["DSparkDraftModel"]), "lacks 'dflash_config'"),
    "specforge-mla": (nest(attention_mode="mla"), "attention_mode 'mla'"),
    "specforge-domino": (nest(projector_type="domino"), "projector_type 'domino'"),
    "specforge-causal": (nest(causal=True), "causal True"),
    "specforge-no-rank": (
        lambda c: (
            specforge(c)
            | {
                "dflash_config": {
                    k: v for k, v in specforge(c)["dflash_config"].items() if k[:2] != "ma"
                }
            }
        ),
        "lacks 'markov_rank'",
    ),
    "speculators-sliding": (
        inner(layer_types=["sliding_attention"] * 2, sliding_window=8),
        "layer_types",
    ),
    "speculators-sparse": (lambda c: speculators(c) | {"topk_context": 64}, "topk_context 64"),
    "speculators-ids-unshifted": (
        lambda c: speculators(c) | {"aux_hidden_state_layer_ids": [0, LAYERS + 1]},
        rf"\[-1, {LAYERS}\].*-1..{LAYERS - 1}",
    ),
    "speculators-unsaid": (
        lambda c: speculators(c) | {"sample_from_anchor": None},
        "sample_from_anchor is not given",
    ),
    "more-layers-than-told": (flat(num_hidden_layers=1), r"layers\.1\..* and \d+ more"),
    "fewer-layers-than-told": (flat(num_hidden_layers=3), r"lacks the weights layers\.2\."),
    "a-head-that-is-not-told": (
        flat(markov_rank=0, confidence_head_with_markov=False),
        "does not account for markov_head",
    ),
    "taps-of-another-width": (flat(target_layer_ids=[0, 1, 2]), "32 x 64.*3 target_layer_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_cost_acceptance_silently_is_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    target = write_target(tmp_path / "target", target_config("llama"))
    config, tensors = read(write_draft(tmp_path / "draft", draft_config()))
    draft = write(tmp_path / "draft", change(config), tensors)
    with pytest.raises(EngineError, match=f"(?s){message}"):
        build_draft(tmp_path / "graph", target, draft)


EXTRA = {
    "attention-sinks": "layers.0.self_attn.sinks",
    "bias": "layers.0.self_attn.q_proj.bias",
    "adapter": "draft_adapter.0.weight",
    "values-of-a-gemma": "layers.0.layer_scalar",
}


@pytest.mark.parametrize("name", EXTRA)
def test_a_tensor_that_no_graph_uses_is_refused(name: str, tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    config, tensors = read(write_draft(tmp_path / "draft", draft_config()))
    tensors[EXTRA[name]] = np.ones(4, np.float32)
    draft = write(tmp_path / "draft", config, tensors)
    with pytest.raises(EngineError, match=f"does not account for {EXTRA[name]}"):
        build_draft(tmp_path / "graph", target, draft)


def test_maps_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target", target_config("llama"))
    draft = write_draft(tmp_path / "draft", draft_config(), draft_vocab=REDUCED)
    config, tensors = read(draft)
    shutil.copytree(draft, tmp_path / "size")
    write(tmp_path / "size", config | {"draft_vocab_size": 12}, tensors)
    with pytest.raises(EngineError, match="draft_vocab_size 12, but a d2t of 10"):
        build_draft(tmp_path / "graph", target, tmp_path / "size")
    tensors["t2d"] = np.arange(VOCAB) < 10
    write(draft, config, tensors)
    with pytest.raises(EngineError, match="t2d and d2t"):
        build_draft(tmp_path / "graph", target, draft)

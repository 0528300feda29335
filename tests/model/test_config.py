"""config.json in every spelling: the same facts, or one clear error."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from kangaroo.errors import CheckpointError
from kangaroo.model.config import FAMILIES, ModelConfig, RopeSettings
from tests.model.checkpoints import CASES, LLAMA3_ROPE
from tests.tiny import tiny_config, tiny_raw_config

OPTIONAL = ("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "hidden_activation", "sliding_window",
            "tie_word_embeddings", "rope_theta", "query_pre_attn_scalar", "attn_logit_softcapping",
            "final_logit_softcapping")  # fmt: skip
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings")  # fmt: skip
plain_values = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5)
json_values = plain_values | st.lists(plain_values, max_size=5) | st.dictionaries(st.text(), plain_values, max_size=2)
CHANGEABLE = (*REQUIRED, *OPTIONAL, "rope_scaling", "rope_parameters", "layer_types", "attention_bias",
              "use_sliding_window", "max_window_layers")  # fmt: skip


def without(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


@pytest.mark.parametrize("case", CASES)
def test_both_rope_spellings_give_the_same_config(case: str) -> None:
    family, overrides, _ = CASES[case]
    raw = tiny_raw_config(family, **overrides)
    scaling = raw.get("rope_scaling") or {"rope_type": "default"}
    renamed = {"rope_type": scaling.get("rope_type", scaling.get("type")), **without(scaling, "type")}
    spelled = without(raw, "rope_theta", "rope_scaling") | {
        "rope_parameters": renamed | {"rope_theta": raw["rope_theta"]}
    }
    assert ModelConfig.from_dict(spelled) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(family: str, tmp_path: Path) -> None:
    raw = without(tiny_raw_config(family, num_attention_heads=64, hidden_size=512), *OPTIONAL)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    assert ModelConfig.from_dict(raw) == ModelConfig.from_folder(tmp_path / "full")


def test_llama3_rope() -> None:
    config = tiny_config(rope_scaling=LLAMA3_ROPE, rope_theta=5000.0)
    assert config.rope == RopeSettings(5000.0, "llama3", 4.0, 1.0, 4.0, 100)


def test_windows_per_layer() -> None:
    assert tiny_config("gemma2").windows == (6, None, 6, None)
    assert tiny_config("mistral").windows == (6,) * 4
    assert tiny_config("mistral", sliding_window=None).windows == (None,) * 4
    assert tiny_config("qwen2", sliding_window=6).windows == (None,) * 4
    window = {"sliding_window": 6, "use_sliding_window": True}
    assert tiny_config("qwen3", **window, max_window_layers=3).windows == (None, None, None, 6)
    assert tiny_config("llama", **window).windows == (None,) * 4


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", None, 7, ["llama"]])
def test_unknown_architecture(model_type: object) -> None:
    with pytest.raises(CheckpointError, match="model_type must be one of llama, mistral, qwen2, qwen3, gemma2"):
        ModelConfig.from_dict({"model_type": model_type})


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope_type", ["dynamic", "yarn", "longrope", None])
def test_unsupported_rope_is_refused(spelling: str, rope_type: str | None) -> None:
    with pytest.raises(CheckpointError, match="rope_type must be one of default, linear, llama3, got") as caught:
        tiny_config(**{spelling: {"rope_type": rope_type, "factor": 2.0}})
    assert ("changes earlier positions" in str(caught.value)) == (rope_type == "dynamic")


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {name}: Field required"):
        ModelConfig.from_dict(without(tiny_raw_config(), name))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": "many"}, "vocab_size: .*got 'many'"),
        ({"hidden_size": 0}, "hidden_size: .*greater than 0, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads: .*greater than 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads: .*greater than 0"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 2}, "head_dim must be even"),
        ({"sliding_window": 0}, "sliding_window: .*greater than 0"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu, gelu_pytorch_tanh, got 'relu'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: .*finite"),
        ({"rope_scaling": {"type": "linear"}}, "linear rope settings lack a number: 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope settings must be finite and above 0"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": "four"}}, "llama3 rope settings lack a number"),
        ({"rope_theta": -1.0}, "rope settings must be finite and above 0"),
        ({"rope_scaling": 3}, "rope settings must be one flat object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope settings must be one flat object"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints are unsupported"),
    ],
)
def test_bad_values_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        tiny_config(**overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer_types", [["full_attention"] * 3, ["chunked_attention"] * 4])
def test_bad_layer_types_are_refused(layer_types: list[str]) -> None:
    with pytest.raises(CheckpointError, match="layer_types must name 4 layers"):
        tiny_config("qwen2", sliding_window=6, use_sliding_window=True, layer_types=layer_types)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{'model_type': 1}", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"", "not readable JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
)
def test_files_that_hold_no_config(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_folder(tmp_path)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ModelConfig.from_folder(tmp_path)


@given(
    family=st.sampled_from(FAMILIES),
    changes=st.dictionaries(st.sampled_from(CHANGEABLE), json_values, max_size=3),
    rope=st.none() | st.dictionaries(st.sampled_from([*LLAMA3_ROPE, "rope_theta"]), json_values, min_size=1),
    rope_type=st.sampled_from(["default", "linear", "llama3"]),
)
def test_any_config_is_accepted_whole_or_refused(
    family: str, changes: dict[str, Any], rope: dict[str, Any] | None, rope_type: str
) -> None:
    raw = tiny_raw_config(family, **changes)
    if rope is not None:
        raw["rope_scaling"] = rope | {"rope_type": rope_type}
    try:
        config = ModelConfig.from_dict(raw)
    except CheckpointError:
        return
    assert len(config.windows) == config.num_layers
    assert config.num_heads % config.num_kv_heads == 0
    assert config.head_dim % 2 == 0
    assert all(window is None or window > 0 for window in config.windows)
    assert isinstance(config.attention_scale, float)
    assert config.rope.theta > 0
    hash(config)

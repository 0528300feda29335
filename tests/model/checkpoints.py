"""Random checkpoints of every family, written by transformers, with the logits it computes for them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tiny_raw_config

NUM_TOKENS = 24
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}
# Family, config.json fields in the spelling of transformers 4, and the settings that must show in the logits.
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("llama", {}, ()),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope",)),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5000.0}, ("rope",)),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, ()),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, ()),
    "llama-mha": ("llama", {"num_key_value_heads": None}, ()),
    "llama-head-dim": ("llama", {"head_dim": 12}, ()),
    "mistral-window": ("mistral", {"sliding_window": 6}, ("windows",)),
    "mistral-full": ("mistral", {"sliding_window": None}, ()),
    "qwen2": ("qwen2", {"sliding_window": 6, "use_sliding_window": False, "max_window_layers": 2}, ()),
    "qwen2-window": ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}, ("windows",)),
    "qwen2-layer-types": (
        "qwen2",
        {
            "sliding_window": 6,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        },
        ("windows",),
    ),
    "qwen3": ("qwen3", {}, ()),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "rope_theta": 1000000.0}, ("rope",)),
    "gemma2": (
        "gemma2",
        {},
        ("windows", "attention_softcap", "logits_softcap", "attention_scale", "embedding_scale"),
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """raw: the config.json it was made from; folder: as saved; tokens [2, T]; logits [2, T, V]."""

    raw: dict[str, Any]
    folder: Path
    tokens: Tensor
    logits: Tensor
    settings: tuple[str, ...]


def write_checkpoint(name: str, folder: Path, *, max_shard_size: str = "1GB") -> Checkpoint:
    """Save a random checkpoint of one of CASES into a new folder."""
    family, overrides, settings = CASES[name]
    raw = tiny_raw_config(family, **overrides)
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    offset = 0.0 if family == "gemma2" else 1.0
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = 0.35 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + offset if parameter_name.endswith("norm.weight") else noise)
        tokens = torch.randint(config.vocab_size, (2, NUM_TOKENS), generator=generator)
        logits = model(tokens, use_cache=False).logits
    model.save_pretrained(folder / "saved", max_shard_size=max_shard_size)
    return Checkpoint(raw, folder / "saved", tokens, logits, settings)


def reference_logits(folder: Path, tokens: Tensor) -> Tensor:
    """What transformers computes for a checkpoint folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits

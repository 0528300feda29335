"""Tiny models and tokenizers with random weights, shared by the tests."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors

from kangaroo.drafters.adapter import Adapter, Kind
from kangaroo.model.config import ModelConfig
from kangaroo.model.transformer import Transformer
from kangaroo.model.weights import assemble, expected_shapes

BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB_SIZE = 258  # 256 bytes, then BOS and EOS

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gemma2": {
        "head_dim": 12,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 10,
        "sliding_window": 6,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}


def tiny_raw_config(family: str = "llama", **overrides: Any) -> dict[str, Any]:
    """The config.json content of a tiny model; overrides are config.json fields."""
    return {"model_type": family} | _COMMON | _SPECIFIC[family] | overrides


def tiny_config(family: str = "llama", **overrides: Any) -> ModelConfig:
    """A tiny model's configuration; overrides are config.json fields, such as num_hidden_layers."""
    return ModelConfig.from_dict(tiny_raw_config(family, **overrides))


def tiny_transformer(config: ModelConfig, seed: int = 0) -> Transformer:
    """A float32 model whose random weights are large enough for every setting to show in its logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = name.endswith("norm.weight")
        tensors[name] = 1 - config.norm_offset + 0.3 * noise if is_norm else 0.3 * noise
    return assemble(tensors, config, storage="float32", device=torch.device("cpu"))


def tame_transformer(family: str, exit_layer: int) -> Transformer:
    """A model whose layers from exit_layer on change little, so that guesses made there are right about half the time.

    Its head is untied: a tied one would make a tame model repeat its last token.
    """
    target = tiny_transformer(tiny_config(family, tie_word_embeddings=False), seed=3)
    for layer in target.layers[exit_layer:]:
        if layer.post_attention_norm is not None and layer.post_mlp_norm is not None:
            layer.post_attention_norm *= 0.15
            layer.post_mlp_norm *= 0.15
        else:
            layer.output *= 0.15
            layer.down *= 0.15
    return target


def noisy_adapter(target: Transformer, exit_layer: int, *, kind: Kind = "attention", noise: float,
                  seed: int = 2) -> Adapter:  # fmt: skip
    """A new adapter with so much noise in the matrices that make it differ from the early exit itself."""
    adapter = Adapter.initialize(target, exit_layer, kind=kind)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in adapter.tensors.items():
        if name in ("output", "down", "head"):
            adapter.tensors[name] = tensor + noise * torch.randn(tensor.shape, generator=generator)
    return adapter


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte, with a BOS that encoding adds and an EOS."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 256)])
    backend.post_processor = template
    return backend


def save_tiny_tokenizer(folder: Path) -> None:
    """Write the tiny tokenizer's tokenizer.json into an existing folder."""
    tiny_tokenizer().save(str(folder / "tokenizer.json"))


def chain_parents(num_nodes: int) -> tuple[int, ...]:
    """The parents of a draft without branches."""
    return tuple(range(-1, num_nodes - 1))

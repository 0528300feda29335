"""The demo target: a deep and thin Llama, its shape, its fresh weights and its loss."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kangaroo.model.config import ModelConfig
from kangaroo.model.transformer import FullSequencePass, Layer, Transformer

CONTEXT = 4096


@dataclass(frozen=True)
class Plan:
    """What to train, on what, for how long."""

    corpus: str
    output: str
    minutes: float
    num_processes: int
    batch_tokens: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    muon_lr: float
    adam_lr: float
    seed: int
    device: str


def hf_config(plan: Plan, vocab_size: int) -> dict[str, object]:
    """The config.json of the model in Hugging Face's spelling."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": plan.hidden_size,
        "intermediate_size": plan.intermediate_size,
        "num_hidden_layers": plan.num_layers,
        "num_attention_heads": plan.num_heads,
        "num_key_value_heads": plan.num_heads,
        "head_dim": plan.hidden_size // plan.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": CONTEXT,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def build_model(plan: Plan, vocab_size: int) -> Transformer:
    """A freshly initialised Llama; projections into the residual stream start smaller with depth."""
    config = ModelConfig.from_dict(hf_config(plan, vocab_size))
    generator = torch.Generator().manual_seed(plan.seed)
    size, inner = config.hidden_size, config.num_heads * config.head_dim

    def weight(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) * (scale * 0.4 / math.sqrt(columns))
        return values.to(plan.device).requires_grad_()

    def norm() -> Tensor:
        return torch.ones(size, device=plan.device, requires_grad=True)

    residual = 1 / math.sqrt(2 * config.num_layers)
    layers = [
        Layer(
            input_norm=norm(),
            qkv=weight(3 * inner, size),
            output=weight(size, inner, residual),
            mlp_norm=norm(),
            gate_up=weight(2 * config.intermediate_size, size),
            down=weight(size, config.intermediate_size, residual),
        )
        for _ in range(config.num_layers)
    ]
    embedding = weight(vocab_size, size, 0.5)
    return Transformer(config, layers, embedding=embedding, final_norm=norm(), head=embedding)


def loss_of(model: Transformer, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over tokens [B, T + 1]."""
    attention = FullSequencePass(model.config, tokens.shape[1] - 1, device=tokens.device)
    with torch.autocast(tokens.device.type, torch.bfloat16):
        hidden, _ = model.forward(model.embed(tokens[:, :-1]), (0, model.num_layers), attention=attention)
        logits = model.logits(hidden)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

"""A checkpoint's config.json as the facts the decoder needs, whatever family and spelling it came in."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, PositiveFloat, PositiveInt, ValidationError

from kangaroo.errors import CheckpointError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = ("full_attention", "sliding_attention")
# What transformers assumes where a family's config.json says nothing; an explicit null stays one.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"sliding_window": 4096, "num_key_value_heads": 32},
    "qwen3": {"sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {
        "sliding_window": 4096,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}


@dataclass(frozen=True)
class RopeSettings:
    """Rotary embedding: base frequency and how it is stretched beyond the trained context."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape and flavour of a decoder-only model; one value per fact, families already resolved.

    windows holds one entry per layer: the sliding window's length in tokens, or None for full attention.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSettings
    context_length: int
    windows: tuple[int | None, ...]
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    norm_offset: float = 0.0

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Build from the content of a Hugging Face config.json.

        Raises CheckpointError for an unknown architecture, a missing or ill-typed field, or an unsupported
        rotary scaling.
        """
        family = raw.get("model_type")
        if raw.get("quantization_config"):
            raise CheckpointError("config.json: quantized checkpoints are unsupported; use the original weights")
        if family not in FAMILIES:
            raise CheckpointError(f"model_type must be one of {', '.join(FAMILIES)}, got {family!r}")
        try:
            fields = _CheckpointFields.model_validate(FAMILY_DEFAULTS[family] | raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"config.json: {where}: {first['msg']}, got {first['input']!r:.60}") from error
        return _resolve(family, fields, rope=_rope_settings(raw, fields))

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read folder/config.json; raises CheckpointError where it is missing or is no JSON object."""
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} has no config.json; give a Hugging Face checkpoint folder") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} must hold a JSON object, got {type(raw).__name__}")
        return cls.from_dict(raw)


class _CheckpointFields(BaseModel):
    """The config.json fields that are read, with the defaults transformers gives them."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rms_norm_eps: FiniteFloat = 1e-6
    max_position_embeddings: PositiveInt
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str | None = None
    hidden_activation: str | None = None
    rope_theta: float | None = None
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    query_pre_attn_scalar: PositiveFloat = 256.0
    attn_logit_softcapping: PositiveFloat | None = None
    final_logit_softcapping: PositiveFloat | None = None


def _rope_settings(raw: dict[str, Any], fields: _CheckpointFields) -> RopeSettings:
    """Read rope_theta/rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    spelled = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(spelled, dict) or any(isinstance(value, dict) for value in spelled.values()):
        raise CheckpointError("config.json: rope settings must be one flat object; per-layer-type ones are unsupported")
    rope_type = spelled.get("rope_type", spelled.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        reason = " (it changes earlier positions as the text grows)" if rope_type == "dynamic" else ""
        raise CheckpointError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}{reason}")
    try:
        theta = float(spelled.get("rope_theta") or fields.rope_theta or 10000.0)
        settings = RopeSettings(theta=theta, rope_type=rope_type)
        if rope_type == "linear":
            settings = replace(settings, factor=float(spelled["factor"]))
        if rope_type == "llama3":
            settings = replace(
                settings,
                factor=float(spelled["factor"]),
                low_freq_factor=float(spelled["low_freq_factor"]),
                high_freq_factor=float(spelled["high_freq_factor"]),
                original_context=int(spelled["original_max_position_embeddings"]),
            )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"config.json: {rope_type} rope settings lack a number: {error}") from error
    numbers = (settings.theta, settings.factor, settings.low_freq_factor, settings.original_context)
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise CheckpointError(f"config.json: rope settings must be finite and above 0, got {settings}")
    if not settings.low_freq_factor < settings.high_freq_factor < math.inf:
        raise CheckpointError(f"config.json: rope settings need low_freq_factor < high_freq_factor, got {settings}")
    return settings


def _windows(family: str, fields: _CheckpointFields) -> tuple[int | None, ...]:
    num_layers = fields.num_hidden_layers
    # qwen2 and qwen3 name a window that is off unless use_sliding_window says otherwise.
    in_use = fields.use_sliding_window if family in ("qwen2", "qwen3") else family in ("mistral", "gemma2")
    if not in_use or fields.sliding_window is None:
        return (None,) * num_layers
    if fields.layer_types is not None:
        slides = [kind == "sliding_attention" for kind in fields.layer_types]
        if len(slides) != num_layers or not set(fields.layer_types) <= set(LAYER_TYPES):
            allowed = " or ".join(LAYER_TYPES)
            got = f"{fields.layer_types!r:.80}"
            raise CheckpointError(f"config.json: layer_types must name {num_layers} layers, each {allowed}, got {got}")
    elif family == "gemma2":
        slides = [layer % 2 == 0 for layer in range(num_layers)]
    elif family in ("qwen2", "qwen3"):
        first = 28 if fields.max_window_layers is None else fields.max_window_layers
        slides = [layer >= first for layer in range(num_layers)]
    else:
        slides = [True] * num_layers
    return tuple(fields.sliding_window if slide else None for slide in slides)


def _check_shape(fields: _CheckpointFields, *, num_kv_heads: int, head_dim: int) -> None:
    if fields.num_attention_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads must be a multiple of num_key_value_heads, got {fields.num_attention_heads} "
            f"and {num_kv_heads}"
        )
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"head_dim must be even for rotary embedding, got {head_dim}")


def _resolve(family: str, fields: _CheckpointFields, *, rope: RopeSettings) -> ModelConfig:
    gemma = family == "gemma2"
    head_dim = fields.head_dim or fields.hidden_size // fields.num_attention_heads
    num_kv_heads = fields.num_key_value_heads or fields.num_attention_heads
    _check_shape(fields, num_kv_heads=num_kv_heads, head_dim=head_dim)
    spelled = fields.hidden_activation if gemma else fields.hidden_act
    activation = ACTIVATIONS.get(spelled or "silu")
    if activation is None:
        raise CheckpointError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {spelled!r}")
    query_scalar = fields.query_pre_attn_scalar if gemma else float(head_dim)
    return ModelConfig(
        model_type=family,
        vocab_size=fields.vocab_size,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        num_layers=fields.num_hidden_layers,
        num_heads=fields.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=fields.rms_norm_eps,
        rope=rope,
        context_length=fields.max_position_embeddings,
        windows=_windows(family, fields),
        tied_head=fields.tie_word_embeddings,
        qkv_bias=family == "qwen2" or fields.attention_bias,
        output_bias=family != "qwen2" and fields.attention_bias,
        mlp_bias=fields.mlp_bias,
        qk_norm=family == "qwen3",
        post_norms=gemma,
        activation=activation,
        attention_scale=query_scalar**-0.5,
        attention_softcap=fields.attn_logit_softcapping if gemma else None,
        logits_softcap=fields.final_logit_softcapping if gemma else None,
        embedding_scale=math.sqrt(fields.hidden_size) if gemma else 1.0,
        norm_offset=1.0 if gemma else 0.0,
    )

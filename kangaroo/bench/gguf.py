"""A Llama checkpoint as the GGUF file that llama.cpp reads: names, metadata, and rows in its rotary order.

Shapes: V vocabulary, D hidden size, H heads (of the query, or of keys and values), E head size.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kangaroo.errors import CheckpointError, KangarooError, SettingsError
from kangaroo.model.config import ModelConfig
from kangaroo.model.transformer import inverse_frequencies
from kangaroo.model.weights import expected_shapes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, path: Path, *, dtype: str) -> None:
    """Convert the checkpoint in folder to a GGUF file whose matrices are dtype: float32, float16 or bfloat16.

    The file holds no vocabulary: it is for token ids in, token ids out. As in llama.cpp's own conversion, vectors
    (norms, biases, rotary factors) stay float32. Raises KangarooError where the `gguf` package is missing,
    SettingsError for another dtype, CheckpointError for another family than llama or missing weights.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    config = ModelConfig.from_folder(folder)
    if config.model_type != "llama":
        raise CheckpointError(f"only llama checkpoints convert to GGUF here, got model_type {config.model_type!r}")
    try:
        gguf = import_module("gguf")
    except ImportError as error:
        raise KangarooError("converting to GGUF needs the package gguf: pip install gguf") from error
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, config, file_type=_file_type(gguf, dtype))
    for name, tensor in gguf_tensors(config, _read_tensors(folder, config)):
        stored = tensor.to(DTYPES[dtype] if tensor.ndim > 1 else torch.float32).contiguous()
        # NumPy has no bfloat16: the bytes are handed over with the type's name.
        array, raw_dtype = stored, None
        if stored.dtype == torch.bfloat16:
            array, raw_dtype = stored.view(torch.uint8), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, array.numpy(), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(config: ModelConfig, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a Llama checkpoint under its GGUF name, query and key rows in interleaved order."""
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("model.layers."):
            layer_id, module = module.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer_id}."
        if module == "self_attn.q_proj":
            tensor = interleave_rows(tensor, config.num_heads)
        if module == "self_attn.k_proj":
            tensor = interleave_rows(tensor, config.num_kv_heads)
        yield f"{prefix}{_NAMES[module]}.{kind}", tensor
    if config.rope.rope_type != "default":
        # llama.cpp divides each frequency by its factor, which expresses every static stretch.
        plain = config.rope.theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        yield "rope_freqs.weight", plain / inverse_frequencies(config.rope, config.head_dim)


def interleave_rows(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key weight [H * E, D] or bias [H * E] for interleaved rotary embedding.

    Hugging Face rotates dimension i of a head with i + E/2, llama.cpp's "llama" rotates 2i with 2i + 1.
    """
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _add_metadata(writer: Any, config: ModelConfig, *, file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")


def _file_type(gguf: Any, dtype: str) -> int:
    kinds = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    return int(gguf.LlamaFileType[kinds[dtype]])


def _read_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The checkpoint's tensors as stored, without the head of a tied one; CheckpointError where some are missing."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        stored |= load_file(path)
    names = expected_shapes(config)
    missing = sorted(set(names) - set(stored))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} weights, first {missing[0]}")
    return {name: stored[name] for name in names}

"""Llama checkpoints as GGUF: rows reordered so that the other rotary convention means the same, names, types."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kangaroo.bench.gguf import gguf_tensors, interleave_rows, write_gguf
from kangaroo.errors import CheckpointError, KangarooError, SettingsError
from kangaroo.model.config import ModelConfig
from kangaroo.model.transformer import inverse_frequencies
from kangaroo.model.weights import expected_shapes, save_checkpoint
from tests.tiny import tiny_config, tiny_raw_config, tiny_transformer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def rotate_halves(heads: Tensor, angles: Tensor) -> Tensor:
    """Hugging Face's rotary embedding of heads [H, E] by angles [E / 2]: dimension i turns with i + E/2."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def rotate_pairs(heads: Tensor, angles: Tensor) -> Tensor:
    """llama.cpp's rotary embedding of heads [H, E] by angles [E / 2]: dimension 2i turns with 2i + 1."""
    even, odd = heads[..., 0::2], heads[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
    return torch.stack(turned, -1).flatten(-2)


def tiny_tensors(config: ModelConfig) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}


def save_tiny(folder: Path, **overrides: object) -> None:
    model = tiny_transformer(tiny_config(**overrides))
    save_checkpoint(model, folder, raw_config=tiny_raw_config(**overrides), dtype=torch.float32)


@pytest.mark.parametrize("num_heads", [1, 2, 5])
def test_interleaved_rows_turn_the_same_under_the_other_rotary_convention(num_heads: int) -> None:
    head_dim, size = 6, 7
    weight, hidden = torch.randn(num_heads * head_dim, size), torch.randn(size)
    angles = torch.randn(head_dim // 2)
    theirs = rotate_pairs((interleave_rows(weight, num_heads) @ hidden).view(num_heads, head_dim), angles)
    ours = rotate_halves((weight @ hidden).view(num_heads, head_dim), angles)
    torch.testing.assert_close(theirs, interleave_rows(ours.flatten(), num_heads).view_as(ours))


def test_scores_survive_the_reordering_of_query_and_key() -> None:
    query, key, angles = torch.randn(3, 8), torch.randn(3, 8), torch.randn(4)
    swapped = [interleave_rows(heads.flatten(), 3).view(3, 8) for heads in (query, key)]
    ours = (rotate_halves(query, angles) * rotate_halves(key, 2 * angles)).sum(-1)
    theirs = (rotate_pairs(swapped[0], angles) * rotate_pairs(swapped[1], 2 * angles)).sum(-1)
    torch.testing.assert_close(ours, theirs)


def test_tensors_get_their_gguf_names_and_only_query_and_key_move() -> None:
    config = tiny_config(num_hidden_layers=1)
    source = tiny_tensors(config)
    found = dict(gguf_tensors(config, source))
    layer = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    expected = {"token_embd.weight", "output_norm.weight", "output.weight", *(f"blk.0.{name}.weight" for name in layer)}
    assert set(found) == expected
    prefix = "model.layers.0.self_attn."
    assert torch.equal(found["blk.0.attn_q.weight"], interleave_rows(source[f"{prefix}q_proj.weight"], 4))
    assert torch.equal(found["blk.0.attn_k.weight"], interleave_rows(source[f"{prefix}k_proj.weight"], 2))
    assert torch.equal(found["blk.0.attn_v.weight"], source[f"{prefix}v_proj.weight"])


def test_biases_of_query_and_key_move_with_their_rows() -> None:
    config = tiny_config(num_hidden_layers=1, attention_bias=True)
    source = tiny_tensors(config)
    found = dict(gguf_tensors(config, source))
    bias = source["model.layers.0.self_attn.k_proj.bias"]
    assert torch.equal(found["blk.0.attn_k.bias"][:, None], interleave_rows(bias[:, None], 2))
    assert torch.equal(found["blk.0.attn_output.bias"], source["model.layers.0.self_attn.o_proj.bias"])


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_stretched_rotary_becomes_divisors_of_the_plain_frequencies(scaling: dict[str, object]) -> None:
    config = tiny_config(rope_scaling=scaling)
    factors = dict(gguf_tensors(config, tiny_tensors(config)))["rope_freqs.weight"]
    plain = inverse_frequencies(tiny_config().rope, config.head_dim)
    torch.testing.assert_close(plain / factors, inverse_frequencies(config.rope, config.head_dim))
    assert factors.max() > 1


def test_another_family_is_refused(tmp_path: Path) -> None:
    config = tiny_raw_config("qwen3")
    save_checkpoint(tiny_transformer(tiny_config("qwen3")), tmp_path, raw_config=config, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="qwen3"):
        write_gguf(tmp_path, tmp_path / "model.gguf", dtype="float32")


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="int8"):
        write_gguf(tmp_path, tmp_path / "model.gguf", dtype="int8")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(KangarooError, match="pip install gguf"):
        write_gguf(tmp_path, tmp_path / "model.gguf", dtype="float32")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="first"):
        write_gguf(tmp_path, tmp_path / "model.gguf", dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_holds_matrices_in_the_dtype_and_vectors_in_float32(tmp_path: Path, dtype: str) -> None:
    gguf = pytest.importorskip("gguf")
    save_tiny(tmp_path, tie_word_embeddings=True)
    write_gguf(tmp_path, tmp_path / "model.gguf", dtype=dtype)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert "output.weight" not in tensors
    embedding, norm = tensors["token_embd.weight"], tensors["output_norm.weight"]
    assert embedding.tensor_type.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert embedding.shape.tolist() == [32, 258]  # GGUF counts from the innermost dimension
    assert norm.tensor_type.name == "F32"
    expected = tiny_transformer(tiny_config(tie_word_embeddings=True)).embedding.to(getattr(torch, dtype))
    stored = torch.from_numpy(embedding.data.copy()).view(getattr(torch, dtype))
    assert torch.equal(stored, expected)

"""Checkpoint folders: what loads, what is written back, and every way a folder can be wrong."""

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kangaroo.errors import CheckpointError
from kangaroo.model.config import FAMILIES, ModelConfig
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import DTYPES, disassemble, load_transformer, resolve_folder, save_checkpoint
from tests.model.checkpoints import reference_logits
from tests.tiny import tiny_config, tiny_raw_config, tiny_transformer

CPU = torch.device("cpu")
SETTINGS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An untied llama checkpoint in one file."""
    raw = tiny_raw_config()
    save_checkpoint(tiny_transformer(tiny_config()), tmp_path, raw_config=raw, dtype=torch.float32)
    return tmp_path


def load(folder: Path, storage: str = "float32") -> Transformer:
    return load_transformer(folder, ModelConfig.from_folder(folder), storage=storage, device=CPU)


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    attention = FullSequencePass(model.config, tokens.shape[1], device=CPU)
    return model.logits(model.forward(model.embed(tokens), (0, model.num_layers), attention=attention)[0])


def shard(folder: Path, names: dict[str, str]) -> None:
    """Replace the checkpoint's single file by an index naming these files, written where they are names."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(("family", "overrides"), SETTINGS, ids=str)
def test_saved_checkpoints_load_again_and_in_transformers(
    family: str, overrides: dict[str, bool], tmp_path: Path
) -> None:
    raw = tiny_raw_config(family, **overrides)
    model = tiny_transformer(tiny_config(family, **overrides))
    save_checkpoint(model, tmp_path / "new" / "folder", raw_config=raw, dtype=torch.float32)
    again = dict(load(tmp_path / "new" / "folder").parameters())
    assert again.keys() == dict(model.parameters()).keys()
    for name, tensor in model.parameters():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)
    tokens = torch.randint(model.config.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
    theirs = reference_logits(tmp_path / "new" / "folder", tokens)
    torch.testing.assert_close(logits(model, tokens), theirs, atol=1e-4, rtol=1e-4)


def test_tied_checkpoint_with_a_stored_head(tmp_path: Path) -> None:
    model = tiny_transformer(tiny_config(tie_word_embeddings=True))
    raw = tiny_raw_config(tie_word_embeddings=True)
    save_checkpoint(model, tmp_path, raw_config=raw, dtype=torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    save_file(stored | {"lm_head.weight": torch.zeros(258, 32)}, tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    assert loaded.head is loaded.embedding
    assert torch.equal(loaded.embedding, model.embedding)


@pytest.mark.parametrize("storage", ["bfloat16", "float16"])
def test_weights_are_rounded_to_their_storage_and_norms_are_not(folder: Path, storage: str) -> None:
    exact, rounded = dict(load(folder).parameters()), dict(load(folder, storage).parameters())
    for name, tensor in exact.items():
        expected = tensor if name.endswith("norm") else tensor.to(DTYPES[storage]).float()
        assert torch.equal(rounded[name].float(), expected), name
        assert rounded[name].dtype == torch.float32, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_are_written_in_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_transformer(tiny_config("qwen3"))
    save_checkpoint(model, tmp_path, raw_config=tiny_raw_config("qwen3"), dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    for name, tensor in disassemble(model).items():
        assert torch.equal(stored[name], tensor.to(dtype)), name


def test_missing_tensor_is_named(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.2.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 of 39 weights, first model\.layers\.2\.mlp\.up_proj\.weight"):
        load(folder)


def test_wrong_shape_is_named(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"] = torch.ones(31)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight must have shape \(32,\) .*got \(31,\)"):
        load(folder)


def test_quantized_weights_are_refused(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must be stored as float32.*got torch\.float8_e4m3fn"):
        load(folder)


@pytest.mark.parametrize("size", [0, 4, 200, -100])
def test_truncated_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        load(folder)


def test_pickles_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        load(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors$"):
        load(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "sub/.."])
def test_index_must_stay_inside_its_folder(folder: Path, name: str) -> None:
    shard(folder, {"model.norm.weight": name})
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        load(folder)


@pytest.mark.parametrize("name", ["absent.safetensors", "..", "", 3, None])
def test_index_naming_no_file(folder: Path, name: str) -> None:
    shard(folder, {"model.norm.weight": name})
    with pytest.raises(CheckpointError):
        load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_malformed_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="is no safetensors index"):
        load(folder)


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c"])
def test_missing_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such model folder"):
        resolve_folder(model)


def test_hub_id_without_a_cached_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no folder org/absent here, and the hub has no usable copy") as caught:
        resolve_folder("org/absent")
    assert "\n" not in str(caught.value)


REPOSITORY = {
    "config.json": True,
    "generation_config.json": True,
    "model.safetensors": True,
    "model.safetensors.index.json": True,
    "model-00001-of-00002.safetensors": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "tokenizer.model": True,
    "special_tokens_map.json": True,
    "chat_template.jinja": True,
    "vocab.json": True,
    "merges.txt": True,
    "adapter/config.json": True,
    "adapter/adapter.safetensors": True,
    "consolidated.safetensors": False,
    "consolidated.00.pth": False,
    "original/consolidated.00.pth": False,
    "original/model.safetensors": False,
    "original/tokenizer.model": False,
    "onnx/config.json": False,
    "adapter/report.json": False,
    "adapter/checkpoint.safetensors": False,
    "pytorch_model.bin": False,
    "modeling_llama.py": False,
    "README.md": False,
}


@pytest.mark.parametrize(("name", "is_fetched"), REPOSITORY.items())
def test_only_files_that_are_read_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, name: str, is_fetched: bool
) -> None:
    asked: list[str] = []

    def snapshot_download(model: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("kangaroo.model.weights.snapshot_download", snapshot_download)
    assert resolve_folder("org/name") == tmp_path
    assert any(fnmatch(name, pattern) for pattern in asked) == is_fetched


def test_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve_folder(str(folder)) == folder

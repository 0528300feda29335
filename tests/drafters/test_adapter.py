"""Adapters: saved and loaded unchanged, and refused in one line where they do not fit the target."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kangaroo.drafters.adapter import KINDS, WEIGHTS_FILE, Adapter, Kind, attention_config, tensor_shapes
from kangaroo.drafters.companion import CONFIG_FILE, choose_storage, fingerprint
from kangaroo.errors import AdapterError, KernelError
from kangaroo.model import packed
from kangaroo.model.cache import CachedPass, KVCache, Segment
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import assemble, disassemble
from tests.tiny import noisy_adapter, tiny_config, tiny_transformer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]


@pytest.fixture(scope="module")
def target() -> Transformer:
    return tiny_transformer(tiny_config(num_hidden_layers=3))


@pytest.fixture
def folder(tmp_path: Path, target: Transformer) -> Path:
    Adapter.initialize(target, 1).save(tmp_path)
    return tmp_path


def random_adapter(target: Transformer, kind: Kind = "attention") -> Adapter:
    return noisy_adapter(target, 1, kind=kind, noise=0.3, seed=5)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_loads_unchanged(tmp_path: Path, target: Transformer, kind: Kind) -> None:
    adapter = random_adapter(target, kind)
    adapter.config.gamma, adapter.config.eta = 5, 0.25
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path, target)
    assert loaded.config == adapter.config
    assert loaded.config.kind == kind
    assert loaded.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_adapter_saved_in_bfloat16_loads_rounded(tmp_path: Path, target: Transformer) -> None:
    adapter = random_adapter(target)
    adapter.save(tmp_path, dtype=torch.bfloat16)
    loaded = Adapter.load(tmp_path, target)
    for name, tensor in adapter.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor.bfloat16().float())


def test_config_that_names_no_kind_is_that_of_an_attention(target: Transformer, folder: Path) -> None:
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text())
    assert fields.pop("kind") == "attention"
    path.write_text(json.dumps(fields))
    assert Adapter.load(folder, target).config.kind == "attention"


@pytest.mark.parametrize("kind", ["mlp", "layer", "head"])
def test_config_of_another_kind_than_the_weights_is_refused(target: Transformer, folder: Path, kind: str) -> None:
    edit_config(folder, kind=kind)
    with pytest.raises(AdapterError, match="must hold"):
        Adapter.load(folder, target)


def test_kind_nobody_knows_is_refused_by_name(target: Transformer, folder: Path) -> None:
    edit_config(folder, kind="convolution")
    with pytest.raises(AdapterError, match=r"is no adapter config: kind: .*'attention', 'mlp', 'layer' or 'head'"):
        Adapter.load(folder, target)


def test_head_of_packed_weights_cannot_be_copied(target: Transformer) -> None:
    with pytest.raises(KernelError, match="backend='reference' to make a head for it"):
        Adapter.initialize(packed.pack(target), 1, kind="head")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_adapter_guesses_what_the_reference_does(family: str, kind: Kind) -> None:
    target = tiny_transformer(tiny_config(family, tie_word_embeddings=False))
    native = packed.pack(target)
    adapter = random_adapter(target, kind)
    hidden = torch.randn(6, target.config.hidden_size, generator=torch.Generator().manual_seed(1))
    found = []
    for one, model in ((adapter, target), (adapter.pack(native), native)):
        cache = one.new_cache(model, num_sequences=1, num_slots=6)
        states = one.run(hidden, attention=CachedPass(cache, [Segment(0, 0, 6, (-1, 0, 0, 1, 2, 2))]))
        head = one.head(model)
        found.append((states, head.logits(states, one.final_norm), *head.guess(states, one.final_norm)))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapter_predicts_as_the_target_would_leaving_at_the_exit_layer(target: Transformer, kind: Kind) -> None:
    hidden = torch.randn(1, 7, target.config.hidden_size, generator=torch.Generator().manual_seed(0))
    adapter = Adapter.initialize(target, 1, kind=kind)
    attention = FullSequencePass(adapter.model_config, 7, device=hidden.device)
    logits = adapter.head(target).head_logits(adapter.forward(hidden, attention=attention))
    torch.testing.assert_close(logits, target.logits(hidden))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_pass_in_pieces_equals_the_training_pass(family: str, kind: Kind) -> None:
    target = tiny_transformer(tiny_config(family))
    adapter = random_adapter(target, kind)
    hidden = torch.randn(14, target.config.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = adapter.forward(hidden[None], attention=FullSequencePass(adapter.model_config, 14, device=hidden.device))
    cache = KVCache(adapter.model_config, 1, num_slots=14, dtype=torch.float32, device=hidden.device)
    pieces: list[Tensor] = []
    for block in hidden.split([9, 1, 1, 3]):
        attention = CachedPass(cache, [Segment(0, cache.lengths[0], len(block))])
        pieces.append(adapter.forward(block, attention=attention))
        cache.truncate(0, cache.lengths[0] + len(block))
    torch.testing.assert_close(torch.cat(pieces), whole[0], rtol=1e-5, atol=1e-5)


def test_window_and_softcap_of_the_target_do_not_reach_the_adapter() -> None:
    model_config = Adapter.initialize(tiny_transformer(tiny_config("gemma2")), 1).model_config
    assert model_config.windows == (None,)
    assert model_config.attention_softcap is None
    assert model_config.num_kv_heads == model_config.num_heads


@pytest.mark.parametrize(("storage", "kept"), [("float32", "bfloat16"), ("float16", "float16"), ("int8", "int8")])
def test_only_float32_weights_that_bfloat16_holds_are_kept_in_fewer_bytes(storage: str, kept: str) -> None:
    exact = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert choose_storage([exact, exact.bfloat16()], storage) == kept
    exact[3, 4] = 1.001
    assert choose_storage([exact], storage) == storage


@pytest.mark.parametrize("exit_layer", [-1, 0, 3, 4])
def test_exit_layer_out_of_range_is_refused(target: Transformer, folder: Path, exit_layer: int) -> None:
    with pytest.raises(AdapterError, match=rf"exit_layer must be in 1\.\.2, got {exit_layer}"):
        Adapter.initialize(target, exit_layer)
    edit_config(folder, exit_layer=exit_layer)
    with pytest.raises(AdapterError, match=rf"exit_layer must be in 1\.\.2, got {exit_layer}"):
        Adapter.load(folder, target)


def test_fingerprint_tells_models_of_one_shape_apart(target: Transformer) -> None:
    other = tiny_transformer(target.config, seed=1)
    assert fingerprint(target) == fingerprint(tiny_transformer(target.config))
    assert fingerprint(target) != fingerprint(other)


def test_adapter_of_another_model_of_the_same_shape_is_refused(target: Transformer, folder: Path) -> None:
    with pytest.raises(AdapterError, match="another model of the same shape"):
        Adapter.load(folder, tiny_transformer(target.config, seed=1))


@pytest.mark.parametrize(
    "overrides", [{"hidden_size": 64}, {"vocab_size": 300}, {"num_attention_heads": 8, "head_dim": 8}, {"head_dim": 16}]
)
def test_adapter_of_a_model_of_another_shape_is_refused(folder: Path, overrides: dict[str, int]) -> None:
    other = tiny_transformer(tiny_config(num_hidden_layers=3, **overrides))
    with pytest.raises(AdapterError, match="is for another model: its"):
        Adapter.load(folder, other)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00broken",
        b'{"exit_layer": 1}',
        b'{"exit_layer": "one"}',
    ],
)
def test_malformed_config_is_refused_in_one_line(target: Transformer, folder: Path, content: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match="is no adapter config") as caught:
        Adapter.load(folder, target)
    assert "\n" not in str(caught.value)


def test_config_field_nobody_knows_is_refused_by_name(target: Transformer, folder: Path) -> None:
    edit_config(folder, exit_layers=2)
    with pytest.raises(AdapterError, match="exit_layers"):
        Adapter.load(folder, target)


def test_folder_without_config_is_refused(target: Transformer, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds no adapter: no readable config\.json"):
        Adapter.load(tmp_path, target)


def test_folder_without_weights_is_refused(target: Transformer, folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter\.safetensors"):
        Adapter.load(folder, target)


@pytest.mark.parametrize("keep", [0, 5, 200, -7])
def test_cut_off_weights_are_refused(target: Transformer, folder: Path, keep: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterError, match="is damaged"):
        Adapter.load(folder, target)


def test_weights_of_other_names_or_shapes_are_refused(target: Transformer, folder: Path) -> None:
    adapter = Adapter.initialize(target, 1)
    adapter.tensors["qkv"] = adapter.tensors["qkv"][:-1]
    adapter.save(folder)
    with pytest.raises(AdapterError, match="must hold"):
        Adapter.load(folder, target)
    del adapter.tensors["qkv"]
    adapter.save(folder)
    with pytest.raises(AdapterError, match="must hold"):
        Adapter.load(folder, target)


def test_adapter_of_a_7b_model_has_67_million_parameters() -> None:
    config = tiny_config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, head_dim=128)
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(attention_config(config)).items()}
    assert sum(sizes.values()) == 4 * 4096**2 + 2 * 4096
    assert round(sum(sizes.values()) / 1e6) == 67


def test_fingerprint_is_the_same_in_every_dtype_and_differs_between_models(target: Transformer) -> None:
    tensors = disassemble(target)
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for given, storage in ((tensors, "float16"), (rounded, "float32")):
        reloaded = assemble(given, target.config, storage=storage, device=target.device)
        assert fingerprint(reloaded) == fingerprint(target)
    tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.1.input_layernorm.weight"] * 1.1
    other = assemble(tensors, target.config, storage="float32", device=target.device)
    assert fingerprint(other) != fingerprint(target)

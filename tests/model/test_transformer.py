"""The decoder against transformers, for every family and every way of passing the text through it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kangaroo.model.cache import CachedPass, KVCache, Segment, causal_mask
from kangaroo.model.config import ModelConfig, RopeSettings
from kangaroo.model.transformer import FullSequencePass, Rotary, Transformer
from kangaroo.model.weights import load_transformer, resolve_folder
from tests.model.checkpoints import CASES, NUM_TOKENS, Checkpoint, write_checkpoint
from tests.tiny import tiny_config, tiny_transformer

CPU = torch.device("cpu")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Transformer:
    folder = resolve_folder(str(checkpoint.folder))
    return load_transformer(folder, ModelConfig.from_folder(folder), storage="float32", device=CPU)


def new_cache(model: Transformer, num_sequences: int = 1, num_slots: int = NUM_TOKENS) -> KVCache:
    return KVCache(model.config, num_sequences, num_slots=num_slots, dtype=torch.float32, device=CPU)


def full_logits(model: Transformer, tokens: Tensor) -> Tensor:
    attention = FullSequencePass(model.config, tokens.shape[1], device=CPU)
    hidden, _ = model.forward(model.embed(tokens), (0, model.num_layers), attention=attention)
    return model.logits(hidden)


def extend(model: Transformer, cache: KVCache, tokens: Tensor) -> Tensor:
    """Append tokens [T] to sequence 0 of the cache; returns their logits."""
    attention = CachedPass(cache, [Segment(0, cache.lengths[0], len(tokens))])
    hidden, _ = model.forward(model.embed(tokens), (0, model.num_layers), attention=attention)
    cache.keep(0, list(range(len(tokens))))
    return model.logits(hidden)


def largest_difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return float((left - right).abs().max())


def test_config_is_the_same_in_both_spellings(checkpoint: Checkpoint) -> None:
    assert ModelConfig.from_dict(checkpoint.raw) == ModelConfig.from_folder(checkpoint.folder)


def test_full_sequences(checkpoint: Checkpoint, model: Transformer) -> None:
    logits = full_logits(model, checkpoint.tokens)
    assert logits.dtype == torch.float32
    assert largest_difference(logits, checkpoint.logits) < TOLERANCE


def test_prefill_of_two_sequences(checkpoint: Checkpoint, model: Transformer) -> None:
    cache = new_cache(model, 2)
    attention = CachedPass(cache, [Segment(0, 0, NUM_TOKENS), Segment(1, 0, NUM_TOKENS)])
    hidden, _ = model.forward(model.embed(checkpoint.tokens.flatten()), (0, model.num_layers), attention=attention)
    assert largest_difference(model.logits(hidden), checkpoint.logits.flatten(0, 1)) < TOLERANCE


@pytest.mark.parametrize("sizes", [[1] * NUM_TOKENS, [5, 1, 7, 3, 8], [10, *[1] * 14]], ids=str)
def test_cached_decoding(checkpoint: Checkpoint, model: Transformer, sizes: list[int]) -> None:
    cache = new_cache(model)
    logits = torch.cat([extend(model, cache, part) for part in checkpoint.tokens[0].split(sizes)])
    assert cache.lengths == [NUM_TOKENS]
    assert largest_difference(logits, checkpoint.logits[0]) < TOLERANCE


def test_every_setting_shows(checkpoint: Checkpoint, model: Transformer) -> None:
    config = model.config
    neutral = {
        "windows": (None,) * config.num_layers,
        "attention_softcap": None,
        "logits_softcap": None,
        "attention_scale": config.head_dim**-0.5,
        "embedding_scale": 1.0,
        "rope": RopeSettings(),
    }
    for setting in checkpoint.settings:
        changed = replace(config, **{setting: neutral[setting]})  # type: ignore[arg-type]
        other = Transformer(
            changed, model.layers, embedding=model.embedding, final_norm=model.final_norm, head=model.head
        )
        assert largest_difference(full_logits(other, checkpoint.tokens), checkpoint.logits) > 1e-3, setting


def test_split_spans_equal_one(checkpoint: Checkpoint, model: Transformer) -> None:
    tokens, stop = checkpoint.tokens[0], model.num_layers
    embedded = model.embed(tokens)
    attention = CachedPass(new_cache(model), [Segment(0, 0, NUM_TOKENS)])
    whole, tapped = model.forward(embedded, (0, stop), attention=attention, taps=range(stop + 1))
    assert sorted(tapped) == list(range(stop + 1))
    assert torch.equal(tapped[0], embedded)
    assert torch.equal(tapped[stop], whole)
    for split in range(stop + 1):
        attention = CachedPass(new_cache(model), [Segment(0, 0, NUM_TOKENS)])
        lower, below = model.forward(embedded, (0, split), attention=attention, taps=(1, 3))
        upper, above = model.forward(lower, (split, stop), attention=attention, taps=(1, 3))
        assert torch.equal(lower, tapped[split])
        assert torch.equal(upper, whole)
        assert set(below) == {tap for tap in (1, 3) if tap <= split}
        assert set(above) == {tap for tap in (1, 3) if tap >= split}
        for tap, states in (below | above).items():
            assert torch.equal(states, tapped[tap])


def test_sharded_checkpoint(tmp_path: Path) -> None:
    sharded = write_checkpoint("llama-biases", tmp_path / "it", max_shard_size="20KB")
    assert len(list(sharded.folder.glob("*.safetensors"))) > 2
    config = ModelConfig.from_folder(sharded.folder)
    loaded = load_transformer(sharded.folder, config, storage="float32", device=CPU)
    assert largest_difference(full_logits(loaded, sharded.tokens), sharded.logits) < TOLERANCE


def test_full_sequence_pass_has_gradients() -> None:
    model = tiny_transformer(tiny_config("gemma2"))
    hidden = torch.randn(2, 9, model.config.hidden_size, requires_grad=True)
    attention = FullSequencePass(model.config, 9, device=CPU)
    out, _ = model.forward(hidden, (0, model.num_layers), attention=attention)
    (gradient,) = torch.autograd.grad(out[:, 4].sum(), hidden)
    assert gradient[:, :5].abs().amin(dim=(0, 2)).min() > 0
    assert gradient[:, 5:].abs().max() == 0


def test_parameters_list_a_tied_head_once() -> None:
    tied = tiny_transformer(tiny_config(tie_word_embeddings=True))
    untied = tiny_transformer(tiny_config())
    names = [name for name, _ in untied.parameters()]
    assert len(names) == len(set(names))
    assert set(names) - {name for name, _ in tied.parameters()} == {"head"}


@pytest.mark.parametrize("head_dim", [8, 12, 64])
def test_rotary_tables_do_not_depend_on_their_size(head_dim: int) -> None:
    positions = torch.tensor([0, 3, 4])
    small = Rotary(RopeSettings(), head_dim, device=CPU)
    grown = Rotary(RopeSettings(), head_dim, device=CPU)
    before = small.at(positions, 5)
    grown.at(torch.tensor([2]), 3)
    grown.at(torch.tensor([1999]), 2000)
    for left, right in zip(before, grown.at(positions, 5), strict=True):
        assert left.shape == (3, 1, head_dim)
        assert torch.equal(left, right)


def test_causal_mask_window_counts_the_row_itself() -> None:
    offsets = torch.arange(5)[:, None] - torch.arange(5)
    assert (causal_mask(offsets, window=2) == 0).sum(dim=1).tolist() == [1, 2, 2, 2, 2]
    assert (causal_mask(offsets, window=None) == 0).sum(dim=1).tolist() == [1, 2, 3, 4, 5]


def test_tables_made_while_decoding_serve_training() -> None:
    model = tiny_transformer(tiny_config())
    hidden = torch.randn(1, 9, model.config.hidden_size)
    attention = FullSequencePass(model.config, 9, device=model.device)
    with torch.inference_mode():
        model.forward(hidden, (0, 1), attention=attention)
    model.layers[0].qkv.requires_grad_()
    output, _ = model.forward(hidden, (0, 1), attention=attention)
    output.sum().backward()
    assert model.layers[0].qkv.grad is not None

"""The cache: rolling back, keeping branches, and passes over trees and several sequences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kangaroo.model.cache import CachedPass, KVCache, Segment
from kangaroo.model.transformer import Transformer
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_transformer

CPU = torch.device("cpu")
PREFIX = 11
FAMILIES = ("llama", "mistral", "gemma2")
TREES = {
    "chain": (-1, 0, 1, 2, 3),
    "fork": (-1, 0, 0, 1, 2, 4),
    "comb": (-1, 0, 0, 2, 2, 4, 4, 6, 6, 8),
    "star": (-1, 0, 0, 0, 0),
    "forest": (-1, -1, 0, 1, 1),
}
trees = st.lists(st.integers(0, 1 << 30), min_size=1, max_size=12).map(
    lambda picks: tuple(pick % (row + 1) - 1 for row, pick in enumerate(picks))
)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny_transformer(tiny_config(request.param))


def new_cache(model: Transformer, num_sequences: int = 1, *, poison: float = float("nan")) -> KVCache:
    """A cache whose unwritten slots would spoil whatever reads them."""
    cache = KVCache(model.config, num_sequences, num_slots=32, dtype=torch.float32, device=CPU)
    for stored in (*cache.keys, *cache.values):
        stored.fill_(poison)
    return cache


def run(model: Transformer, cache: KVCache, tokens: Tensor, segments: list[Segment]) -> Tensor:
    """The last layer's states, scaled to a root mean square of 1 so that tolerances mean something."""
    hidden, _ = model.forward(model.embed(tokens), (0, model.num_layers), attention=CachedPass(cache, segments))
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:])


def append(model: Transformer, cache: KVCache, tokens: Tensor, *, sequence: int = 0) -> Tensor:
    hidden = run(model, cache, tokens, [Segment(sequence, cache.lengths[sequence], len(tokens))])
    cache.keep(sequence, list(range(len(tokens))))
    return hidden


def random_tokens(count: int, seed: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))


def root_path(parents: tuple[int, ...], row: int) -> list[int]:
    path = [row]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("name", TREES)
def test_tree_rows_equal_their_root_paths(model: Transformer, name: str) -> None:
    parents = TREES[name]
    prefix, nodes = random_tokens(PREFIX, 1), random_tokens(len(parents), 2)
    cache = new_cache(model)
    append(model, cache, prefix)
    hidden = run(model, cache, nodes, [Segment(0, PREFIX, len(parents), parents)])
    for row in range(len(parents)):
        path = root_path(parents, row)
        chain = new_cache(model)
        append(model, chain, prefix)
        torch.testing.assert_close(hidden[path], append(model, chain, nodes[path]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "path"), [("comb", [0, 2, 4, 6]), ("fork", [0, 2, 4, 5]), ("star", [0, 4])])
def test_decoding_goes_on_from_a_kept_branch(model: Transformer, name: str, path: list[int]) -> None:
    parents = TREES[name]
    prefix, nodes, after = random_tokens(PREFIX, 3), random_tokens(len(parents), 4), random_tokens(3, 5)
    cache, chain = new_cache(model), new_cache(model)
    for one in (cache, chain):
        append(model, one, prefix)
    run(model, cache, nodes, [Segment(0, PREFIX, len(parents), parents)])
    cache.keep(0, path)
    append(model, chain, nodes[path])
    assert cache.lengths == chain.lengths == [PREFIX + len(path)]
    torch.testing.assert_close(append(model, cache, after), append(model, chain, after), atol=1e-5, rtol=1e-5)


def test_keeping_part_of_a_chain_moves_nothing(model: Transformer) -> None:
    cache = new_cache(model)
    append(model, cache, random_tokens(PREFIX, 6))
    run(model, cache, random_tokens(4, 7), [Segment(0, PREFIX, 4)])
    before = [stored.clone() for stored in (*cache.keys, *cache.values)]
    cache.keep(0, [0, 1])
    assert cache.lengths == [PREFIX + 2]
    for stored, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(stored.nan_to_num(), old.nan_to_num())


def test_truncated_text_is_forgotten(model: Transformer) -> None:
    text, other = random_tokens(PREFIX, 8), random_tokens(5, 9)
    cache, fresh = new_cache(model), new_cache(model)
    append(model, cache, text)
    append(model, cache, random_tokens(7, 10))
    cache.truncate(0, PREFIX)
    append(model, fresh, text)
    assert torch.equal(append(model, cache, other), append(model, fresh, other))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_slots_beyond_the_text_have_no_influence(model: Transformer, poison: float) -> None:
    parents = TREES["comb"]
    prefix, nodes = random_tokens(PREFIX, 11), random_tokens(len(parents), 12)
    outputs = []
    for filler in (0.0, poison):
        cache = new_cache(model, poison=filler)
        append(model, cache, prefix)
        outputs.append(run(model, cache, nodes, [Segment(0, PREFIX, len(parents), parents)]))
    assert torch.equal(outputs[0], outputs[1])


def test_packed_sequences_equal_separate_ones(model: Transformer) -> None:
    parents = TREES["fork"]
    prefixes = [random_tokens(PREFIX, 13), random_tokens(3, 14), random_tokens(7, 15)]
    parts = [random_tokens(len(parents), 16), random_tokens(1, 17), random_tokens(4, 18)]
    shapes = [parents, None, None]
    packed, segments, expected = new_cache(model, 3), [], []
    for sequence, (prefix, part, shape) in enumerate(zip(prefixes, parts, shapes, strict=True)):
        alone = new_cache(model)
        append(model, alone, prefix)
        expected.append(run(model, alone, part, [Segment(0, len(prefix), len(part), shape)]))
        append(model, packed, prefix, sequence=sequence)
        segments.append(Segment(sequence, len(prefix), len(part), shape))
    order = [2, 0, 1]
    hidden = run(model, packed, torch.cat([parts[i] for i in order]), [segments[i] for i in order])
    torch.testing.assert_close(hidden, torch.cat([expected[i] for i in order]), atol=1e-5, rtol=1e-5)
    packed.keep(1, [0])
    assert packed.lengths == [PREFIX, 4, 7]


@given(parents=trees)
def test_segment_agrees_with_brute_force(parents: tuple[int, ...]) -> None:
    segment = Segment(0, 5, len(parents), parents)
    paths = [root_path(parents, row) for row in range(len(parents))]
    assert segment.depths() == [len(path) - 1 for path in paths]
    expected = [[column in path for column in range(len(parents))] for path in paths]
    assert segment.visibility().tolist() == expected


@given(num_rows=st.integers(1, 12))
def test_a_chain_is_a_tree_without_branches(num_rows: int) -> None:
    chain, tree = Segment(0, 0, num_rows), Segment(0, 0, num_rows, tuple(range(-1, num_rows - 1)))
    assert chain.depths() == tree.depths()
    assert torch.equal(chain.visibility(), tree.visibility())


def test_positions_follow_the_depths() -> None:
    cache = KVCache(tiny_config(), 2, num_slots=32, dtype=torch.float32, device=CPU)
    attention = CachedPass(cache, [Segment(0, 7, 4, (-1, 0, 0, 2)), Segment(1, 3, 2)])
    assert attention.positions.tolist() == [7, 8, 8, 9, 3, 4]
    assert attention.num_positions > 9

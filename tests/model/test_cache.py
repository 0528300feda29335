"""The cache: rolling back, keeping branches, and passes over trees and several sequences."""

import pytest
import torch
from hypothesis import given, settings
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


def levels_of(parents: tuple[int, ...]) -> list[range]:
    """The nodes level by level, as a drafter grows them: consecutive nodes, no node beside its parent."""
    levels, start = [], 0
    for node, parent in enumerate(parents):
        if parent >= start:
            levels.append(range(start, node))
            start = node
    return [*levels, range(start, len(parents))]


@pytest.mark.parametrize("name", TREES)
def test_rows_run_level_by_level_equal_rows_run_at_once(model: Transformer, name: str) -> None:
    parents = TREES[name]
    prefix, nodes = random_tokens(PREFIX, 19), random_tokens(len(parents), 20)
    whole, grown = new_cache(model), new_cache(model)
    for cache in (whole, grown):
        append(model, cache, prefix)
    expected = run(model, whole, nodes, [Segment(0, PREFIX, len(parents), parents)])
    hidden = []
    for level in levels_of(parents):
        segment = Segment(0, PREFIX, len(level), parents[: level.stop], level.start)
        assert segment.stop == PREFIX + level.stop
        hidden.append(run(model, grown, nodes[level.start : level.stop], [segment]))
    torch.testing.assert_close(torch.cat(hidden), expected, atol=1e-5, rtol=1e-5)
    stop = PREFIX + len(parents)
    for mine, other in zip((*grown.keys, *grown.values), (*whole.keys, *whole.values), strict=True):
        torch.testing.assert_close(mine[:, :, :stop], other[:, :, :stop], atol=1e-5, rtol=1e-5)


def test_later_levels_of_several_sequences_share_a_pass(model: Transformer) -> None:
    prefixes, parts = [random_tokens(PREFIX, 21), random_tokens(4, 22)], [random_tokens(6, 23), random_tokens(4, 24)]
    shapes = [TREES["fork"], None]
    expected, together, segments = [], new_cache(model, 2), []
    for sequence, (prefix, part, shape) in enumerate(zip(prefixes, parts, shapes, strict=True)):
        alone = new_cache(model)
        append(model, alone, prefix)
        expected.append(run(model, alone, part, [Segment(0, len(prefix), len(part), shape)])[3:])
        append(model, together, prefix, sequence=sequence)
        first = shape if shape is None else shape[:3]
        run(model, together, part[:3], [Segment(sequence, len(prefix), 3, first)])
        segments.append(Segment(sequence, len(prefix), len(part) - 3, shape, 3))
    hidden = run(model, together, torch.cat([part[3:] for part in parts]), segments)
    torch.testing.assert_close(hidden, torch.cat(expected), atol=1e-5, rtol=1e-5)


@given(parents=trees, data=st.data())
def test_later_rows_of_a_segment_are_the_rows_of_the_whole(parents: tuple[int, ...], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(parents) - 1))
    for shape in (parents, None):
        whole, rest = Segment(0, 5, len(parents), shape), Segment(0, 5, len(parents) - first, shape, first)
        assert rest.stop == whole.stop
        assert rest.depths() == whole.depths()
        assert torch.equal(rest.positions(CPU), whole.positions(CPU)[first:])
        assert torch.equal(rest.visibility(), whole.visibility()[first:])


sizes = st.tuples(st.integers(1, 5), st.integers(1, 20))


@settings(deadline=None)
@given(steps=st.lists(sizes, min_size=1, max_size=5), data=st.data())
def test_reserved_room_keeps_what_is_committed(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    config = tiny_config(num_hidden_layers=2)
    cache = KVCache(config, 1, num_slots=1, dtype=torch.float32, device=CPU)
    expected: list[list[Tensor]] = []
    largest = (1, 1)
    for num_sequences, num_slots in steps:
        cache.reserve(num_sequences, num_slots)
        largest = max(largest[0], num_sequences), max(largest[1], num_slots)
        # Never less than asked for, never less than before.
        assert (len(cache.lengths), cache.num_slots) == largest
        assert cache.keys[0].shape == (largest[0], config.num_kv_heads, largest[1], config.head_dim)
        for sequence, kept in enumerate(expected):
            length = cache.lengths[sequence]
            assert all(
                torch.equal(stored[sequence, :, :length], part)
                for stored, part in zip((*cache.keys, *cache.values), kept, strict=True)
            )
        assert cache.lengths[len(expected) :] == [0] * (largest[0] - len(expected))
        expected = []
        for sequence in range(largest[0]):
            length = data.draw(st.integers(0, largest[1]))
            cache.truncate(sequence, length)
            for stored in (*cache.keys, *cache.values):
                stored[sequence] = torch.randn(stored.shape[1:])
            expected.append([stored[sequence, :, :length].clone() for stored in (*cache.keys, *cache.values)])


def test_decoding_goes_on_in_a_larger_cache(model: Transformer) -> None:
    text, after = random_tokens(PREFIX, 25), random_tokens(6, 26)
    small, large = (KVCache(model.config, 1, num_slots=count, dtype=torch.float32, device=CPU) for count in (12, 32))
    for cache in (small, large):
        append(model, cache, text)
    small.reserve(3, 20)
    assert torch.equal(append(model, small, after), append(model, large, after))
    assert small.lengths == [PREFIX + 6, 0, 0]

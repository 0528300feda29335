"""Trees of guesses."""

from hypothesis import given
from hypothesis import strategies as st

from kangaroo.drafters.base import MAX_NODES
from kangaroo.drafters.tree import merge


def branches(tokens: list[int], parents: list[int]) -> set[tuple[int, ...]]:
    """The guesses on the way to every node."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return set(paths)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6))
def test_merged_continuations_are_the_branches_of_a_tree_that_says_nothing_twice(
    continuations: list[list[int]],
) -> None:
    tokens, parents = merge(9, continuations)
    beginnings = {tuple(one[:length]) for one in continuations for length in range(len(one) + 1)} | {()}
    assert branches(tokens, parents) == beginnings
    assert len(tokens) == len(beginnings) <= MAX_NODES
    assert (tokens[0], parents[0]) == (9, -1)
    assert all(parent < node for node, parent in enumerate(parents))


def test_merged_tree_keeps_the_first_continuations_whole_and_stops_at_its_bound() -> None:
    first, second, third = range(100, 140), range(200, 240), range(300, 340)
    tokens, parents = merge(9, [first, second, third])
    assert tokens == [9, *first, *second][:MAX_NODES]
    assert parents[41] == 0
    assert branches(tokens, parents) >= {tuple(first), tuple(second[:23])}

"""Which guesses join a tree, in what order, and whose children are guessed next."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kangaroo.drafters.base import MAX_NODES, Prices
from kangaroo.drafters.tree import CHAIN, Branching, Guesses, Tree, merge
from kangaroo.errors import SettingsError

WIDE = Branching(num_siblings=3)


def guesses(*probabilities: float, first_token: int = 10) -> Guesses:
    """Tokens of these probabilities behind one node, the first as likely as any."""
    return Guesses(range(first_token, first_token + len(probabilities)), probabilities, probabilities[0])


def grow(
    tree: Tree, level: Sequence[Guesses], branching: Branching = WIDE, *, threshold: float = 0.0, price: float = 0.05,
    chain: float = 0.0
) -> range:  # fmt: skip
    return tree.grow(level, branching, threshold=threshold, prices=Prices(price, chain), is_last=False)


def test_tree_begins_as_its_root() -> None:
    tree = Tree(7)
    assert (tree.tokens, tree.parents, tree.confidences, tree.frontier) == ([7], [-1], [1.0], range(1))
    assert tree.drafted(0) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_siblings": 0}, "num_siblings must be at least 1, got 0"),
        ({"max_nodes": 1}, r"max_nodes must be in 2\.\.64, got 1"),
        ({"max_nodes": MAX_NODES + 1}, r"max_nodes must be in 2\.\.64, got 65"),
    ],
)
def test_impossible_branching_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Branching(**settings)


@pytest.mark.parametrize("probability", [1.0, 0.04, 1e-30, 0.0])
def test_branch_of_first_guesses_always_joins(probability: float) -> None:
    tree = Tree(7)
    for depth in range(1, 5):
        level = grow(tree, [guesses(probability, first_token=10 * depth)], CHAIN, price=1.0)
        assert level == tree.frontier == range(depth, depth + 1)
    assert tree.tokens == [7, 10, 20, 30, 40]
    assert tree.parents == [-1, 0, 1, 2, 3]
    assert tree.confidences == [1.0] + [probability] * 4
    assert tree.drafted(4) == [10, 20, 30, 40]


def test_chain_ends_where_its_next_token_does_not_pay() -> None:
    tree = Tree(7)
    # The first guess always joins; then the product of the confidences counts, not what one token promises.
    assert grow(tree, [guesses(0.1)], CHAIN, chain=0.3) == range(1, 2)
    assert grow(tree, [guesses(0.9)], CHAIN, chain=0.3) == range(2, 2)
    assert (tree.frontier, tree.tokens) == (range(2, 2), [7, 10])
    tree = Tree(7)
    for depth in range(1, 4):
        assert grow(tree, [guesses(0.7)], CHAIN, chain=0.3) == range(depth, depth + 1)
    assert grow(tree, [guesses(0.7)], CHAIN, chain=0.3) == range(4, 4)


def test_chain_of_drawn_tokens_ends_by_the_confidences_alone() -> None:
    # What was drawn must not decide whether it is verified: rejection sampling would be off.
    for probability in (0.001, 0.9):
        tree = Tree(7)
        for depth in range(1, 4):
            drawn = Guesses([depth], [probability], 0.9)
            assert grow(tree, [drawn], CHAIN, chain=0.8) == (range(depth, depth + 1) if depth < 3 else range(3, 3))


def test_first_guess_that_does_not_pay_leaves_its_siblings_their_own_price() -> None:
    # Why whoever sets prices for trees sets both alike.
    tree = Tree(7)
    grow(tree, [guesses(0.9)], chain=0.5)
    assert grow(tree, [guesses(0.4, 0.3, 0.01, first_token=20)], chain=0.5) == range(2, 3)
    assert (tree.tokens, tree.parents) == ([7, 10, 21], [-1, 0, 1])
    tree = Tree(7)
    grow(tree, [guesses(0.9)], price=0.3, chain=0.3)
    assert grow(tree, [guesses(0.4, 0.3, 0.01, first_token=20)], price=0.3, chain=0.3) == range(2, 3)
    assert (tree.tokens, tree.parents) == ([7, 10, 20], [-1, 0, 1])


def test_other_guesses_must_promise_the_price() -> None:
    tree = Tree(7)
    assert grow(tree, [guesses(0.3, 0.2, 0.1)], price=0.2) == range(1, 3)
    assert tree.tokens == [7, 10, 11]
    # Chances are products along the way: 0.3 * 0.6 and 0.2 * 0.9 fall short, the first guess behind the first joins.
    assert grow(tree, [guesses(0.6, 0.3, first_token=20), guesses(0.9, first_token=30)], price=0.2) == range(3, 4)
    assert (tree.tokens[3], tree.parents[3], tree.drafted(3)) == (20, 1, [10, 20])
    # Behind the first guesses' branch alone: a second guess of the root was no part of it.
    tree = Tree(7)
    grow(tree, [guesses(0.5, 0.5)], price=0.4)
    assert grow(tree, [guesses(0.1), guesses(0.9, first_token=30)], price=0.4) == range(3, 5)
    assert sorted(zip(tree.parents[3:], tree.tokens[3:], strict=True)) == [(1, 10), (2, 30)]


def test_best_chances_find_room_and_the_first_branch_before_all() -> None:
    tree = Tree(7)
    narrow = Branching(num_siblings=3, max_nodes=5)
    grow(tree, [guesses(0.4, 0.35)], narrow)
    level = [guesses(0.1, first_token=20), guesses(0.9, 0.5, first_token=30)]
    assert grow(tree, level, narrow) == range(3, 5)
    assert sorted(tree.tokens[3:]) == [20, 30]
    assert len(tree.frontier) == 0


@pytest.mark.parametrize("max_nodes", [2, 3, 7])
def test_full_tree_stops_growing(max_nodes: int) -> None:
    tree = Tree(7)
    branching = Branching(num_siblings=3, max_nodes=max_nodes)
    while tree.frontier:
        grow(tree, [guesses(0.5, 0.4, 0.3)] * len(tree.frontier), branching, price=0.0)
    assert len(tree.tokens) == max_nodes


def test_last_level_has_no_children() -> None:
    tree = Tree(7)
    level = tree.grow([guesses(0.9, 0.1)], WIDE, threshold=0.0, is_last=True)
    assert level == range(1, 3)
    assert len(tree.frontier) == 0


def test_guesses_below_the_threshold_are_verified_but_not_followed() -> None:
    tree = Tree(7)
    assert grow(tree, [guesses(0.3)], CHAIN, threshold=0.4) == range(1, 2)
    assert len(tree.frontier) == 0
    # At the threshold drafting goes on.
    tree = Tree(7)
    assert grow(tree, [guesses(0.4)], CHAIN, threshold=0.4) == tree.frontier == range(1, 2)


def test_nodes_that_are_followed_come_first_in_their_level() -> None:
    tree = Tree(7)
    grow(tree, [guesses(0.5, 0.45)], threshold=0.4)
    # Two nodes each with two guesses: only two of the four are likely enough behind their parent to be followed.
    level = [guesses(0.3, 0.2, first_token=20), guesses(0.8, 0.6, first_token=30)]
    assert grow(tree, level, threshold=0.4) == range(3, 7)
    assert tree.frontier == range(3, 5)
    assert tree.tokens[3:] == [30, 31, 20, 21]
    assert tree.parents[3:] == [2, 2, 1, 1]


def test_level_is_ordered_by_chance_behind_the_first_branch() -> None:
    tree = Tree(7)
    grow(tree, [guesses(0.2, 0.5, 0.3)])
    assert tree.tokens == [7, 10, 11, 12]
    tree = Tree(7)
    grow(tree, [Guesses([10, 11, 12], [0.2, 0.3, 0.5], 0.5)])
    assert tree.tokens == [7, 10, 12, 11]
    # The confidence that drafting goes on by is the draft's largest probability, sampled or not.
    assert tree.confidences == [1.0, 0.5, 0.5, 0.3]


level_of_three = st.lists(st.floats(0, 1), min_size=1, max_size=3)


@given(
    plan=st.lists(st.lists(level_of_three, min_size=8, max_size=8), min_size=1, max_size=6),
    num_siblings=st.integers(1, 3),
    max_nodes=st.integers(2, 20),
    threshold=st.floats(0, 1),
    prices=st.builds(Prices, st.floats(0, 1), st.floats(0, 1)),
)
def test_tree_keeps_its_promises(
    plan: list[list[list[float]]], num_siblings: int, max_nodes: int, threshold: float, prices: Prices
) -> None:
    tree, chances, spine = Tree(7), [1.0], 0
    branching = Branching(num_siblings, max_nodes)
    for depth, rows in enumerate(plan):
        frontier = tree.frontier
        if not frontier:
            break
        level = [
            guesses(*rows[node % len(rows)][:num_siblings], first_token=100 * depth + 10 * index)
            for index, node in enumerate(frontier)
        ]
        before = len(tree.tokens)
        new = tree.grow(level, branching, threshold=threshold, prices=prices, is_last=depth == len(plan) - 1)
        assert new == range(before, len(tree.tokens))
        assert len(tree.tokens) <= max_nodes
        assert len(tree.tokens) == len(tree.parents) == len(tree.confidences)
        for node in new:
            parent = tree.parents[node]
            assert parent in frontier
            tokens, probabilities, _ = level[parent - frontier.start]
            rank = tokens.index(tree.tokens[node])
            chances.append(chances[parent] * probabilities[rank])
            if rank == 0 and parent == spine:
                # The first guess is the likeliest, so that its confidence is its probability.
                assert parent == 0 or chances[node] >= prices.chain
            else:
                assert chances[node] >= prices.branch
            assert tree.drafted(node) == [*tree.drafted(parent), tree.tokens[node]]
        if spine in frontier:
            first = level[spine - frontier.start].tokens[0]
            spine = next((node for node in new if tree.parents[node] == spine and tree.tokens[node] == first), -1)
        # Those that are followed are the first of the level, and all of them confident.
        assert tree.frontier.start == before
        assert all(tree.confidences[node] >= threshold for node in tree.frontier)
        if depth < len(plan) - 1 and len(tree.tokens) < max_nodes:
            assert all(tree.confidences[node] < threshold for node in range(tree.frontier.stop, len(tree.tokens)))
        else:
            assert len(tree.frontier) == 0


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

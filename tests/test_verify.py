"""walk() follows the target's choices through any tree; a brute-force recursion says where it must end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.types import Draft
from kangaroo.verify import walk


def padded(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def tree(tokens: list[list[int]], parents: list[list[int]], *, padding: int = 0) -> Draft:
    width = max(map(len, tokens)) + padding
    return Draft(
        tokens=padded(tokens, width),
        parents=padded(parents, width),
        depths=padded([[0] * len(row) for row in tokens], width),
        num_nodes=tuple(map(len, tokens)),
    )


def walked(draft: Draft, picks: list[list[int]]) -> list[list[int]]:
    return walk(draft, padded(picks, draft.tokens.shape[1])).tolist()


def longest_match(node: int, tokens: list[int], parents: list[int], picks: list[int]) -> list[int]:
    """The accepted path from node on, by recursion; of equal siblings the first counts."""
    for child, parent in enumerate(parents):
        if parent == node and tokens[child] == picks[node]:
            return [node, *longest_match(child, tokens, parents, picks)]
    return [node]


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    num_nodes = draw(st.integers(1, 9))
    token = st.integers(0, 2)
    tokens = draw(st.lists(token, min_size=num_nodes, max_size=num_nodes))
    picks = draw(st.lists(token, min_size=num_nodes, max_size=num_nodes))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, num_nodes)]
    return tokens, parents, picks


@given(st.lists(rows(), min_size=1, max_size=4), st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_walk_ends_where_brute_force_recursion_does(
    batch: list[tuple[list[int], list[int], list[int]]], padding: int
) -> None:
    tokens, parents, picks = (list(part) for part in zip(*batch, strict=True))
    expected = [longest_match(0, *row) for row in batch]
    longest = max(map(len, expected))
    assert walked(tree(tokens, parents, padding=padding), picks) == padded(expected, longest).tolist()


def test_root_alone_is_accepted_when_no_child_matches() -> None:
    assert walked(tree([[7, 1, 2]], [[-1, 0, 0]]), [[3, 1, 2]]) == [[0]]


def test_chain_is_accepted_up_to_the_first_mismatch_even_if_later_tokens_match() -> None:
    assert walked(tree([[7, 1, 2, 3, 4]], [[-1, 0, 1, 2, 3]]), [[1, 2, 9, 4, 5]]) == [[0, 1, 2]]


def test_first_of_equal_siblings_wins_although_the_second_has_the_longer_branch() -> None:
    assert walked(tree([[7, 1, 1, 2]], [[-1, 0, 0, 2]]), [[1, 2, 2, 0]]) == [[0, 1]]


def test_matching_token_below_a_rejected_node_is_not_accepted() -> None:
    assert walked(tree([[7, 5, 1]], [[-1, 0, 1]]), [[1, 1, 1]]) == [[0]]


def test_padding_is_never_accepted_even_where_the_choice_is_padding_too() -> None:
    draft = tree([[7], [7, 1, 2]], [[-1], [-1, 0, 1]])
    assert walk(draft, torch.tensor([[-1, -1, -1], [1, 2, 0]])).tolist() == [[0, -1, -1], [0, 1, 2]]


def test_disagreeing_shapes_are_refused() -> None:
    draft = tree([[7, 1]], [[-1, 0]])
    with pytest.raises(ValueError, match=r"one shape \[B, N\].*\(1, 3\)"):
        walk(draft, torch.tensor([[1, 2, 3]]))

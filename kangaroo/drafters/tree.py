"""A draft as it grows: a tree of guesses, level by level."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from kangaroo.drafters.base import DEFAULT_PRICES, MAX_NODES, Prices
from kangaroo.errors import SettingsError


@dataclass(frozen=True)
class Branching:
    """How wide a drafter may grow its trees; one sibling makes chains.

    num_siblings: guesses for the token behind one node; max_nodes: nodes of a draft, its root included.
    """

    num_siblings: int = 1
    max_nodes: int = MAX_NODES

    def __post_init__(self) -> None:
        if self.num_siblings < 1:
            raise SettingsError(f"num_siblings must be at least 1, got {self.num_siblings}")
        if not 2 <= self.max_nodes <= MAX_NODES:
            raise SettingsError(f"max_nodes must be in 2..{MAX_NODES}, got {self.max_nodes}")


CHAIN = Branching()


class Guesses(NamedTuple):
    """What may follow a node: tokens, best first, the draft's raw probability of each, and its largest of any."""

    tokens: SequenceOf[int]
    probabilities: SequenceOf[float]
    confidence: float


class Tree:
    """One sequence's draft: nodes in the order they were added, level by level, the root first.

    frontier: the nodes of the last level whose children are still to be guessed; they come first in their level.
    """

    def __init__(self, root: int) -> None:
        self.tokens = [root]
        self.parents = [-1]
        self.confidences = [1.0]
        self.frontier = range(1)
        self._chances = [1.0]
        # The end of the branch of first guesses, and the product of the confidences on it.
        self._spine = 0
        self._spine_chance = 1.0

    def drafted(self, node: int) -> list[int]:
        """The guesses on the way from the root to a node, the node's own last."""
        path: list[int] = []
        while node > 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return path[::-1]

    def grow(
        self, guesses: SequenceOf[Guesses], branching: Branching, *, threshold: float,
        prices: Prices = DEFAULT_PRICES, is_last: bool
    ) -> range:  # fmt: skip
        """Add a level: children of the frontier's nodes, one Guesses each, that are worth verifying; returns them.

        The first guess behind the branch of first guesses joins as in a chain: always at first, later where the
        confidences on its way promise prices.chain; that they do not depend on what was drawn keeps every rule of
        acceptance lossless. Any other must promise prices.branch, its chance being the product of the probabilities
        on its way, and find room among max_nodes.
        The new frontier are those of confidence at least threshold, none where this level is_last.
        """
        found = []
        for node, (tokens, probabilities, confidence) in zip(self.frontier, guesses, strict=True):
            for rank, (token, probability) in enumerate(zip(tokens, probabilities, strict=True)):
                on_spine = rank == 0 and node == self._spine
                chance = self._chances[node] * probability
                pays = chance >= prices.branch
                if on_spine:
                    self._spine_chance *= confidence
                    pays = node == 0 or self._spine_chance >= prices.chain
                if pays:
                    found.append((on_spine, chance, node, token, probability if rank else confidence))
        found.sort(key=lambda one: (one[0], one[1]), reverse=True)
        del found[branching.max_nodes - len(self.tokens) :]
        # A node without children needs no more than to be verified: those that get some come first.
        found.sort(key=lambda one: one[4] >= threshold, reverse=True)
        first = len(self.tokens)
        for on_spine, chance, node, token, confidence in found:
            if on_spine:
                self._spine = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.confidences.append(confidence)
            self._chances.append(chance)
        is_full = len(self.tokens) >= branching.max_nodes
        num_growing = 0 if is_last or is_full else sum(one[4] >= threshold for one in found)
        self.frontier = range(first, first + num_growing)
        return range(first, len(self.tokens))


def merge(root: int, continuations: SequenceOf[SequenceOf[int]]) -> tuple[list[int], list[int]]:
    """Tokens and parents of a tree of whole continuations, which share what they begin with.

    The first ones come first; what would be more than MAX_NODES is left out.
    """
    tokens, parents, children = [root], [-1], dict[tuple[int, int], int]()
    for continuation in continuations:
        node = 0
        for token in continuation:
            child = children.setdefault((node, token), len(tokens))
            if child == MAX_NODES:
                return tokens, parents
            if child == len(tokens):
                tokens.append(token)
                parents.append(node)
            node = child
    return tokens, parents

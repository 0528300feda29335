"""An index of a growing text's n-grams, and where each of them ends."""

from array import array
from collections.abc import Iterator, Sequence

# Stands between documents; no n-gram holds it.
BREAK = -1
_ROOT = 0


def confidence_of(length: int) -> float:
    """How sure a match of so many tokens is: roughly, every one of them halves the doubt."""
    return 1 - 0.5**length


class NgramIndex:
    """Every n-gram of a text, of 1 to max_ngram tokens, with the positions it ends at, newest first.

    The n-grams are a trie in one dict: adding a token takes one step in it for each length, as the n-gram that ends
    here extends the one of length n - 1 that ended before it. Matches are exact, at about 130 bytes for every different
    n-gram and 4 * max_ngram for every token.
    """

    def __init__(self, tokens: list[int], max_ngram: int) -> None:
        """tokens: the text, which may grow; BREAK separates documents."""
        self.tokens = tokens
        # The nodes of the last tokens' n-grams, by length; node 0 is the n-gram of none.
        self.suffixes = [_ROOT]
        self._children: dict[int, int] = {}
        self._latest = array("i", [-1])  # by node, where its n-gram ended last
        self._previous = [array("i") for _ in range(max_ngram)]  # by length and position, where it ended before
        self._num_indexed = 0

    def update(self) -> None:
        """Index the tokens that have come since."""
        for position in range(self._num_indexed, len(self.tokens)):
            self._add(self.tokens[position], position)
        self._num_indexed = len(self.tokens)

    def locate(self, tokens: Sequence[int]) -> list[int]:
        """The nodes of the n-grams that end other tokens, by length, up to the longest that occurs in this text."""
        suffixes = [_ROOT]
        for token in tokens:
            extended = [_ROOT]
            for parent in suffixes[: len(self._previous)]:
                node = self._children.get(parent << 32 | token)
                if node is None:
                    break
                extended.append(node)
            suffixes = extended
        return suffixes

    def ends(self, node: int, length: int) -> Iterator[int]:
        """The positions at which a node's n-gram of this length ends, newest first."""
        position = self._latest[node]
        while position >= 0:
            yield position
            position = self._previous[length - 1][position]

    def _add(self, token: int, position: int) -> None:
        parents = [] if token == BREAK else self.suffixes
        suffixes = [_ROOT]
        for parent, previous in zip(parents, self._previous, strict=False):
            node = self._children.setdefault(parent << 32 | token, len(self._latest))
            if node == len(self._latest):
                self._latest.append(-1)
            previous.append(self._latest[node])
            self._latest[node] = position
            suffixes.append(node)
        for previous in self._previous[len(suffixes) - 1 :]:
            previous.append(-1)
        self.suffixes = suffixes

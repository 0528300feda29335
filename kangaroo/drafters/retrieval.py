"""REST: guesses are what followed the text's last tokens in a datastore (He et al. 2023, arXiv 2311.08252)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from kangaroo.drafters.base import MAX_NODES, Batch, Sequence
from kangaroo.drafters.datastore import Datastore
from kangaroo.drafters.depths import DraftDepths
from kangaroo.drafters.settings import RetrievalSettings
from kangaroo.drafters.stopping import choose_stopping
from kangaroo.drafters.tree import Branching
from kangaroo.errors import SettingsError
from kangaroo.model.cache import depths_of
from kangaroo.types import Draft, Outcome

if TYPE_CHECKING:
    from kangaroo.model.checkpoint import LoadedModel

# What a count is lessened by, d = DISCOUNT / (DISCOUNT + l) behind l matching tokens: the longer a match, the more it
# tells. Fitted to the bundled model's texts, greedy and sampled, over datastores of its own texts and of its corpus.
DISCOUNT = 10.0


def build(model: LoadedModel, settings: RetrievalSettings) -> RetrievalDrafter:
    """The drafter these settings ask for; raises DatastoreError where there is no datastore for the model."""
    folder = settings.datastore or model.folder / "datastore"
    datastore = Datastore.open(
        folder, vocab_size=model.target.config.vocab_size, fingerprint=model.tokenizer.fingerprint()
    )
    return RetrievalDrafter(datastore, settings)


class RetrievalDrafter:
    """Drafts the most frequent continuations of the text's longest suffix that the datastore holds."""

    name = "retrieval"
    taps: tuple[int, ...] = ()

    def __init__(self, datastore: Datastore, settings: RetrievalSettings | None = None) -> None:
        """settings.datastore is not looked at. Raises SettingsError for the others outside their range."""
        settings = settings or RetrievalSettings()
        for name in ("min_ngram", "num_tokens", "max_matches"):
            if getattr(settings, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(settings, name)}")
        if settings.max_ngram < settings.min_ngram:
            raise SettingsError(f"max_ngram must be at least min_ngram ({settings.min_ngram}), "
                                f"got {settings.max_ngram}")  # fmt: skip
        self._datastore = datastore
        self._settings = settings
        self._stopping = choose_stopping(settings.num_tokens, settings.eta)
        self._branching = Branching(MAX_NODES, settings.max_nodes)
        self._depths = DraftDepths(self._stopping)

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Nothing to prepare."""

    def draft(self, batch: Batch) -> Draft:
        """Look up every sequence's end; its root alone where the datastore has nothing that pays.

        Every node has its own confidence, see merge().
        """
        tokens, parents, confidences = [], [], []
        for sequence in batch.sequences:
            tree = self._look_up(sequence, batch.prices.branch)
            self._depths.note(sequence, max(depths_of(tree[1])))
            tokens.append(tree[0])
            parents.append(tree[1])
            confidences.append(tree[2])
        return Draft(tokens, parents, confidence=confidences)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Tell the stopping rule how much of the last drafts was accepted."""
        self._depths.settle(sequences, outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        self._depths.forget(sequences)

    def _look_up(self, sequence: Sequence, price: float) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and confidences of one sequence's draft."""
        settings, params = self._settings, sequence.request.params
        depth = min(self._stopping.max_length, sequence.max_draft)
        if depth == 0:
            return [sequence.tokens[-1]], [-1], [1.0]
        length, places = self._datastore.find(
            sequence.tokens, min_ngram=settings.min_ngram, max_ngram=settings.max_ngram
        )
        rows = self._datastore.continuations(length, places, num_tokens=depth, max_matches=settings.max_matches)
        # Block verification judges chains alone.
        branching = replace(self._branching, num_siblings=1) if params.rule == "block" else self._branching
        return merge(sequence.tokens[-1], rows, length=length, branching=branching,
                     threshold=self._stopping.threshold, price=price)  # fmt: skip


def merge(
    root: int, continuations: SequenceOf[SequenceOf[int]], *, length: int, branching: Branching, threshold: float,
    price: float
) -> tuple[list[int], list[int], list[float]]:  # fmt: skip
    """Tokens, parents and confidences of the tree of the likeliest beginnings of continuations, behind a match.

    length: the tokens that match. Nodes join, likeliest first, while they promise at least price and branching leaves
    room. A child that c of its parent's n continuations agree on has the confidence (c - d) / n, by absolute
    discounting (Ney, Essen and Kneser 1994), see DISCOUNT for d, and the chance of that times its parent's. One below
    the threshold gets no children.
    """
    tokens: list[int] = []
    parents: list[int] = []
    confidences: list[float] = []
    # Negated chance, a number that sets equals in the order found, depth, parent, token, confidence and continuations.
    waiting: list[tuple[float, int, int, int, int, float, SequenceOf[SequenceOf[int]]]]
    waiting, num_found = [(-1.0, 0, 0, -1, root, 1.0, continuations)], 1
    while waiting and len(tokens) < branching.max_nodes:
        chance, _, depth, parent, token, confidence, rows = heappop(waiting)
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        confidences.append(confidence)
        if confidence < threshold:
            continue
        groups: dict[int, list[SequenceOf[int]]] = {}
        for row in rows:
            if len(row) > depth:
                groups.setdefault(row[depth], []).append(row)
        discount = DISCOUNT / (DISCOUNT + length + depth)
        for child, group in sorted(groups.items(), key=lambda one: len(one[1]), reverse=True)[: branching.num_siblings]:
            confidence = (len(group) - discount) / len(rows)
            if -chance * confidence < price:
                break
            heappush(waiting, (chance * confidence, num_found, depth + 1, node, child, confidence, group))
            num_found += 1
    return tokens, parents, confidences

"""Drafters that know the texts and guess by a script: right, wrong, right at first, or in trees."""

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf

from kangaroo.drafters.base import MAX_NODES, Batch, Sequence
from kangaroo.engine.decoding import Decoding, Text
from kangaroo.engine.engine import Engine
from kangaroo.model.cache import depths_of
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.tiny import VOCAB_SIZE, chain_parents

PROMPT = (4, 99, 3)

# The whole text, prompt included, that plain decoding makes of each request.
Texts = Mapping[Request, SequenceOf[int]]
# Guesses behind the root as (token, parent node), parents first, given the length of the text so far and the true text.
Guess = Callable[[int, SequenceOf[int]], list[tuple[int, int]]]


class ScriptedDrafter:
    """Guesses for every sequence what a script makes of its true text."""

    name = "scripted"
    taps: tuple[int, ...] = ()

    def __init__(self, texts: Texts, guess: Guess) -> None:
        self._texts = texts
        self._guess = guess

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        pass

    def draft(self, batch: Batch) -> Draft:
        trees = [self._grow(sequence) for sequence in batch.sequences]
        tokens, parents = zip(*trees, strict=True)
        return Draft(tokens=tokens, parents=parents)

    def _grow(self, sequence: Sequence) -> tuple[list[int], tuple[int, ...]]:
        """Tokens and parents of the script's tree, without the nodes that are too deep."""
        tokens, parents, new_ids = [sequence.tokens[-1]], [-1], {0: 0}
        guesses = self._guess(len(sequence.tokens), self._texts[sequence.request])
        depths = depths_of([-1, *(parent for _, parent in guesses)])
        for node, (token, parent) in enumerate(guesses, 1):
            if depths[node] <= sequence.max_draft:
                new_ids[node] = len(tokens)
                tokens.append(token)
                parents.append(new_ids[parent])
        return tokens, tuple(parents)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        pass

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        pass


class TextDrafter(ScriptedDrafter):
    """Guesses the next gamma tokens of the text it was given for a prompt."""

    def __init__(self, texts: Mapping[tuple[int, ...], SequenceOf[int]], gamma: int) -> None:
        self.held: set[Sequence] = set()
        self.max_drafts: list[int] = []
        self._text_of = texts
        self._gamma = gamma

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        self.held |= set(sequences)

    def _grow(self, sequence: Sequence) -> tuple[list[int], tuple[int, ...]]:
        self.max_drafts.append(sequence.max_draft)
        length = len(sequence.tokens)
        text = self._text_of.get(sequence.request.prompt_ids, ())
        tokens = [sequence.tokens[-1], *text[length : length + min(self._gamma, sequence.max_draft)]]
        return tokens, chain_parents(len(tokens))

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        assert set(sequences) <= self.held

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        self.held -= set(sequences)


def wrong(token: int) -> int:
    return (token + 1) % VOCAB_SIZE


def always_right(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    return [(token, depth) for depth, token in enumerate(text[length : length + 4])]


def always_wrong(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    return [(wrong(token), depth) for depth, token in enumerate(text[length : length + 4])]


def right_at_first(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    """Right for the first few tokens of five, as many as the text's length says."""
    num_right = (5, 0, 2, 3, 1)[length % 5]
    return [
        (token if depth < num_right else wrong(token), depth) for depth, token in enumerate(text[length : length + 5])
    ]


def branching(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    """Trees of uneven depth, the true branch in another place each time, or cut short, or missing."""
    one, two, three, *_ = [*text[length : length + 3], 0, 0, 0]
    trees = [
        # Three siblings, the true one in the middle, a false branch as deep as the true one.
        [(wrong(one), 0), (one, 0), (wrong(wrong(one)), 0), (two, 1), (two, 2), (wrong(three), 4), (three, 5)],
        # The true branch last, its nodes scattered; an equal pair of siblings below.
        [(wrong(one), 0), (two, 1), (one, 0), (three, 2), (two, 3), (two, 3), (three, 5), (wrong(three), 5)],
        # The true branch first and shallow, the false one deep.
        [(one, 0), (wrong(one), 0), (two, 2), (three, 3), (wrong(two), 1)],
        # No true branch at all.
        [(wrong(one), 0), (wrong(wrong(one)), 0), (two, 1), (three, 3)],
        # A chain beside the trees of others.
        [(one, 0), (two, 1), (three, 2)],
    ]
    return trees[length % len(trees)]


def wild(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    """A tree of any shape and up to the most nodes, about half of them true for their depth."""
    draw = random.Random(length)
    guesses: list[tuple[int, int]] = []
    parents = [-1, *(draw.randrange(max(0, node - 6), node) for node in range(1, draw.choice([2, 6, 20, MAX_NODES])))]
    for parent, depth in list(zip(parents, depths_of(parents), strict=True))[1:]:
        at = length + depth - 1
        is_true = at < len(text) and draw.random() < 0.5
        guesses.append((text[at] if is_true else draw.randrange(VOCAB_SIZE), parent))
    return guesses


def submit(
    engine: Engine,
    params: SamplingParams,
    *,
    prompt: SequenceOf[int] = PROMPT,
    eos_ids: SequenceOf[int] = (),
    text: Text | None = None,
) -> Decoding:
    return engine.submit(Request(tuple(prompt), params, frozenset(eos_ids)), text)


def decode(
    engine: Engine,
    params: SamplingParams,
    *,
    prompt: SequenceOf[int] = PROMPT,
    eos_ids: SequenceOf[int] = (),
    text: Text | None = None,
) -> Decoding:
    """A request run to its end."""
    decoding = submit(engine, params, prompt=prompt, eos_ids=eos_ids, text=text)
    engine.run(decoding)
    return decoding


def sequence_of(decoding: Decoding) -> Sequence:
    assert decoding.sequence is not None
    return decoding.sequence

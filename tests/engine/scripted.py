"""A drafter that knows the texts, and requests run to their end: shared by the tests of the engine."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from kangaroo.drafters.base import Batch, Sequence
from kangaroo.engine.decoding import Decoding, Text
from kangaroo.engine.engine import Engine
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.tiny import chain_parents

PROMPT = (4, 99, 3)


class TextDrafter:
    """Guesses the next gamma tokens of the text it was given for a prompt."""

    name = "text"
    taps: tuple[int, ...] = ()

    def __init__(self, texts: Mapping[tuple[int, ...], SequenceOf[int]], gamma: int) -> None:
        self.held: set[Sequence] = set()
        self.max_drafts: list[int] = []
        self._texts = texts
        self._gamma = gamma

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        self.held |= set(sequences)

    def draft(self, batch: Batch) -> Draft:
        rows = []
        for sequence in batch.sequences:
            self.max_drafts.append(sequence.max_draft)
            length = len(sequence.tokens)
            text = self._texts.get(sequence.request.prompt_ids, ())
            rows.append([sequence.tokens[-1], *text[length : length + min(self._gamma, sequence.max_draft)]])
        return Draft(rows, tuple(chain_parents(len(row)) for row in rows))

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        assert set(sequences) <= self.held

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        self.held -= set(sequences)


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

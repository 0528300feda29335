"""Of several drafters the one that earns most is asked first, for every text on its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from kangaroo.drafters import auto as module
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.auto import TRY_EVERY, AutoDrafter
from kangaroo.drafters.base import Batch
from kangaroo.drafters.base import Sequence as DecodedSequence
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.drafters.tree import Branching
from kangaroo.engine.step import prefill, verify_draft
from kangaroo.model import packed
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.engine.scripts import ScriptedDrafter
from tests.lossless import PROMPTS, decode
from tests.tiny import chain_parents, tame_transformer

EXIT_LAYER = 2


class Clock:
    """Stands for the module time, whose seconds pass when a source drafts."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Source:
    """Drafts one guess, its own number; earns: the tokens its step emits for each text, none where it is silent."""

    taps: tuple[int, ...] = ()

    def __init__(self, number: int, clock: Clock, earns: int | Mapping[DecodedSequence, int], cost_s: float = 1.0):
        self.name = str(number)
        self.number, self.earns, self.cost_s = number, earns, cost_s
        self.asked: list[list[DecodedSequence]] = []
        self.held: set[DecodedSequence] = set()
        self.num_accepted = 0
        self._clock = clock

    def earning(self, sequence: DecodedSequence) -> int:
        return self.earns if isinstance(self.earns, int) else self.earns[sequence]

    def begin(self, sequences: Sequence[DecodedSequence], *, num_slots: int) -> None:
        self.held |= set(sequences)

    def draft(self, batch: Batch) -> Draft:
        self._clock.now_s += self.cost_s
        self.asked.append(list(batch.sequences))
        tokens = [[one.tokens[-1], self.number][: 2 if self.earning(one) else 1] for one in batch.sequences]
        return Draft(tokens, [chain_parents(len(row)) for row in tokens])

    def accept(self, sequences: Sequence[DecodedSequence], outcome: Outcome) -> None:
        self.num_accepted += len(sequences)

    def end(self, sequences: Sequence[DecodedSequence]) -> None:
        self.held -= set(sequences)


def make_sequences(count: int) -> list[DecodedSequence]:
    request = Request((4, 99), SamplingParams())
    return [DecodedSequence(request, slot=slot, max_draft=5) for slot in range(count)]


def take_steps(
    drafter: AutoDrafter, sources: Sequence[Source], sequences: Sequence[DecodedSequence], *, num_steps: int
) -> list[list[int | None]]:
    """For every step the number of the source that drafted for each sequence."""
    # Sources that resume at layer 0 need neither target nor cache.
    batch = Batch(None, None, sequences)  # type: ignore[arg-type]
    drafted: list[list[int | None]] = []
    for _ in range(num_steps):
        draft = drafter.draft(batch)
        drafted.append([row[1] if len(row) > 1 else None for row in draft.tokens])
        earned = [
            1 if number is None else sources[number].earning(sequence)
            for number, sequence in zip(drafted[-1], sequences, strict=True)
        ]
        taps: Any = ({},) * len(sequences)
        drafter.accept(sequences, Outcome(((0,),) * len(sequences), tuple((7,) * count for count in earned), taps))
    return drafted


def begin(sources: Sequence[Source], num_sequences: int = 1) -> tuple[AutoDrafter, list[DecodedSequence]]:
    drafter, sequences = AutoDrafter(sources), make_sequences(num_sequences)
    drafter.begin(sequences, num_slots=64)
    return drafter, sequences


@pytest.mark.parametrize(
    ("earns", "costs_s"), [((2, 5), (1.0, 1.0)), ((4, 4), (1.0, 0.5)), ((5, 3), (1.0, 0.1))], ids=str
)
def test_best_earner_is_asked_first_once_all_are_known(
    clock: Clock, earns: tuple[int, int], costs_s: tuple[float, float]
) -> None:
    sources = [Source(number, clock, earns[number], costs_s[number]) for number in range(2)]
    drafter, sequences = begin(sources)
    assert take_steps(drafter, sources, sequences, num_steps=10) == [[0]] + [[1]] * 9
    assert len(sources[0].asked) == 1
    assert sources[0].num_accepted == sources[1].num_accepted == 10


def test_source_that_has_nothing_to_say_leaves_the_step_to_the_next(clock: Clock) -> None:
    sources = [Source(0, clock, 0), Source(1, clock, 3), Source(2, clock, 0)]
    drafter, sequences = begin(sources)
    assert take_steps(drafter, sources, sequences, num_steps=6) == [[1]] * 6
    assert len(sources[0].asked) == 6
    sources[1].earns = 0
    assert take_steps(drafter, sources, sequences, num_steps=2) == [[None]] * 2


def test_step_that_nobody_drafted_for_counts_for_nobody(clock: Clock) -> None:
    sources = [Source(0, clock, 4), Source(1, clock, 3)]
    drafter, sequences = begin(sources)
    assert take_steps(drafter, sources, sequences, num_steps=4)[-1] == [0]
    sources[0].earns = sources[1].earns = 0
    assert take_steps(drafter, sources, sequences, num_steps=8) == [[None]] * 8
    sources[0].earns, sources[1].earns = 4, 3
    assert take_steps(drafter, sources, sequences, num_steps=3) == [[0]] * 3


def test_sequence_that_may_not_be_guessed_for_is_not_asked_for(clock: Clock) -> None:
    sources = [Source(0, clock, 3)]
    drafter, sequences = begin(sources, 2)
    sequences[0].max_draft = 0
    assert take_steps(drafter, sources, sequences, num_steps=3) == [[None, 0]] * 3
    assert sources[0].asked == [[sequences[1]]] * 3


def test_second_best_is_tried_from_time_to_time_and_kept_where_it_got_better(clock: Clock) -> None:
    sources = [Source(0, clock, 5), Source(1, clock, 2)]
    drafter, sequences = begin(sources)
    drafted = take_steps(drafter, sources, sequences, num_steps=3 * TRY_EVERY)
    assert [step for step, row in enumerate(drafted, 1) if row == [1]] == [
        2,
        *range(TRY_EVERY, 3 * TRY_EVERY + 1, TRY_EVERY),
    ]
    sources[1].earns = 50
    drafted = take_steps(drafter, sources, sequences, num_steps=2 * TRY_EVERY - 1)
    assert drafted == [[0]] * (TRY_EVERY - 1) + [[1]] * TRY_EVERY


def test_every_text_has_a_best_earner_of_its_own(clock: Clock) -> None:
    sources = [Source(0, clock, 0), Source(1, clock, 0)]
    drafter, sequences = begin(sources, 3)
    first, second, third = sequences
    sources[0].earns = {first: 6, second: 1, third: 6}
    sources[1].earns = {first: 1, second: 6, third: 1}
    drafted = take_steps(drafter, sources, sequences, num_steps=12)
    assert drafted[0] == [0, 0, 0]
    assert drafted[3:] == [[0, 1, 0]] * 9
    # Those who want the same source are asked for together.
    assert sources[0].asked[-1] == [first, third]
    assert sources[1].asked[-1] == [second]


def test_new_text_starts_with_what_earned_most_in_others(clock: Clock) -> None:
    sources = [Source(0, clock, 2), Source(1, clock, 5)]
    drafter, sequences = begin(sources)
    take_steps(drafter, sources, sequences, num_steps=5)
    fresh = make_sequences(1)
    drafter.begin(fresh, num_slots=64)
    assert take_steps(drafter, sources, fresh, num_steps=3) == [[1]] * 3
    # A few steps of its own count for more.
    sources[1].earns = 1
    assert take_steps(drafter, sources, fresh, num_steps=12)[-1] == [0]


def test_ended_sequences_are_forgotten_by_all(clock: Clock) -> None:
    sources = [Source(0, clock, 2), Source(1, clock, 5)]
    drafter, sequences = begin(sources, 2)
    assert sources[0].held == sources[1].held == drafter._memory.keys() == set(sequences)
    drafter.end(sequences[:1])
    assert sources[0].held == sources[1].held == drafter._memory.keys() == {sequences[1]}
    drafter.end(sequences)
    assert not sources[0].held | sources[1].held | drafter._memory.keys()


def test_tokens_on_a_device_are_read_without_their_padding(clock: Clock) -> None:
    class OnDevice(Source):
        def draft(self, batch: Batch) -> Draft:
            draft = super().draft(batch)
            rows = [[*row, -1][:2] for row in draft.tokens]
            return Draft(torch.tensor(rows), draft.parents)

    source = OnDevice(0, clock, 3)
    drafter, sequences = begin([source], 2)
    source.earns = {sequences[0]: 0, sequences[1]: 3}
    batch = Batch(None, None, sequences)  # type: ignore[arg-type]
    assert [*map(list, drafter.draft(batch).tokens)] == [[99], [99, 0]]


def test_taps_are_those_of_all_sources(clock: Clock) -> None:
    sources = [Source(number, clock, 1) for number in range(3)]
    sources[0].taps, sources[1].taps = (4, 2), (2, 1)
    assert AutoDrafter(sources).taps == (1, 2, 4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drafts_of_different_sources_are_verified_in_one_pass(family: str) -> None:
    """Row by row as each source would have it alone, the states of those that bring none being worked out."""
    loose = tame_transformer(family, EXIT_LAYER)
    target, params = packed.pack(loose), SamplingParams(12, seed=0)
    texts = {
        prompt: [*prompt, *one.new_tokens]
        for prompt, one in zip(PROMPTS, decode(target, PlainDrafter(), params), strict=True)
    }
    adapter = Adapter.initialize(loose, EXIT_LAYER).pack(target)

    def guess(length: int, text: Sequence[int]) -> list[tuple[int, int]]:
        """A tree for the first text, whose true branch is its last."""
        one, two = text[length : length + 2]
        return [(0, 0), (one, 0), (1, 1), (two, 2)] if text == texts[PROMPTS[0]] else []

    def draft_with(*, is_alone: bool) -> tuple[Batch, Any, Draft]:
        drafter: Any = KangarooDrafter(target, adapter, stopping=FixedLength(3), branching=Branching(2, 8))
        sequences = [DecodedSequence(Request(prompt, params), slot=slot) for slot, prompt in enumerate(PROMPTS)]
        if not is_alone:
            known = {sequence.request: texts[sequence.request.prompt_ids] for sequence in sequences}
            drafter = AutoDrafter([ScriptedDrafter(known, guess), drafter])
        batch = Batch(target, target.new_cache(len(sequences), 128), sequences)
        drafter.begin(sequences, num_slots=128)
        outcome = prefill(batch, drafter, num_rows=[len(prompt) for prompt in PROMPTS])
        for sequence, (token,) in zip(sequences, outcome.tokens, strict=True):
            sequence.append(token, "bonus")
        # For the last no guess is wanted.
        sequences[0].max_draft = sequences[1].max_draft = 5
        return batch, drafter, drafter.draft(batch)

    _, _, alone = draft_with(is_alone=True)
    batch, drafter, draft = draft_with(is_alone=False)
    assert draft.resume_layer == EXIT_LAYER
    assert [*map(list, draft.parents)] == [[-1, 0, 0, 1, 2], list(alone.parents[1]), [-1]]
    assert list(draft.tokens[1]) == list(alone.tokens[1])
    assert draft.hidden is not None
    assert alone.hidden is not None
    scripted, own, root = draft.hidden.split(draft.num_nodes)
    assert torch.equal(own, alone.hidden.split(alone.num_nodes)[1])
    assert torch.equal(root, alone.hidden[-1:])
    text = texts[PROMPTS[0]][: len(PROMPTS[0]) + 3]
    attention = CachedPass(target.new_cache(1, 64), [Segment(0, 0, len(text))])
    whole, _ = target.forward(target.embed(text), (0, EXIT_LAYER), attention=attention)
    # The root and the true branch.
    assert torch.equal(scripted[[0, 2, 4]], whole[-3:])
    outcome = verify_draft(batch, drafter, draft=draft)
    for sequence, prompt, tokens in zip(batch.sequences, PROMPTS, outcome.tokens, strict=True):
        assert sequence.error is None
        assert list(tokens) == texts[prompt][len(prompt) + 1 :][: len(tokens)]
    assert outcome.paths[::2] == ((0, 2, 4), (0,))

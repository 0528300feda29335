"""Of several drafters the one whose draft promises most is taken, for every text on its own."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch

from kangaroo.drafters import auto as module
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.auto import AutoDrafter
from kangaroo.drafters.base import Batch, Prices
from kangaroo.drafters.base import Sequence as DecodedSequence
from kangaroo.drafters.earnings import Earnings
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.drafters.tree import Branching
from kangaroo.engine.step import prefill, verify_draft
from kangaroo.model import packed
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.types import Draft, Outcome, Request, SamplingParams, Verified
from tests.engine.scripts import ScriptedDrafter
from tests.lossless import PROMPTS, assert_lossless, decode
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


RIGHT = 7
STEP_S, ROW_S = 1.0, 0.1


class Source:
    """Drafts so many guesses that a step emits what it earns, and a wrong one, its own number; none to earn 0."""

    taps: tuple[int, ...] = ()

    def __init__(self, number: int, clock: Clock, earns: int | Mapping[DecodedSequence, int], cost_s: float = 1.0):
        self.name = str(number)
        self.number, self.earns, self.cost_s = number, earns, cost_s
        self.asked: list[list[DecodedSequence]] = []
        self.held: set[DecodedSequence] = set()
        self.num_told = 0
        self.confidence: float | None = None
        self._clock = clock

    def begin(self, sequences: Sequence[DecodedSequence], *, num_slots: int) -> None:
        self.held |= set(sequences)

    def draft(self, batch: Batch) -> Draft:
        self._clock.now_s += self.cost_s
        self.asked.append(list(batch.sequences))
        tokens = [[one.tokens[-1], *self._guess(one)] for one in batch.sequences]
        confidence = [[1.0] + [self.confidence] * (len(row) - 1) for row in tokens] if self.confidence else None
        return Draft(tokens, [chain_parents(len(row)) for row in tokens], confidence=confidence)

    def accept(self, sequences: Sequence[DecodedSequence], outcome: Outcome) -> None:
        self.num_told += sum(map(len, outcome.tokens))

    def end(self, sequences: Sequence[DecodedSequence]) -> None:
        self.held -= set(sequences)

    def _guess(self, sequence: DecodedSequence) -> list[int]:
        earns = self.earns if isinstance(self.earns, int) else self.earns[sequence]
        return [RIGHT] * (earns - 1) + [100 + self.number] if earns else []


class Eager(Source):
    """Has the target read what it drafts where it may."""

    def draft(self, batch: Batch) -> Draft:
        draft = super().draft(batch)
        if batch.taps is None:
            return draft
        num_rows = sum(draft.num_nodes)
        time_s = STEP_S + ROW_S * num_rows
        self._clock.now_s += time_s
        return replace(draft, verified=Verified([RIGHT] * num_rows, time_s, {}))


class Lookup(Source):
    """Costs nothing, and always drafts ten guesses."""

    def __init__(self, clock: Clock, earns: int) -> None:
        super().__init__(0, clock, earns, cost_s=0.0)

    def _guess(self, sequence: DecodedSequence) -> list[int]:
        return (super()._guess(sequence) + [100] * 10)[:10]


def make_sequences(count: int) -> list[DecodedSequence]:
    request = Request((4, 99), SamplingParams())
    return [DecodedSequence(request, slot=slot, max_draft=5) for slot in range(count)]


def begin(
    free: Sequence[Source], models: Sequence[Source], num_sequences: int = 1
) -> tuple[AutoDrafter, list[DecodedSequence]]:
    drafter, sequences = AutoDrafter(free, models), make_sequences(num_sequences)
    drafter.begin(sequences, num_slots=64)
    return drafter, sequences


def take_steps(
    clock: Clock, drafter: AutoDrafter, sequences: Sequence[DecodedSequence], *, num_steps: int
) -> list[list[int]]:
    """The last token of what was drafted for each sequence in every step, its root's where that was nothing."""
    # Sources that resume at layer 0 need neither target nor cache.
    batch = Batch(None, None, sequences, taps=drafter.taps)  # type: ignore[arg-type]
    ends = []
    for _ in range(num_steps):
        draft = drafter.draft(batch)
        ends.append([row[-1] for row in draft.tokens])
        if draft.verified is None:
            clock.now_s += STEP_S + ROW_S * sum(draft.num_nodes)
        tokens = tuple((RIGHT,) * (1 + row.count(RIGHT)) for row in map(list, draft.tokens))
        taps = tuple({layer: torch.zeros(len(row), 1) for layer in drafter.taps} for row in tokens)
        drafter.accept(sequences, Outcome(((0,),) * len(sequences), tokens, taps))
    return ends


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_what_verifying_in_a_drafts_own_call_takes_is_not_held_against_it(clock: Clock, num_sequences: int) -> None:
    ends, learnt = [], []
    for kind in (Source, Eager):
        clock.now_s = 0.0
        models = [kind(1, clock, 3, 1.0), Source(2, clock, 2, 0.2)]
        drafter, sequences = begin([Lookup(clock, 1)], models, num_sequences)
        ends.append(take_steps(clock, drafter, sequences, num_steps=60))
        learnt.append([value for one in drafter._earnings for value in astuple(one)])
    assert ends[0] == ends[1]
    assert learnt[0] == pytest.approx(learnt[1])


def test_a_single_sequences_draft_is_verified_in_its_own_call_and_several_ones_are_not() -> None:
    loose, verified = tame_transformer("llama", EXIT_LAYER), []
    target = packed.pack(loose)
    adapter = Adapter.initialize(loose, EXIT_LAYER).pack(target)
    for prompts in (PROMPTS[:1], PROMPTS):
        model = KangarooDrafter(target, adapter, stopping=FixedLength(3))
        drafts: list[tuple[int, Draft]] = []

        def draft(batch: Batch, model: KangarooDrafter = model, drafts: list[tuple[int, Draft]] = drafts) -> Draft:
            drafts.append((len(model._memory), KangarooDrafter.draft(model, batch)))
            return drafts[-1][1]

        model.draft = draft  # type: ignore[method-assign]
        assert_lossless(target, AutoDrafter([], [model]), SamplingParams(24, seed=0), prompts=prompts)
        verified.append([one.verified is not None for num_texts, one in drafts if num_texts == len(prompts)])
    assert any(verified[0])
    assert verified[1]
    assert not any(verified[1])


@pytest.mark.parametrize(
    ("earns", "costs_s"), [((2, 5), (1.0, 1.0)), ((4, 4), (1.0, 0.5)), ((5, 3), (4.0, 0.1))], ids=str
)
def test_model_that_earns_most_is_asked_once_all_are_known(
    clock: Clock, earns: tuple[int, int], costs_s: tuple[float, float]
) -> None:
    models = [Source(number, clock, earns[number], costs_s[number]) for number in range(2)]
    drafter, sequences = begin([], models)
    ends = take_steps(clock, drafter, sequences, num_steps=8)
    assert ends[:2] == [[100], [101]]
    # A first draft does not tell what others cost, a second one in a row does.
    assert ends[4:] == [[101]] * 4
    # Who is not asked hears of several steps at once, when that is due or he is asked again.
    assert models[1].num_told > models[0].num_told
    sequences[0].max_draft = 0
    drafter._num_rows = 0
    drafter.accept(sequences, Outcome(((0,),), ((RIGHT,),), ({},)))
    assert models[0].num_told == models[1].num_told


def test_catching_up_with_a_text_is_no_part_of_what_drafts_cost(clock: Clock) -> None:
    model = Source(1, clock, 5, 0.5)
    drafter, sequences = begin([], [model])
    for _ in range(3):
        model.cost_s = 10.0
        assert take_steps(clock, drafter, sequences, num_steps=1) == [[101]]
        model.cost_s = 0.5
        assert take_steps(clock, drafter, sequences, num_steps=20) == [[101]] * 20
        # Steps in which nothing may be drafted leave it behind.
        sequences[0].max_draft = 0
        assert take_steps(clock, drafter, sequences, num_steps=5) == [[99]] * 5
        drafter.end(sequences)
        sequences = make_sequences(1)
        drafter.begin(sequences, num_slots=64)
    (known,) = drafter._earnings
    assert known.draft_s / known.timed == pytest.approx(0.5)


def test_draft_that_caught_up_and_took_less_than_others_counts() -> None:
    earnings = Earnings()
    earnings.add(4, 4, draft_s=50.0, is_steady=False)
    assert earnings.timed == 0
    earnings.add(4, 4, draft_s=8.0, is_steady=True)
    for _ in range(200):
        earnings.add(4, 4, draft_s=50.0, is_steady=False)
    assert earnings.draft_s / earnings.timed == pytest.approx(8.0)
    for _ in range(200):
        earnings.add(4, 4, draft_s=2.0, is_steady=False)
    assert earnings.draft_s / earnings.timed == pytest.approx(2.0, rel=0.02)
    assert earnings.rate((1.0, 0.25)) == pytest.approx(1.0, rel=0.01)


def test_texts_that_draft_with_one_that_catches_up_do_not_pay_for_it(clock: Clock) -> None:
    model = Source(1, clock, 5, 0.5)
    drafter, sequences = begin([], [model], 2)
    take_steps(clock, drafter, sequences[:1], num_steps=5)
    model.cost_s = 10.0
    take_steps(clock, drafter, sequences, num_steps=1)
    (earnings,) = drafter._memory[sequences[0]].earnings
    assert earnings.draft_s / earnings.timed == pytest.approx(0.5)


def test_model_that_has_nothing_to_say_leaves_the_step_to_what_was_looked_up(clock: Clock) -> None:
    lookup, silent = Lookup(clock, 2), Source(1, clock, 0)
    drafter, sequences = begin([lookup], [silent])
    assert take_steps(clock, drafter, sequences, num_steps=40)[-1] == [RIGHT]


def test_model_that_has_nothing_to_say_does_not_keep_others_from_drafting(clock: Clock) -> None:
    silent, model = Source(0, clock, 0), Source(1, clock, 5)
    drafter, sequences = begin([], [silent, model])
    ends = take_steps(clock, drafter, sequences, num_steps=40)
    # But for two tries.
    assert [step for step, row in enumerate(ends) if row != [101]] == [0, 17]
    assert len(silent.asked) == 2


def test_what_a_lookup_brought_is_not_what_a_silent_model_earned(clock: Clock) -> None:
    drafter, sequences = begin([Lookup(clock, 11)], [Source(1, clock, 0)])
    take_steps(clock, drafter, sequences, num_steps=1)
    assert drafter._earnings == [Earnings(steps=1.0, tokens=1.0, nodes=1.0)]


def test_chain_is_cut_behind_the_last_guess_that_pays(clock: Clock) -> None:
    lookup = Lookup(clock, 4)
    drafter, sequences = begin([lookup], [])
    take_steps(clock, drafter, sequences, num_steps=60)
    batch = Batch(None, None, sequences)  # type: ignore[arg-type]
    assert list(drafter.draft(batch).tokens[0]) == [99, RIGHT, RIGHT, RIGHT]


@pytest.mark.parametrize("chain", [0.0, 0.01])
def test_what_a_node_costs_is_one_price_for_trees_and_for_chains_that_pay_one(clock: Clock, chain: float) -> None:
    class Priced(Source):
        def draft(self, batch: Batch) -> Draft:
            prices.append(batch.prices)
            return super().draft(batch)

    prices: list[Prices] = []
    drafter, sequences = begin([], [Priced(1, clock, 5)])
    take_steps(clock, drafter, sequences, num_steps=5)
    drafter.draft(Batch(None, None, sequences, prices=Prices(0.3, chain)))  # type: ignore[arg-type]
    assert prices[-1].branch < 0.3
    assert prices[-1].chain == (prices[-1].branch if chain else 0.0)


def test_what_is_always_wrong_is_no_longer_verified(clock: Clock) -> None:
    drafter, sequences = begin([Lookup(clock, 1)], [])
    assert take_steps(clock, drafter, sequences, num_steps=100)[-1] == [99]


def test_guesses_that_were_not_verified_teach_as_well(clock: Clock) -> None:
    lookup, model = Lookup(clock, 1), Source(1, clock, 5, 0.1)
    drafter, sequences = begin([lookup], [model])
    assert take_steps(clock, drafter, sequences, num_steps=30)[-1] == [101]
    lookup.earns = 11
    assert take_steps(clock, drafter, sequences, num_steps=60)[-1] == [RIGHT]
    assert len(lookup.asked) == 90


def test_confidence_of_a_lookup_tells_which_of_its_guesses_to_believe(clock: Clock) -> None:
    lookup = Lookup(clock, 1)
    drafter, sequences = begin([lookup], [])
    for _ in range(60):
        lookup.earns, lookup.confidence = 1, 0.5
        unsure = take_steps(clock, drafter, sequences, num_steps=1)
        lookup.earns, lookup.confidence = 11, 0.99
        sure = take_steps(clock, drafter, sequences, num_steps=1)
    assert (unsure, sure) == ([[99]], [[RIGHT]])


def test_models_that_never_win_are_tried_less_and_less(clock: Clock) -> None:
    drafter, sequences = begin([], [Source(1, clock, 1)])
    ends = take_steps(clock, drafter, sequences, num_steps=100)
    assert [step for step, row in enumerate(ends) if row == [101]] == [0, 17, 83]
    drafter, sequences = begin([], [Source(number, clock, 1) for number in range(4)])
    ends = take_steps(clock, drafter, sequences, num_steps=2000)
    # A draft takes as long as a step, of which one in a hundred may be lost.
    assert 15 < sum(row != [99] for row in ends) < 30


def test_model_that_got_better_is_kept(clock: Clock) -> None:
    model = Source(1, clock, 1)
    drafter, sequences = begin([], [model])
    take_steps(clock, drafter, sequences, num_steps=10)
    model.earns = 30
    assert take_steps(clock, drafter, sequences, num_steps=20)[-10:] == [[101]] * 10


def test_sequence_that_may_not_be_guessed_for_is_not_asked_for(clock: Clock) -> None:
    model = Source(0, clock, 3)
    drafter, sequences = begin([], [model], 2)
    sequences[0].max_draft = 0
    assert take_steps(clock, drafter, sequences, num_steps=3) == [[99, 100]] * 3
    assert model.asked == [[sequences[1]]] * 3


def test_every_text_has_a_best_earner_of_its_own(clock: Clock) -> None:
    models = [Source(0, clock, 0), Source(1, clock, 0)]
    drafter, sequences = begin([], models, 3)
    first, second, third = sequences
    models[0].earns = {first: 6, second: 1, third: 6}
    models[1].earns = {first: 1, second: 6, third: 1}
    ends = take_steps(clock, drafter, sequences, num_steps=8)
    assert ends[0] == [100, 100, 100]
    assert ends[2:] == [[100, 101, 100]] * 6
    # Those who want the same source are asked for together.
    assert models[0].asked[-1] == [first, third]
    assert models[1].asked[-1] == [second]


def test_new_text_starts_with_what_earned_most_in_others(clock: Clock) -> None:
    models = [Source(0, clock, 3), Source(1, clock, 5)]
    drafter, sequences = begin([], models)
    take_steps(clock, drafter, sequences, num_steps=5)
    fresh = make_sequences(1)
    drafter.begin(fresh, num_slots=64)
    assert take_steps(clock, drafter, fresh, num_steps=3) == [[101]] * 3
    # Its own steps soon count for more.
    models[1].earns = 1
    assert take_steps(clock, drafter, fresh, num_steps=20)[-1] == [100]


def test_model_that_saves_next_to_nothing_sits_out_texts(clock: Clock) -> None:
    """More and more of them; then no states are handed over for it, until it saves something again."""
    model = Source(1, clock, 1)
    model.taps = (2,)
    drafter = AutoDrafter([Lookup(clock, 2)], [model])

    def decode(num_texts: int) -> list[bool]:
        took_part = []
        for _ in range(num_texts):
            sequences = make_sequences(1)
            drafter.begin(sequences, num_slots=64)
            took_part.append(sequences[0] in model.held)
            assert drafter.taps == (model.taps if took_part[-1] else ())
            take_steps(clock, drafter, sequences, num_steps=30)
            drafter.end(sequences)
            assert not model.held
            assert drafter.taps == ()
        return took_part

    assert [text for text, took_part in enumerate(decode(20)) if took_part] == [0, 2, 5, 10, 19]
    model.earns = 20
    assert decode(80)[-10:] == [True] * 10


def test_ended_sequences_are_forgotten_by_all(clock: Clock) -> None:
    sources = [Lookup(clock, 2), Source(1, clock, 5)]
    drafter, sequences = begin(sources[:1], sources[1:], 2)
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
    drafter, sequences = begin([], [source], 2)
    source.earns = {sequences[0]: 0, sequences[1]: 1}
    batch = Batch(None, None, sequences)  # type: ignore[arg-type]
    assert [*map(list, drafter.draft(batch).tokens)] == [[99], [99, 100]]


def test_taps_are_those_of_all_sources(clock: Clock) -> None:
    sources = [Source(number, clock, 1) for number in range(3)]
    sources[0].taps, sources[1].taps = (4, 2), (2, 1)
    assert AutoDrafter(sources[:1], sources[1:]).taps == (1, 2, 4)


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
            drafter = AutoDrafter([ScriptedDrafter(known, guess)], [drafter])
        # Where nodes are free, the model grows the same tree for one sequence as for several.
        batch = Batch(target, target.new_cache(len(sequences), 128), sequences, prices=Prices(0.0))
        drafter.begin(sequences, num_slots=128)
        outcome = prefill(batch, drafter, num_rows=[len(prompt) for prompt in PROMPTS])
        for sequence, (token,) in zip(sequences, outcome.tokens, strict=True):
            sequence.append(token, "bonus")
        # For the last no guess is wanted.
        sequences[0].max_draft = sequences[1].max_draft = 5
        if not is_alone:
            # For the first text the model is known to bring nothing.
            drafter._memory[sequences[0]].earnings = [Earnings(steps=1.0, nodes=1.0)]
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

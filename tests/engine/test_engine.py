"""From submission to finish: what is refused, how many tokens come out, and that requests leave each other alone."""

from collections.abc import Sequence as SequenceOf

import pytest

from kangaroo.drafters.base import MAX_NODES, Batch, Sequence
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine import engine as module
from kangaroo.engine.engine import Engine
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import PromptError, SettingsError
from kangaroo.model.packed import pack
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, SamplingParams
from tests.engine.scripts import PROMPT, TextDrafter, decode, sequence_of, submit
from tests.tiny import chain_parents


@pytest.mark.parametrize("gamma", range(1, 9))
def test_exactly_the_wanted_number_of_tokens_comes_out(target: Transformer, text: list[int], gamma: int) -> None:
    for wanted in range(1, 21):
        drafter = TextDrafter({PROMPT: text}, gamma)
        decoding = decode(Engine(target, drafter), SamplingParams(max_new_tokens=wanted))
        assert decoding.new_tokens == text[len(PROMPT) : len(PROMPT) + wanted]
        assert decoding.finish_reason == "length"
        # All is accepted, so every step emits gamma + 1 tokens until the end draws near.
        assert decoding.num_steps == -(-(wanted - 1) // (gamma + 1))
        assert decoding.num_accepted == decoding.num_drafted == wanted - 1 - decoding.num_steps
        assert all(left >= 0 for left in drafter.max_drafts)


def test_max_draft_leaves_room_for_the_bonus_token(target: Transformer) -> None:
    drafter = TextDrafter({}, gamma=4)
    decode(Engine(target, drafter), SamplingParams(max_new_tokens=5))
    assert drafter.max_drafts == [3, 2, 1, 0]


def test_max_draft_is_bounded_by_the_room_behind_the_text_in_the_cache(target: Transformer) -> None:
    drafter = TextDrafter({}, gamma=4)
    engine = Engine(target, drafter)
    decoding = submit(engine, SamplingParams(max_new_tokens=200))
    for _ in range(3):
        engine.step()
    assert drafter.max_drafts == [MAX_NODES, MAX_NODES]
    engine.cancel(decoding)


def test_pace_bounds_the_drafts_and_sees_every_step(target: Transformer, text: list[int]) -> None:
    class Steady(Pace):
        seen = 0

        def limit(self, sequences: SequenceOf[Sequence]) -> int:
            return 2

        def observe(self, draft: Draft, outcome: Outcome, *, draft_time_s: float, verify_time_s: float) -> None:
            self.seen += 1
            assert draft.num_nodes == (3,)
            assert outcome.paths == ((0, 1, 2),)
            assert draft_time_s > 0
            assert verify_time_s > 0

    pace = Steady()
    decoding = decode(Engine(target, TextDrafter({PROMPT: text}, 6), pace=pace), SamplingParams(max_new_tokens=13))
    assert decoding.accepted_lengths == [3, 3, 3, 3]
    assert pace.seen == 4


def test_empty_prompt_is_refused(target: Transformer) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        submit(Engine(target, PlainDrafter()), SamplingParams(), prompt=())


@pytest.mark.parametrize("token", [-1, 258, 10**6])
def test_token_id_out_of_the_vocabulary_is_refused(target: Transformer, token: int) -> None:
    with pytest.raises(PromptError, match=rf"token ids must be in 0\.\.257, got {token}"):
        submit(Engine(target, PlainDrafter()), SamplingParams(), prompt=(1, token))


@pytest.mark.parametrize(
    "params", [SamplingParams(logit_bias={5: 1.0, 258: 1.0}), SamplingParams(stop_token_ids=[258])]
)
def test_settings_for_tokens_out_of_the_vocabulary_are_refused(target: Transformer, params: SamplingParams) -> None:
    engine = Engine(target, PlainDrafter())
    with pytest.raises(SettingsError, match=r"logit_bias and stop_token_ids must be in 0\.\.257, got 258"):
        submit(engine, params)
    assert engine.scheduler.num_waiting == 0


@pytest.mark.parametrize("num_tokens", [16, 17, 300])
def test_prompt_that_fills_the_context_is_refused(target: Transformer, num_tokens: int) -> None:
    engine = Engine(target, PlainDrafter(), limits=Limits(max_context=16))
    with pytest.raises(PromptError, match=f"must be under 16 tokens.*got {num_tokens}"):
        submit(engine, SamplingParams(), prompt=(1,) * num_tokens)


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_text_ends_for_length_when_the_context_is_full(target: Transformer, text: list[int], gamma: int) -> None:
    engine = Engine(target, TextDrafter({PROMPT: text}, gamma), limits=Limits(max_context=16))
    decoding = decode(engine, SamplingParams(max_new_tokens=100))
    assert sequence_of(decoding).tokens == text[:16]
    assert decoding.finish_reason == "length"


def test_context_of_the_model_bounds_texts_and_wishes(target: Transformer) -> None:
    with pytest.raises(SettingsError, match=r"max_context must be in 2\.\.256 \(the model's context\), got 257"):
        Engine(target, PlainDrafter(), limits=Limits(max_context=257))
    engine = Engine(target, PlainDrafter(), limits=Limits(max_context=256))
    assert engine.context_length == Engine(target, PlainDrafter()).context_length == 256
    decoding = decode(engine, SamplingParams(max_new_tokens=100), prompt=[7] * 250)
    assert len(sequence_of(decoding).tokens) == 256


def test_one_engine_serves_growing_and_shrinking_requests_as_a_fresh_one_does(
    target: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small blocks, so that the cache grows.
    monkeypatch.setattr(module, "SLOT_BLOCK", 8)
    reused = Engine(target, PlainDrafter())
    for num_tokens, wanted in [(2, 3), (40, 20), (1, 30), (90, 4), (5, 5)]:
        prompt = [(17 * index + num_tokens) % 258 for index in range(num_tokens)]
        params = SamplingParams(max_new_tokens=wanted)
        fresh = decode(Engine(target, PlainDrafter()), params, prompt=prompt)
        assert decode(reused, params, prompt=prompt).new_tokens == fresh.new_tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("max_batch_size", [1, 2, 5])
def test_requests_that_come_and_go_say_what_each_says_alone(
    target: Transformer, monkeypatch: pytest.MonkeyPatch, max_batch_size: int, temperature: float
) -> None:
    monkeypatch.setattr(module, "SLOT_BLOCK", 8)
    packed = pack(target)
    wishes = [
        ((5 * number, 7, number), SamplingParams(3 + 7 * number, temperature, seed=number)) for number in range(6)
    ]
    alone = {prompt: decode(Engine(packed, PlainDrafter()), params, prompt=prompt) for prompt, params in wishes}
    texts: dict[tuple[int, ...], list[int]] = {prompt: [*prompt, *one.new_tokens] for prompt, one in alone.items()}
    # One text is guessed wrong throughout.
    texts[wishes[2][0]] = [0] * 40
    engine = Engine(packed, TextDrafter(texts, 3), limits=Limits(max_batch_size=max_batch_size))
    begun = []
    for prompt, params in wishes:
        begun.append((prompt, submit(engine, params, prompt=prompt)))
        engine.step()
    for prompt, decoding in begun:
        engine.run(decoding)
        assert decoding.new_tokens == alone[prompt].new_tokens
    assert engine.scheduler.running == []
    assert engine.scheduler.num_free_slots == max_batch_size


def test_running_one_request_takes_the_others_along(target: Transformer, text: list[int]) -> None:
    engine = Engine(target, PlainDrafter(), limits=Limits(max_batch_size=2))
    params = SamplingParams(max_new_tokens=20)
    first, second = submit(engine, params), submit(engine, params)
    engine.run(second)
    assert first.new_tokens == second.new_tokens == text[len(PROMPT) : len(PROMPT) + 20]
    assert first.finish_reason == "length"


def test_step_returns_those_that_emitted_or_ended(target: Transformer) -> None:
    engine = Engine(target, PlainDrafter(), limits=Limits(max_batch_size=2))
    short, long = (submit(engine, SamplingParams(max_new_tokens=wanted)) for wanted in (1, 3))
    assert engine.step() == [short, long]
    assert (short.finish_reason, long.finish_reason) == ("length", None)
    assert engine.step() == engine.step() == [long]
    assert engine.step() == []


def test_request_without_a_seed_is_given_one_and_another_keeps_its_own(target: Transformer) -> None:
    engine = Engine(target, PlainDrafter(), limits=Limits(max_batch_size=3))
    drawn = [submit(engine, SamplingParams(temperature=1.0)).request.params.seed for _ in range(2)]
    assert None not in drawn
    assert drawn[0] != drawn[1]
    assert submit(engine, SamplingParams(temperature=1.0, seed=0)).request.params.seed == 0


class Forking(PlainDrafter):
    """Drafts two siblings, which the block rule refuses to verify."""

    def draft(self, batch: Batch) -> Draft:
        return Draft([sequence.tokens[-1:] * 3 for sequence in batch.sequences], [(-1, 0, 0)] * len(batch.sequences))


def test_error_in_one_request_ends_it_alone(target: Transformer, text: list[int]) -> None:
    engine = Engine(target, Forking(), limits=Limits(max_batch_size=3))
    wishes = [
        SamplingParams(10),
        SamplingParams(10, temperature=1.0, seed=1, acceptance="block"),
        SamplingParams(10, temperature=1.0, seed=1),
    ]
    first, failing, third = (submit(engine, params) for params in wishes)
    engine.run(third)
    assert isinstance(failing.error, SettingsError)
    assert (failing.finish_reason, failing.num_steps, len(failing.new_tokens)) == ("error", 0, 1)
    assert first.error is None
    assert first.new_tokens == text[len(PROMPT) : len(PROMPT) + 10]
    assert third.new_tokens == decode(Engine(target, PlainDrafter()), wishes[2]).new_tokens
    assert engine.scheduler.num_free_slots == 3


def test_request_after_one_that_could_not_begin_is_decoded(target: Transformer, text: list[int]) -> None:
    class FailingOnce(PlainDrafter):
        has_failed = False

        def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
            if not self.has_failed:
                self.has_failed = True
                raise MemoryError

    engine = Engine(target, FailingOnce())
    failed = submit(engine, SamplingParams(max_new_tokens=40))
    assert engine.step() == [failed]
    assert (failed.finish_reason, type(failed.error)) == ("error", MemoryError)
    assert engine.scheduler.num_free_slots == Limits().max_batch_size
    assert decode(engine, SamplingParams(max_new_tokens=40)).new_tokens == text[len(PROMPT) :]


def test_request_there_is_no_room_for_leaves_those_that_came_with_it_alone(target: Transformer) -> None:
    class Narrow(PlainDrafter):
        def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
            if num_slots > 256:
                raise MemoryError

    engine = Engine(target, Narrow())
    wishes = SamplingParams(max_new_tokens=12)
    begun = [submit(engine, one) for one in (wishes, SamplingParams(max_new_tokens=300), wishes)]
    assert begun[1] in engine.step()
    for decoding in begun:
        engine.run(decoding)
    assert [one.finish_reason for one in begun] == ["length", "error", "length"]
    assert isinstance(begun[1].error, MemoryError)
    assert begun[0].new_tokens == begun[2].new_tokens == decode(Engine(target, PlainDrafter()), wishes).new_tokens
    assert decode(engine, wishes).new_tokens == begun[0].new_tokens
    assert engine.scheduler.num_free_slots == Limits().max_batch_size


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_cancelled_request_is_forgotten_by_the_drafter_and_emits_no_more(target: Transformer, num_steps: int) -> None:
    drafter = TextDrafter({}, gamma=2)
    engine = Engine(target, drafter)
    decoding = submit(engine, SamplingParams())
    assert drafter.held == set()
    for _ in range(num_steps):
        engine.step()
    assert drafter.held == {decoding.sequence}
    tokens = decoding.new_tokens
    engine.cancel(decoding)
    assert drafter.held == set()
    assert (decoding.finish_reason, decoding.new_tokens) == ("cancelled", tokens)
    assert engine.step() == []


def test_finished_request_is_forgotten_and_cancelling_it_changes_nothing(target: Transformer) -> None:
    drafter = TextDrafter({}, gamma=2)
    engine = Engine(target, drafter)
    decoding = decode(engine, SamplingParams(max_new_tokens=3))
    assert drafter.held == set()
    engine.cancel(decoding)
    engine.cancel(decoding)
    assert decoding.finish_reason == "length"
    assert engine.scheduler.num_free_slots == Limits().max_batch_size


def test_nothing_to_do_takes_no_pass(target: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prefill", None)
    monkeypatch.setattr(module, "verify_draft", None)
    assert Engine(target, PlainDrafter()).step() == []


def test_drafts_of_a_batch_are_chains_of_their_own_lengths(target: Transformer, text: list[int]) -> None:
    """A request near its end drafts less than its neighbour."""
    seen: list[SequenceOf[SequenceOf[int]]] = []

    class Watching(TextDrafter):
        def draft(self, batch: Batch) -> Draft:
            draft = super().draft(batch)
            seen.append(draft.parents)
            return draft

    engine = Engine(target, Watching({PROMPT: text}, 4), limits=Limits(max_batch_size=2))
    short, long = (submit(engine, SamplingParams(max_new_tokens=wanted)) for wanted in (4, 12))
    engine.run(long)
    assert seen == [(chain_parents(3), chain_parents(5)), (chain_parents(5),), (chain_parents(1),)]
    assert short.new_tokens == long.new_tokens[:4]
    assert long.accepted_lengths == [5, 5, 1]

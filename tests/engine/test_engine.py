"""From prompt to finish: how many tokens, where a text ends and why, and the counts of it."""

from collections.abc import Sequence as SequenceOf

import pytest
import torch

from kangaroo.drafters.base import Batch, Sequence, chain_draft
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.engine import Decoding, Engine
from kangaroo.errors import KangarooError, PromptError
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.tiny import tiny_config, tiny_transformer

PROMPT = (4, 99, 3)


class TextDrafter:
    """Guesses the next gamma tokens of a text it was given."""

    name = "text"
    taps: tuple[int, ...] = ()

    def __init__(self, text: SequenceOf[int], gamma: int) -> None:
        self.held: set[Sequence] = set()
        self.max_drafts: list[int] = []
        self._text = text
        self._gamma = gamma

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        self.held |= set(sequences)

    def draft(self, batch: Batch) -> Draft:
        (sequence,) = batch.sequences
        self.max_drafts.append(sequence.max_draft)
        length = len(sequence.tokens)
        coming = self._text[length : length + min(self._gamma, sequence.max_draft)]
        return chain_draft(torch.tensor(sequence.tokens[-1:]), [torch.tensor([token]) for token in coming])

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        pass

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        self.held -= set(sequences)


@pytest.fixture(scope="module")
def target() -> Transformer:
    return tiny_transformer(tiny_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def text(target: Transformer) -> list[int]:
    """The prompt and 40 greedy tokens."""
    decoding = decode(Engine(target, PlainDrafter()), SamplingParams(max_new_tokens=40))
    return decoding.sequence.tokens


def decode(
    engine: Engine, params: SamplingParams, eos_ids: SequenceOf[int] = (), prompt: SequenceOf[int] = PROMPT
) -> Decoding:
    decoding = engine.begin(Request(tuple(prompt), params, frozenset(eos_ids)))
    while decoding.sequence.finish_reason is None:
        engine.step(decoding)
    engine.end(decoding)
    return decoding


def first_new(text: SequenceOf[int], within: range) -> int:
    """The index of the first token, at one of the places behind the prompt, that did not occur before it."""
    new = text[len(PROMPT) :]
    return next(index for index in within if new[index] not in new[:index])


@pytest.mark.parametrize("gamma", range(1, 9))
def test_exactly_the_wanted_number_of_tokens_comes_out(target: Transformer, text: list[int], gamma: int) -> None:
    for wanted in range(1, 21):
        drafter = TextDrafter(text, gamma)
        decoding = decode(Engine(target, drafter), SamplingParams(max_new_tokens=wanted))
        assert decoding.new_tokens == text[len(PROMPT) : len(PROMPT) + wanted]
        assert decoding.sequence.finish_reason == "length"
        # All is accepted, so every step emits gamma + 1 tokens until the end draws near.
        assert decoding.num_steps == -(-(wanted - 1) // (gamma + 1))
        assert decoding.num_accepted == decoding.num_drafted == wanted - 1 - decoding.num_steps
        assert all(left >= 0 for left in drafter.max_drafts)


def test_max_draft_leaves_room_for_the_bonus_token(target: Transformer) -> None:
    drafter = TextDrafter([], gamma=4)
    decode(Engine(target, drafter), SamplingParams(max_new_tokens=5))
    assert drafter.max_drafts == [3, 2, 1, 0]


def test_counts_add_up(target: Transformer, text: list[int]) -> None:
    misleading = list(text)
    for index in (8, 9, 17):
        misleading[index] = (text[index] + 1) % 258
    decoding = decode(Engine(target, TextDrafter(misleading, gamma=3)), SamplingParams(max_new_tokens=18))
    # Emitted first: text[3]; then 4..7, then 8 alone, 9 alone, 10..13, 14..17, 18..20.
    assert decoding.accepted_lengths == [4, 1, 1, 4, 4, 3]
    assert decoding.num_steps == 6
    assert decoding.num_drafted == 3 + 3 + 3 + 3 + 3 + 2
    assert decoding.num_accepted == 3 + 0 + 0 + 3 + 3 + 2
    assert decoding.num_accepted + decoding.num_steps + 1 == len(decoding.new_tokens) == 18
    assert decoding.sequence.origins.count("draft") == decoding.num_accepted
    assert decoding.sequence.origins[:6] == ["bonus", "draft", "draft", "draft", "bonus", "bonus"]


def test_eos_inside_an_accepted_draft_ends_the_text_there(target: Transformer, text: list[int]) -> None:
    at = first_new(text, range(2, 5))
    eos = text[len(PROMPT) + at]
    decoding = decode(Engine(target, TextDrafter(text, gamma=8)), SamplingParams(max_new_tokens=30), [eos])
    assert decoding.new_tokens == text[len(PROMPT) : len(PROMPT) + at + 1]
    assert decoding.sequence.finish_reason == "stop"
    assert decoding.sequence.origins[-1] == "draft"
    assert (decoding.num_steps, decoding.num_drafted, decoding.num_accepted) == (1, 8, at)
    assert decoding.accepted_lengths == [at]


def test_eos_as_the_bonus_token_ends_the_text(target: Transformer, text: list[int]) -> None:
    at = first_new(text, range(3, 8))
    eos = text[len(PROMPT) + at]
    drafter = TextDrafter(text, gamma=at - 1)
    decoding = decode(Engine(target, drafter), SamplingParams(max_new_tokens=30), [eos])
    assert decoding.new_tokens[-1] == eos
    assert decoding.sequence.origins[-1] == "bonus"
    assert decoding.accepted_lengths == [at]


def test_eos_that_is_drafted_but_rejected_does_not_end_the_text(target: Transformer, text: list[int]) -> None:
    absent = next(token for token in range(258) if token not in text)
    drafter = TextDrafter([absent] * 60, gamma=3)
    decoding = decode(Engine(target, drafter), SamplingParams(max_new_tokens=12), [absent])
    assert decoding.sequence.finish_reason == "length"
    assert decoding.new_tokens == text[len(PROMPT) : len(PROMPT) + 12]


def test_eos_as_the_very_first_token_needs_no_step(target: Transformer, text: list[int]) -> None:
    eos = text[len(PROMPT)]
    decoding = decode(Engine(target, TextDrafter(text, gamma=4)), SamplingParams(), [eos])
    assert decoding.new_tokens == [eos]
    assert decoding.sequence.finish_reason == "stop"
    assert (decoding.num_steps, decoding.decode_time_s, decoding.accepted_lengths) == (0, 0.0, [])


def test_earliest_of_several_eos_ids_counts(target: Transformer, text: list[int]) -> None:
    new = text[len(PROMPT) :]
    late, early = first_new(text, range(8, 20)), first_new(text, range(2, 6))
    decoding = decode(Engine(target, TextDrafter(text, gamma=8)), SamplingParams(), [new[late], new[early], 257])
    assert decoding.new_tokens == new[: early + 1]


def test_last_wanted_token_being_eos_counts_as_a_stop(target: Transformer, text: list[int]) -> None:
    at = first_new(text, range(3, 8))
    params = SamplingParams(max_new_tokens=at + 1)
    decoding = decode(Engine(target, TextDrafter(text, gamma=2)), params, [text[len(PROMPT) + at]])
    assert (len(decoding.new_tokens), decoding.sequence.finish_reason) == (at + 1, "stop")


def test_ignored_eos_does_not_end_the_text(target: Transformer, text: list[int]) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    decoding = decode(Engine(target, TextDrafter(text, gamma=4)), params, text)
    assert decoding.new_tokens == text[len(PROMPT) : len(PROMPT) + 20]
    assert decoding.sequence.finish_reason == "length"


def test_empty_prompt_is_refused(target: Transformer) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        Engine(target, PlainDrafter()).begin(Request((), SamplingParams()))


@pytest.mark.parametrize("token", [-1, 258, 10**6])
def test_token_id_out_of_the_vocabulary_is_refused(target: Transformer, token: int) -> None:
    with pytest.raises(PromptError, match=rf"token ids must be in 0\.\.257, got {token}"):
        Engine(target, PlainDrafter()).begin(Request((1, token), SamplingParams()))


@pytest.mark.parametrize("num_tokens", [16, 17, 300])
def test_prompt_that_fills_the_context_is_refused(target: Transformer, num_tokens: int) -> None:
    engine = Engine(target, PlainDrafter(), max_context=16)
    with pytest.raises(PromptError, match=f"must be under 16 tokens.*got {num_tokens}"):
        engine.begin(Request((1,) * num_tokens, SamplingParams()))


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_text_ends_for_length_when_the_context_is_full(target: Transformer, text: list[int], gamma: int) -> None:
    engine = Engine(target, TextDrafter(text, gamma), max_context=16)
    decoding = decode(engine, SamplingParams(max_new_tokens=100))
    assert decoding.sequence.tokens == text[:16]
    assert decoding.sequence.finish_reason == "length"
    one_left = decode(engine, SamplingParams(max_new_tokens=100), prompt=text[:15])
    assert (one_left.new_tokens, one_left.num_steps) == ([text[15]], 0)


def test_context_of_the_model_bounds_a_larger_wish(target: Transformer) -> None:
    engine = Engine(target, PlainDrafter(), max_context=10**6)
    assert engine.context_length == 256
    decoding = decode(engine, SamplingParams(max_new_tokens=100), prompt=[7] * 250)
    assert len(decoding.sequence.tokens) == 256


def test_one_engine_serves_growing_and_shrinking_requests_as_a_fresh_one_does(
    target: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small blocks, so that the cache grows.
    monkeypatch.setattr("kangaroo.engine.engine.SLOT_BLOCK", 8)
    reused = Engine(target, PlainDrafter())
    for num_tokens, wanted in [(2, 3), (40, 20), (1, 30), (90, 4), (5, 5)]:
        prompt = [(17 * index + num_tokens) % 258 for index in range(num_tokens)]
        params = SamplingParams(max_new_tokens=wanted)
        fresh = decode(Engine(target, PlainDrafter()), params, prompt=prompt)
        assert decode(reused, params, prompt=prompt).sequence.tokens == fresh.sequence.tokens


def test_request_overtaken_by_another_is_stopped_instead_of_continuing_on_its_cache(target: Transformer) -> None:
    engine = Engine(target, PlainDrafter())
    params = SamplingParams(max_new_tokens=8)
    first = engine.begin(Request(PROMPT, params))
    engine.step(first)
    second = engine.begin(Request((200, 201), params))
    with pytest.raises(KangarooError, match="one request at a time"):
        engine.step(first)
    engine.end(first)
    while second.sequence.finish_reason is None:
        engine.step(second)
    fresh = decode(Engine(target, PlainDrafter()), params, prompt=(200, 201))
    assert second.sequence.tokens == fresh.sequence.tokens


def test_request_given_up_for_another_is_forgotten_by_the_drafter(target: Transformer) -> None:
    drafter = TextDrafter([], gamma=2)
    engine = Engine(target, drafter)
    first = engine.begin(Request(PROMPT, SamplingParams()))
    second = engine.begin(Request(PROMPT, SamplingParams()))
    engine.end(first)
    assert drafter.held == {second.sequence}


def test_request_after_one_that_could_not_begin_is_decoded(target: Transformer, text: list[int]) -> None:
    class FailingOnce(PlainDrafter):
        has_failed = False

        def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
            if not self.has_failed:
                self.has_failed = True
                raise MemoryError

    engine = Engine(target, FailingOnce())
    with pytest.raises(MemoryError):
        engine.begin(Request(PROMPT, SamplingParams(max_new_tokens=40)))
    assert decode(engine, SamplingParams(max_new_tokens=40)).sequence.tokens == text


def test_ended_request_is_forgotten_by_the_drafter_finished_or_not(target: Transformer) -> None:
    drafter = TextDrafter([], gamma=2)
    engine = Engine(target, drafter)
    decoding = engine.begin(Request(PROMPT, SamplingParams()))
    engine.step(decoding)
    assert drafter.held == {decoding.sequence}
    engine.end(decoding)
    assert drafter.held == set()

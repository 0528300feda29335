"""Where a text ends and why, what was counted, and that all of it is the same wherever the drafts begin and end."""

import math

import pytest

from kangaroo.drafters.base import Sequence
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.model.text import TextStream
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.types import Request, SamplingParams
from tests.engine.scripts import PROMPT, TextDrafter, decode, sequence_of
from tests.tiny import tiny_tokenizer

GREEDY = SamplingParams(max_new_tokens=30)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)


def first_new(text: list[int], within: range) -> int:
    """The index of the first token, at one of the places behind the prompt, that did not occur before it."""
    new = text[len(PROMPT) :]
    return next(index for index in within if new[index] not in new[:index])


def test_counts_add_up(target: Transformer, text: list[int]) -> None:
    misleading = list(text)
    for index in (8, 9, 17):
        misleading[index] = (text[index] + 1) % 258
    decoding = decode(Engine(target, TextDrafter({PROMPT: misleading}, 3)), SamplingParams(max_new_tokens=18))
    # Emitted first: text[3]; then 4..7, then 8 alone, 9 alone, 10..13, 14..17, 18..20.
    assert decoding.accepted_lengths == [4, 1, 1, 4, 4, 3]
    assert decoding.num_steps == 6
    assert decoding.num_drafted == 3 + 3 + 3 + 3 + 3 + 2
    assert decoding.num_accepted == 3 + 0 + 0 + 3 + 3 + 2
    assert decoding.num_accepted + decoding.num_steps + 1 == len(decoding.new_tokens) == 18
    origins = sequence_of(decoding).origins
    assert origins.count("draft") == decoding.num_accepted
    assert origins[:6] == ["bonus", "draft", "draft", "draft", "bonus", "bonus"]


@pytest.mark.parametrize("gamma", range(9))
@pytest.mark.parametrize("at", range(12))
def test_eos_at_any_position_of_a_draft_ends_the_text_there(
    target: Transformer, text: list[int], at: int, gamma: int
) -> None:
    new = text[len(PROMPT) :]
    # Repeated tokens end the text where they come first.
    at = new.index(new[at])
    decoding = decode(Engine(target, TextDrafter({PROMPT: text}, gamma)), GREEDY, eos_ids=[new[at]])
    assert decoding.new_tokens == new[: at + 1]
    assert decoding.finish_reason == "stop"
    # The prefill emits the first token; every step emits gamma + 1, the last only up to the stop.
    whole, rest = divmod(at, gamma + 1)
    assert decoding.accepted_lengths == [gamma + 1] * whole + [rest] * (rest > 0)
    assert decoding.num_steps == whole + (rest > 0)
    assert decoding.num_drafted == gamma * decoding.num_steps
    assert decoding.num_accepted == gamma * whole + rest
    assert sequence_of(decoding).origins[-1] == ("draft" if rest else "bonus")


def test_eos_that_is_drafted_but_rejected_does_not_end_the_text(target: Transformer, text: list[int]) -> None:
    absent = next(token for token in range(258) if token not in text)
    drafter = TextDrafter({PROMPT: [absent] * 60}, gamma=3)
    decoding = decode(Engine(target, drafter), SamplingParams(max_new_tokens=12), eos_ids=[absent])
    assert decoding.finish_reason == "length"
    assert decoding.new_tokens == text[len(PROMPT) : len(PROMPT) + 12]


def test_eos_as_the_very_first_token_needs_no_step(target: Transformer, text: list[int]) -> None:
    eos = text[len(PROMPT)]
    decoding = decode(Engine(target, TextDrafter({PROMPT: text}, 4)), SamplingParams(), eos_ids=[eos])
    assert (decoding.new_tokens, decoding.finish_reason) == ([eos], "stop")
    assert (decoding.num_steps, decoding.decode_time_s, decoding.accepted_lengths) == (0, 0.0, [])
    assert decoding.prefill_time_s > 0


def test_earliest_of_several_eos_and_stop_ids_counts(target: Transformer, text: list[int]) -> None:
    new = text[len(PROMPT) :]
    late, early = first_new(text, range(8, 20)), first_new(text, range(2, 6))
    for eos, stops in (([late, early], []), ([late], [early]), ([early], [late]), ([], [late, early])):
        params = SamplingParams(stop_token_ids=[new[index] for index in stops])
        eos_ids = [257, *(new[index] for index in eos)]
        decoding = decode(Engine(target, TextDrafter({PROMPT: text}, 8)), params, eos_ids=eos_ids)
        assert decoding.new_tokens == new[: early + 1]


def test_last_wanted_token_being_eos_counts_as_a_stop(target: Transformer, text: list[int]) -> None:
    at = first_new(text, range(3, 8))
    params = SamplingParams(max_new_tokens=at + 1)
    eos_ids = [text[len(PROMPT) + at]]
    decoding = decode(Engine(target, TextDrafter({PROMPT: text}, 2)), params, eos_ids=eos_ids)
    assert (len(decoding.new_tokens), decoding.finish_reason) == (at + 1, "stop")


def test_ignored_eos_does_not_end_the_text_but_a_stop_id_does(target: Transformer, text: list[int]) -> None:
    new = text[len(PROMPT) :]
    engine = Engine(target, TextDrafter({PROMPT: text}, 4))
    decoding = decode(engine, SamplingParams(max_new_tokens=20, ignore_eos=True), eos_ids=text)
    assert (decoding.new_tokens, decoding.finish_reason) == (new[:20], "length")
    at = first_new(text, range(3, 8))
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, stop_token_ids=[new[at]])
    decoding = decode(engine, params, eos_ids=text)
    assert (decoding.new_tokens, decoding.finish_reason) == (new[: at + 1], "stop")


def shown(decoding: Decoding) -> str:
    return "".join(decoding.pieces)


@pytest.fixture(scope="module")
def letters(tokenizer: Tokenizer) -> SamplingParams:
    """Settings under which a model of random weights writes letters."""
    allowed = set(tokenizer.encode("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False))
    return SamplingParams(30, logit_bias={token: -math.inf for token in range(258) if token not in allowed})


@pytest.mark.parametrize("gamma", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("start", range(8))
def test_stop_string_ends_the_text_at_its_last_token_across_drafts(
    target: Transformer, tokenizer: Tokenizer, letters: SamplingParams, start: int, length: int, gamma: int
) -> None:
    new = decode(Engine(target, PlainDrafter()), letters).new_tokens
    whole = tokenizer.decode(new)
    stop = whole[start : start + length]
    engine = Engine(target, TextDrafter({PROMPT: [*PROMPT, *new]}, gamma))
    decoding = decode(engine, letters, text=TextStream(tokenizer, ("ZZ", stop)))
    num_new = whole.index(stop) + length
    assert decoding.finish_reason == "stop"
    assert decoding.new_tokens == new[:num_new]
    assert shown(decoding) == whole[: num_new - length]
    assert len(decoding.pieces) == num_new
    # The first token is the prefill's.
    assert sum(decoding.accepted_lengths) == num_new - 1
    assert decoding.num_steps == -(-(num_new - 1) // (gamma + 1))


def spell(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def begin(tokenizer: Tokenizer, params: SamplingParams, eos_ids: frozenset[int] = frozenset()) -> Decoding:
    """A request with a slot, to be handed its tokens without a model."""
    request = Request(PROMPT, params, eos_ids)
    decoding = Decoding(request, TextStream(tokenizer, params.stop), len(PROMPT) + params.max_new_tokens)
    decoding.sequence = Sequence(request, slot=0)
    return decoding


@pytest.mark.parametrize("cut", range(1, 12))
def test_stop_string_is_met_however_steps_cut_the_tokens(tokenizer: Tokenizer, cut: int) -> None:
    tokens = spell("one END two", tokenizer)
    decoding = begin(tokenizer, SamplingParams(stop="END"))
    emitted = [decoding.emit(part) for part in (tokens[:cut], tokens[cut:]) if decoding.finish_reason is None]
    assert sum(emitted) == len(decoding.new_tokens) == len("one END")
    assert (decoding.finish_reason, shown(decoding)) == ("stop", "one ")


def test_text_held_back_for_a_stop_string_comes_with_the_last_token(tokenizer: Tokenizer) -> None:
    decoding = begin(tokenizer, SamplingParams(max_new_tokens=6, stop="END"))
    decoding.emit(spell("one EN", tokenizer))
    assert (decoding.finish_reason, decoding.pieces) == ("length", ["o", "n", "e", " ", "", "EN"])


def test_cancelled_text_is_what_was_shown(tokenizer: Tokenizer) -> None:
    decoding = begin(tokenizer, SamplingParams(stop="END"))
    decoding.emit(spell("one EN", tokenizer))
    decoding.finish("cancelled")
    assert (decoding.finish_reason, shown(decoding)) == ("cancelled", "one ")


def test_text_ends_once(tokenizer: Tokenizer) -> None:
    decoding = begin(tokenizer, SamplingParams(stop="b"), frozenset([256]))
    # The stop string and the EOS behind it: only the first counts, and nothing comes after.
    assert decoding.emit([*spell("ab", tokenizer), 256]) == 2
    decoding.finish("cancelled")
    assert (decoding.finish_reason, shown(decoding)) == ("stop", "a")


def test_stop_string_and_eos_and_length_at_the_same_token_are_one_stop(tokenizer: Tokenizer) -> None:
    (b,) = spell("b", tokenizer)
    decoding = begin(tokenizer, SamplingParams(max_new_tokens=2, stop="ab"), frozenset([b]))
    assert decoding.emit([*spell("ab", tokenizer), 7]) == 2
    assert (decoding.finish_reason, shown(decoding), decoding.room) == ("stop", "", 0)


def test_torn_character_is_spelled_when_the_text_ends(tokenizer: Tokenizer) -> None:
    decoding = begin(tokenizer, SamplingParams(max_new_tokens=3))
    decoding.emit([*spell("a", tokenizer), *spell("\u20ac", tokenizer)[:2]])
    assert (decoding.finish_reason, decoding.pieces) == ("length", ["a", "", "\ufffd"])


def test_request_without_a_slot_has_said_nothing() -> None:
    decoding = Decoding(Request(PROMPT, SamplingParams()))
    assert decoding.new_tokens == []
    assert decoding.is_reading
    decoding.finish("cancelled")
    assert decoding.finish_reason == "cancelled"


def test_accepted_tokens_are_those_emitted_up_to_the_stop(tokenizer: Tokenizer) -> None:
    decoding = begin(tokenizer, SamplingParams(), frozenset([9]))
    decoding.emit([1])
    decoding.count(0, 1)
    # Five were drafted and four of them accepted; the third ends the text.
    decoding.count(5, decoding.emit([2, 3, 9, 4, 5]))
    assert (decoding.num_steps, decoding.num_drafted, decoding.num_accepted) == (2, 5, 3)
    assert decoding.accepted_lengths == [1, 3]

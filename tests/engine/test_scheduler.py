"""Who waits, who has a slot, whose prompt is read next, and that nobody's text stops while another's prompt is read."""

from collections.abc import Sequence as SequenceOf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine import engine as engine_module
from kangaroo.engine import scheduler as module
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import INTERLEAVED_ROWS, PREFILL_ROWS, Limits, Scheduler
from kangaroo.engine.step import prefill
from kangaroo.errors import QueueFullError, SettingsError
from kangaroo.model.transformer import Transformer
from kangaroo.types import Outcome, Request, SamplingParams
from tests.engine.scripts import PROMPT, TextDrafter, decode, sequence_of, submit


def waiting(num_prompt: int = 3) -> Decoding:
    return Decoding(Request((1,) * num_prompt, SamplingParams()))


def enqueue(scheduler: Scheduler, *num_prompt: int) -> list[Decoding]:
    begun = [waiting(count) for count in num_prompt]
    for one in begun:
        scheduler.enqueue(one)
    return begun


def slots(decodings: SequenceOf[Decoding]) -> list[int]:
    return [sequence_of(one).slot for one in decodings]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"max_waiting": -1}, "max_waiting must be at least 0, got -1"),
        ({"max_context": 1}, "max_context must be at least 2, got 1"),
    ],
)
def test_limits_that_serve_nobody_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Limits(**limits)


def test_first_come_are_first_served() -> None:
    scheduler = Scheduler(Limits(max_batch_size=2))
    begun = enqueue(scheduler, 3, 3, 3, 3, 3)
    assert scheduler.admit() == begun[:2]
    assert slots(begun[:2]) == [0, 1]
    assert scheduler.admit() == []
    assert (scheduler.num_waiting, scheduler.num_free_slots) == (3, 0)
    scheduler.release(begun[1])
    scheduler.release(begun[0])
    assert scheduler.admit() == begun[2:4]
    assert scheduler.running == begun[2:4]
    assert all(one.sequence is None for one in begun[4:])


def test_lowest_free_slot_is_taken() -> None:
    scheduler = Scheduler(Limits(max_batch_size=4))
    begun = enqueue(scheduler, *[3] * 4)
    scheduler.admit()
    for index in (3, 0, 2):
        scheduler.release(begun[index])
    newcomers = enqueue(scheduler, *[3] * 3)
    scheduler.admit()
    assert slots(newcomers) == [0, 2, 3]


def test_full_queue_refuses_and_says_how_many_wait() -> None:
    scheduler = Scheduler(Limits(max_batch_size=1, max_waiting=2))
    # The first will not wait: a slot is free.
    enqueue(scheduler, 3, 3, 3)
    message = "^at most 2 requests may wait, and 3 do; try again later or raise max_waiting$"
    with pytest.raises(QueueFullError, match=message):
        enqueue(scheduler, 3)
    scheduler.admit()
    with pytest.raises(QueueFullError, match="and 2 do"):
        enqueue(scheduler, 3)
    assert scheduler.num_waiting == 2


def test_queue_of_none_takes_only_whom_a_slot_waits_for() -> None:
    scheduler = Scheduler(Limits(max_batch_size=2, max_waiting=0))
    first, _ = enqueue(scheduler, 3, 3)
    with pytest.raises(QueueFullError, match="at most 0 requests may wait"):
        enqueue(scheduler, 3)
    scheduler.admit()
    with pytest.raises(QueueFullError):
        enqueue(scheduler, 3)
    scheduler.release(first)
    enqueue(scheduler, 3)


def test_queue_without_a_bound_takes_everybody() -> None:
    scheduler = Scheduler(Limits())
    enqueue(scheduler, *[3] * 1000)
    assert scheduler.num_waiting == 1000


def test_released_place_in_the_queue_is_free_at_once() -> None:
    scheduler = Scheduler(Limits(max_batch_size=1, max_waiting=1))
    begun = enqueue(scheduler, 3, 3)
    scheduler.release(begun[0])
    begun += enqueue(scheduler, 3)
    assert scheduler.admit() == [begun[1]]
    scheduler.release(begun[0])
    assert scheduler.num_free_slots == 0


def test_block_of_prompts_goes_to_the_oldest() -> None:
    scheduler = Scheduler(Limits(max_batch_size=4))
    begun = enqueue(scheduler, 10, PREFILL_ROWS - 13, 4, 2)
    scheduler.admit()
    assert scheduler.plan_reading() == [(begun[0], 10), (begun[1], PREFILL_ROWS - 13), (begun[2], 3)]
    for one in begun[:2]:
        one.num_unread = 0
    begun[2].num_unread = 1
    # Two are decoding now, so that the block is the smaller one; it still holds both.
    assert scheduler.plan_reading() == [(begun[2], 1), (begun[3], 2)]
    for one in begun[2:]:
        one.num_unread = 0
    assert scheduler.plan_reading() == []


def test_long_prompt_is_read_in_smaller_blocks_beside_decoding() -> None:
    assert INTERLEAVED_ROWS < PREFILL_ROWS
    scheduler = Scheduler(Limits(max_batch_size=2))
    (long,) = enqueue(scheduler, 2 * PREFILL_ROWS)
    scheduler.admit()
    assert scheduler.plan_reading() == [(long, PREFILL_ROWS)]
    (other,) = enqueue(scheduler, 3)
    scheduler.admit()
    other.num_unread = 0
    assert scheduler.plan_reading() == [(long, INTERLEAVED_ROWS)]
    scheduler.release(other)
    assert scheduler.plan_reading() == [(long, PREFILL_ROWS)]


@given(
    max_batch_size=st.integers(1, 4),
    max_waiting=st.none() | st.integers(0, 3),
    actions=st.lists(st.sampled_from(["enqueue", "admit", "release"]) | st.integers(0, 30), max_size=40),
)
def test_slots_and_places_are_never_lost_or_given_twice(
    max_batch_size: int, max_waiting: int | None, actions: list[str | int]
) -> None:
    scheduler = Scheduler(Limits(max_batch_size=max_batch_size, max_waiting=max_waiting))
    queue: list[Decoding] = []
    running: list[Decoding] = []
    for action in actions:
        if action == "enqueue":
            one = waiting()
            bound = None if max_waiting is None else max_waiting + max_batch_size - len(running)
            if bound is not None and len(queue) >= bound:
                with pytest.raises(QueueFullError):
                    scheduler.enqueue(one)
            else:
                scheduler.enqueue(one)
                queue.append(one)
        elif action == "admit":
            count = min(len(queue), max_batch_size - len(running))
            free = sorted(set(range(max_batch_size)) - set(slots(running)))
            assert scheduler.admit() == queue[:count]
            assert slots(queue[:count]) == free[:count]
            running, queue = running + queue[:count], queue[count:]
        else:
            known = [*running, *queue]
            if known:
                one = known[action % len(known)] if isinstance(action, int) else known[0]
                scheduler.release(one)
                (running if one in running else queue).remove(one)
        assert scheduler.running == running
        assert scheduler.num_waiting == len(queue)
        assert scheduler.num_free_slots == max_batch_size - len(running)


# In the engine


class Reading:
    """The rows of every pass that read prompts, by the prompts' first tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, alone: int, interleaved: int) -> None:
        self.blocks: list[dict[int, int]] = []

        def spy(batch: Batch, drafter: Drafter, *, num_rows: SequenceOf[int]) -> Outcome:
            first = [sequence.tokens[0] for sequence in batch.sequences]
            self.blocks.append(dict(zip(first, num_rows, strict=True)))
            return prefill(batch, drafter, num_rows=num_rows)

        monkeypatch.setattr(engine_module, "prefill", spy)
        monkeypatch.setattr(module, "PREFILL_ROWS", alone)
        monkeypatch.setattr(module, "INTERLEAVED_ROWS", interleaved)


def test_others_keep_streaming_while_a_long_prompt_is_read(
    target: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(monkeypatch, alone=16, interleaved=4)
    engine = Engine(target, PlainDrafter(), limits=Limits(max_batch_size=2))
    streaming = submit(engine, SamplingParams(max_new_tokens=15))
    engine.step()
    prompt = [9, *range(100, 129)]
    long = submit(engine, SamplingParams(max_new_tokens=5), prompt=prompt)
    for num_read in (4, 8, 12, 16, 20, 24, 28):
        before = len(streaming.new_tokens)
        assert engine.step() == [streaming]
        assert len(streaming.new_tokens) == before + 1
        assert (len(prompt) - long.num_unread, long.new_tokens) == (num_read, [])
    # The last block emits the first token; it does not decode in the same step.
    assert engine.step() == [long, streaming]
    assert (len(long.new_tokens), long.num_steps) == (1, 0)
    assert reading.blocks == [{PROMPT[0]: 3}, *[{9: 4}] * 7, {9: 2}]
    engine.run(long)
    engine.run(streaming)
    for decoding, params in ((streaming, SamplingParams(15)), (long, SamplingParams(5))):
        alone = decode(Engine(target, PlainDrafter()), params, prompt=decoding.request.prompt_ids)
        assert decoding.new_tokens == alone.new_tokens


def test_prompts_alone_are_read_in_large_blocks_shared_by_the_oldest(
    target: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(monkeypatch, alone=16, interleaved=4)
    engine = Engine(target, PlainDrafter(), limits=Limits(max_batch_size=3))
    begun = [submit(engine, SamplingParams(4), prompt=[first] * count) for first, count in ((1, 20), (2, 8), (3, 9))]
    assert engine.step() == []
    assert engine.step() == begun[:2]
    assert engine.step() == [begun[0], begun[1]]
    engine.run(begun[2])
    # The first two emit in the second pass, so that the third's prompt is read beside their decoding.
    assert reading.blocks == [{1: 16}, {1: 4, 2: 8, 3: 4}, {3: 4}, {3: 1}]
    for one in begun:
        alone = decode(Engine(target, PlainDrafter()), SamplingParams(4), prompt=one.request.prompt_ids)
        assert one.new_tokens == alone.new_tokens
        assert one.prefill_time_s > 0


def test_prompt_read_token_by_token_says_what_one_read_at_once_says(
    target: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = decode(Engine(target, PlainDrafter()), SamplingParams(8), prompt=range(40, 80))
    Reading(monkeypatch, alone=1, interleaved=1)
    assert (
        decode(Engine(target, PlainDrafter()), SamplingParams(8), prompt=range(40, 80)).new_tokens == whole.new_tokens
    )


def test_request_too_many_is_refused_at_once_and_leaves_nothing_behind(target: Transformer) -> None:
    drafter = TextDrafter({}, gamma=2)
    engine = Engine(target, drafter, limits=Limits(max_batch_size=1, max_waiting=1))
    running = submit(engine, SamplingParams(max_new_tokens=3))
    engine.step()
    queued = submit(engine, SamplingParams(max_new_tokens=3))
    with pytest.raises(QueueFullError, match="at most 1 requests may wait, and 1 do"):
        submit(engine, SamplingParams())
    engine.run(queued)
    assert running.finish_reason == queued.finish_reason == "length"
    assert drafter.held == set()
    assert (engine.scheduler.num_waiting, engine.scheduler.num_free_slots) == (0, 1)


@pytest.mark.parametrize("state", ["waiting", "reading", "decoding"])
def test_cancelled_request_makes_room_before_the_next_step(
    target: Transformer, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    Reading(monkeypatch, alone=4, interleaved=4)
    drafter = TextDrafter({}, gamma=2)
    engine = Engine(target, drafter, limits=Limits(max_batch_size=1, max_waiting=1))
    if state == "waiting":
        submit(engine, SamplingParams(max_new_tokens=6))
        engine.step()
    cancelled = submit(engine, SamplingParams(max_new_tokens=50), prompt=[7] * (10 if state == "reading" else 3))
    engine.step()
    if state == "decoding":
        engine.step()
    assert (cancelled.sequence is None, cancelled.is_reading) == {
        "waiting": (True, True),
        "reading": (False, True),
        "decoding": (False, False),
    }[state]
    engine.cancel(cancelled)
    assert cancelled.finish_reason == "cancelled"
    assert cancelled.sequence not in drafter.held
    assert cancelled not in engine.scheduler.running
    begun = submit(engine, SamplingParams(max_new_tokens=6))
    assert cancelled not in engine.step()
    if state == "waiting":
        assert engine.scheduler.num_waiting == 1
    else:
        assert sequence_of(begun).slot == sequence_of(cancelled).slot
        assert begun.new_tokens
    engine.run(begun)
    alone = decode(Engine(target, PlainDrafter()), SamplingParams(max_new_tokens=6))
    assert begun.new_tokens == alone.new_tokens
    assert cancelled.new_tokens == cancelled.new_tokens[: 2 if state == "decoding" else 0]


class Counting(PlainDrafter):
    """Knows the most that were held at once, and that everyone who begins also ends."""

    def __init__(self) -> None:
        self.held: set[Sequence] = set()
        self.largest = 0

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        self.held |= set(sequences)
        self.largest = max(self.largest, len(self.held))

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        assert set(sequences) <= self.held
        self.held -= set(sequences)


@settings(deadline=None, max_examples=25)
@given(
    max_batch_size=st.integers(1, 3),
    plan=st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 6), st.none() | st.integers(0, 8)), min_size=1, max_size=6
    ),
)
def test_every_request_ends_whoever_is_cancelled_when(
    target: Transformer, max_batch_size: int, plan: list[tuple[int, int, int | None]]
) -> None:
    drafter = Counting()
    engine = Engine(target, drafter, limits=Limits(max_batch_size=max_batch_size))
    begun = [submit(engine, SamplingParams(wanted), prompt=[7] * length) for length, wanted, _ in plan]
    for number in range(60):
        for one, (_, _, cancel_at) in zip(begun, plan, strict=True):
            if cancel_at == number:
                engine.cancel(one)
        engine.step()
    assert drafter.held == set()
    assert drafter.largest <= max_batch_size
    for one, (_, wanted, cancel_at) in zip(begun, plan, strict=True):
        assert one.finish_reason == "length" or (one.finish_reason == "cancelled" and cancel_at is not None)
        assert len(one.new_tokens) == wanted or one.finish_reason == "cancelled"
    assert engine.scheduler.num_free_slots == max_batch_size

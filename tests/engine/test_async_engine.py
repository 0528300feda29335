"""The engine under asyncio: streams side by side, cancelling, refusals, failures; nobody waits for ever."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
from torch import Tensor

from kangaroo.drafters.base import Batch, Sequence
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.async_engine import AsyncEngine, AsyncStream
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import EngineError, PromptError, QueueFullError
from kangaroo.model.text import TextStream
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import Prefix, choose
from kangaroo.types import Draft, Request, SamplingParams, Token
from tests.tiny import tiny_config, tiny_tokenizer, tiny_transformer

TIMEOUT_S = 30
REQUESTS = [
    Request((7, 3), SamplingParams(12)),
    Request((200, 4, 9, 11), SamplingParams(25, temperature=0.9, seed=5)),
    Request((65,), SamplingParams(6, temperature=1.2, seed=8)),
    Request((30, 31, 32), SamplingParams(18, repetition_penalty=1.3)),
]
LONG = Request((1, 2), SamplingParams(200))


class Gate(PlainDrafter):
    """Holds the worker in the middle of a step that has no permit, and makes steps fail; open unless closed."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(10_000)
        self.is_reached = threading.Event()
        self.error: Exception | None = None
        self.held: set[Sequence] = set()

    def close(self) -> None:
        self.permits = threading.Semaphore(0)

    def open(self) -> None:
        self.permits.release(1000)

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        self.held |= set(sequences)

    def draft(self, batch: Batch) -> Draft:
        self.is_reached.set()
        assert self.permits.acquire(timeout=TIMEOUT_S)
        if self.error is not None:
            raise self.error
        return super().draft(batch)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        self.held -= set(sequences)


@pytest.fixture(scope="module")
def target() -> Transformer:
    return tiny_transformer(tiny_config(num_hidden_layers=2))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(target: Transformer, gate: Gate) -> Engine:
    return Engine(target, gate, limits=Limits(max_batch_size=2))


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run to the end, which must come."""

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main()

    asyncio.run(bounded())


async def read(stream: AsyncStream) -> list[Token]:
    return [token async for token in stream]


async def reach(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, TIMEOUT_S)


async def submit_held(running: AsyncEngine, gate: Gate, *requests: Request) -> list[AsyncStream]:
    """Submit at a closed gate: the one step let through is at most the first before all of them are taken."""
    tasks = [asyncio.create_task(running.submit(request)) for request in requests]
    await asyncio.sleep(0)
    gate.permits.release()
    return await asyncio.gather(*tasks)


def expected(target: Transformer, request: Request) -> list[int]:
    engine = Engine(target, PlainDrafter())
    decoding = engine.submit(request)
    engine.run(decoding)
    return decoding.new_tokens


def test_streams_side_by_side_write_the_texts_of_the_engine_alone(target: Transformer, engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            streams = await asyncio.gather(*(running.submit(request) for request in REQUESTS))
            texts = await asyncio.gather(*map(read, streams))
            for request, stream, tokens in zip(REQUESTS, streams, texts, strict=True):
                assert [token.token_id for token in tokens] == expected(target, request)
                assert (await stream.result()) is stream.decoding
                assert stream.decoding.finish_reason == "length"

    run(main)


def test_tokens_come_while_the_text_is_under_way(engine: Engine, gate: Gate) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            stream = await running.submit(LONG)
            # The first token is the prefill's; the step behind it has not ended.
            reader = aiter(stream)
            assert (await anext(reader)).token_id == stream.decoding.new_tokens[0]
            assert stream.decoding.finish_reason is None
            gate.open()

    run(main)


def test_pieces_join_to_the_final_text(target: Transformer, engine: Engine) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
    request = Request((65, 66), SamplingParams(60, temperature=1.0, seed=4))
    whole = tokenizer.decode(expected(target, request))
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]

    async def main() -> None:
        async with AsyncEngine(engine) as running:
            for stops, text in [((), whole), ((stop,), whole[: whole.index(stop)])]:
                stream = await running.submit(request, TextStream(tokenizer, stops))
                tokens = await read(stream)
                assert "".join(token.text for token in tokens) == text
                assert stream.decoding.finish_reason == ("stop" if stops else "length")

    run(main)


def test_cancelled_text_ends_where_its_stream_did(target: Transformer, engine: Engine, gate: Gate) -> None:
    tokenizer = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
    whole = tokenizer.decode(expected(target, LONG))
    # All of the text may be the beginning of this stop string, so all of it is held back.
    text = TextStream(tokenizer, [whole[:150] + "!"])

    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            stream = await running.submit(LONG, text)
            reader = aiter(stream)
            shown = [(await anext(reader)).text]
            await reach(gate.is_reached)
            stream.cancel()
            gate.open()
            shown += [token.text async for token in reader]
            decoding = await stream.result()
            assert len(shown) == len(decoding.new_tokens) == 2
            assert "".join(shown) == "".join(decoding.pieces) == ""

    run(main)


def test_leaving_the_iteration_frees_the_slot(engine: Engine, gate: Gate) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            stream = await running.submit(LONG)
            async for _ in stream:
                break
            # The loop closes what was left in its next rounds.
            await asyncio.sleep(0.01)
            gate.open()
            assert (await stream.result()).finish_reason == "cancelled"
            assert engine.scheduler.num_free_slots == 2
            assert not gate.held

    run(main)


@pytest.mark.parametrize("reading", [read, AsyncStream.result])
def test_cancelling_the_task_that_reads_frees_the_slot_before_the_next_step(
    engine: Engine, gate: Gate, reading: Callable[[AsyncStream], Coroutine[Any, Any, object]]
) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            stream = await running.submit(LONG)
            task = asyncio.create_task(reading(stream))
            await reach(gate.is_reached)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            await stream.result()
            # The prefill's token and that of the step that was held: no step came behind the cancellation.
            assert len(stream.decoding.new_tokens) == 2
            assert not gate.held

    run(main)


def test_cancelled_stream_ends_for_its_reader_and_leaves_others_alone(
    target: Transformer, engine: Engine, gate: Gate
) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            cancelled, other = await submit_held(running, gate, LONG, REQUESTS[1])
            reader = asyncio.create_task(read(cancelled))
            cancelled.cancel()
            gate.open()
            assert [token.token_id for token in await read(other)] == expected(target, REQUESTS[1])
            shown = [token.token_id for token in await reader]
            assert len(shown) <= 3
            assert shown == cancelled.decoding.new_tokens
            assert cancelled.decoding.finish_reason == "cancelled"

    run(main)


def test_cancelling_one_that_has_ended_changes_nothing(engine: Engine) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            stream = await running.submit(REQUESTS[0])
            decoding = await stream.result()
            stream.cancel()
            assert len(await read(stream)) == 12
            assert decoding.finish_reason == "length"

    run(main)


def test_what_cannot_be_taken_is_refused_at_the_call(target: Transformer, gate: Gate) -> None:
    async def main() -> None:
        engine = Engine(target, gate, limits=Limits(max_batch_size=1, max_waiting=1))
        async with AsyncEngine(engine) as running:
            with pytest.raises(PromptError, match="must be under 256 tokens"):
                await running.submit(Request((1,) * 300, SamplingParams()))
            gate.close()
            streams = await submit_held(running, gate, LONG, LONG)
            with pytest.raises(QueueFullError, match="at most 1 requests may wait"):
                await submit_held(running, gate, LONG)
            gate.open()
            for stream in streams:
                assert len(await read(stream)) == 200

    run(main)


def test_loop_goes_on_and_submits_wait_while_a_step_is_under_way(engine: Engine, gate: Gate) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            first = await running.submit(LONG)
            await reach(gate.is_reached)
            given_up = asyncio.create_task(running.submit(REQUESTS[0]))
            second = asyncio.create_task(running.submit(REQUESTS[0]))
            done, _ = await asyncio.wait([given_up, second], timeout=0.05)
            assert not done
            given_up.cancel()
            gate.open()
            assert len(await read(await second)) == 12
            first.cancel()
            await first.result()
            assert engine.scheduler.num_free_slots == 2
            assert engine.scheduler.num_waiting == 0

    run(main)


def test_error_of_one_request_is_its_own_alone(
    target: Transformer, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [expected(target, REQUESTS[1]), expected(target, REQUESTS[3])]

    def choose_or_fail(logits: Tensor, params: SamplingParams, *, prefix: Prefix, drafted: SequenceOf[int]) -> int:
        if params.repetition_penalty != 1 and prefix.num_tokens - prefix.num_prompt_tokens == 4:
            raise ArithmeticError("of this request")
        return choose(logits, params, prefix=prefix, drafted=drafted)

    monkeypatch.setattr("kangaroo.engine.step.choose", choose_or_fail)

    async def main() -> None:
        async with AsyncEngine(engine) as running:
            sound, broken = await running.submit(REQUESTS[1]), await running.submit(REQUESTS[3])
            with pytest.raises(ArithmeticError, match="of this request"):
                await broken.result()
            with pytest.raises(ArithmeticError, match="of this request"):
                await read(broken)
            assert broken.decoding.new_tokens == texts[1][:4]
            assert [token.token_id for token in await read(sound)] == texts[0]

    run(main)


def test_step_that_fails_ends_all_streams_with_its_error(engine: Engine, gate: Gate) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            streams = await submit_held(running, gate, LONG, LONG)
            await reach(gate.is_reached)
            gate.error = MemoryError("no room")
            gate.open()
            ended = await asyncio.gather(read(streams[0]), streams[1].result(), return_exceptions=True)
            assert ended == [gate.error, gate.error]
            for _ in range(2):
                with pytest.raises(EngineError, match=r"has failed.*no room.*start another"):
                    await running.submit(LONG)

    run(main)


def test_shutdown_cancels_what_is_under_way(engine: Engine, gate: Gate) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as running:
            gate.close()
            streams = await submit_held(running, gate, LONG, LONG, LONG)
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            await reach(gate.is_reached)
            asyncio.get_running_loop().call_later(0.02, gate.open)
        await asyncio.gather(*readers)
        for stream in streams:
            assert (await stream.result()).finish_reason == "cancelled"
        assert engine.scheduler.num_free_slots == 2
        assert not gate.held
        with pytest.raises(EngineError, match="is not running"):
            await running.submit(LONG)

    run(main)


def test_engine_that_is_not_running_takes_nothing_and_may_run_again(engine: Engine) -> None:
    async def main() -> None:
        stopped = AsyncEngine(engine)
        with pytest.raises(EngineError, match="is not running"):
            await stopped.submit(LONG)
        for _ in range(2):
            async with stopped as running:
                assert len(await read(await running.submit(REQUESTS[0]))) == 12

    run(main)


def test_idle_worker_steps_no_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.append(1) or step())

    async def main() -> None:
        async with AsyncEngine(engine) as running:
            await (await running.submit(REQUESTS[0])).result()
            num_steps = len(steps)
            await asyncio.sleep(0.05)
            assert len(steps) == num_steps == 12

    run(main)

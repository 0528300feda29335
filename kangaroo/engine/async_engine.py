"""The engine for asyncio: one worker thread decodes, and streams hand its tokens to the event loop.

The worker alone touches the engine. What the event loop wants of it is queued and done between two steps, so that the
loop never waits for a step; what the worker reports is handed over by call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread

from kangaroo.engine.decoding import Decoding, Text
from kangaroo.engine.engine import Engine
from kangaroo.errors import EngineError
from kangaroo.types import Request, Token


class AsyncStream:
    """One request under way, for one reader: iterate for its tokens as they come, or await result().

    Leaving the iteration early, and cancelling the task that reads or awaits, cancel the request. Both ways raise
    what the request failed with; a cancelled one just ends.
    """

    def __init__(self, decoding: Decoding, cancel: Callable[[Decoding], None]) -> None:
        self.decoding = decoding
        self.num_reported = 0  # tokens, as the worker counts them
        self._cancel = cancel
        self._tokens: deque[Token] = deque()
        self._news, self._end = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncGenerator[Token, None]:
        try:
            while self._tokens or not self._end.is_set():
                while self._tokens:
                    yield self._tokens.popleft()
                self._news.clear()
                if not self._end.is_set():
                    await self._news.wait()
        finally:
            self.cancel()
        self._raise_error()

    async def result(self) -> Decoding:
        """The request once it has ended, read or not; finish_reason is "cancelled" where it was."""
        try:
            await self._end.wait()
        finally:
            self.cancel()
        self._raise_error()
        return self.decoding

    def cancel(self) -> None:
        """End the request and free its slot before the next step; one that has ended is left as it is."""
        if not self._end.is_set():
            self._cancel(self.decoding)

    def feed(self, tokens: Sequence[Token], *, has_ended: bool) -> None:
        """What the engine reports: new tokens, and whether they were the last."""
        self._tokens += tokens
        self._news.set()
        if has_ended:
            self._end.set()

    def _raise_error(self) -> None:
        if self.decoding.error is not None:
            raise self.decoding.error


class AsyncEngine:
    """Decodes the requests of an event loop with an engine that nothing else may use meanwhile.

    `async with AsyncEngine(engine) as running:` runs it; leaving the block cancels what is under way. An error of a
    single request is its stream's alone; where a whole step fails, all streams raise that error, and no more requests
    are taken.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_open = False
        # The worker's own: the streams under way, and what a step failed with.
        self._streams: dict[Decoding, AsyncStream] = {}
        self._is_stopped = False
        self._failure: Exception | None = None

    async def __aenter__(self) -> AsyncEngine:
        self._loop = asyncio.get_running_loop()
        self._is_open, self._is_stopped = True, False
        self._thread = Thread(target=self._work, name="kangaroo-engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._is_open = False
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    async def submit(self, request: Request, text: Text | None = None) -> AsyncStream:
        """Take a request, at the latest after the step under way; a task cancelled meanwhile leaves none behind.

        Raises what Engine.submit() raises, and EngineError where the engine is not running or has failed.
        """
        if not self._is_open:
            raise EngineError("the engine is not running; submit inside `async with AsyncEngine(engine)`")
        answer: asyncio.Future[AsyncStream] = self._loop.create_future()
        self._commands.put(partial(self._submit, request, text, answer=answer))
        try:
            return await answer
        except asyncio.CancelledError:
            # The answer may have come in between.
            if not answer.cancelled() and answer.exception() is None:
                answer.result().cancel()
            raise

    # --- on the event loop, called by the worker

    def _answer(self, answer: asyncio.Future[AsyncStream], result: AsyncStream | Exception) -> None:
        if isinstance(result, AsyncStream):
            if answer.cancelled():
                result.cancel()
            else:
                answer.set_result(result)
        elif not answer.cancelled():
            answer.set_exception(result)

    # --- on the worker

    def _work(self) -> None:
        while not self._is_stopped:
            try:
                self._obey()
                if self._streams:
                    self._report(self._engine.step())
            except Exception as error:  # whatever it is, everyone who waits must hear of it
                self._fail(error)

    def _obey(self) -> None:
        """Do what was asked since the last step; sleeps while there is nothing to decode."""
        while not self._is_stopped and not (self._streams and self._commands.empty()):
            self._commands.get()()

    def _submit(self, request: Request, text: Text | None, *, answer: asyncio.Future[AsyncStream]) -> None:
        result: AsyncStream | Exception
        try:
            if self._failure is not None:
                raise EngineError(f"the engine has failed ({self._failure!r}); start another") from self._failure
            decoding = self._engine.submit(request, text)
        except Exception as error:  # the caller's to see
            result = error
        else:
            result = AsyncStream(decoding, lambda one: self._commands.put(partial(self._cancel, one)))
            self._streams[decoding] = result
        self._loop.call_soon_threadsafe(self._answer, answer, result)

    def _cancel(self, decoding: Decoding) -> None:
        self._engine.cancel(decoding)
        self._report([decoding])

    def _stop(self) -> None:
        self._is_stopped = True
        for decoding in list(self._streams):
            self._cancel(decoding)

    def _report(self, changed: Sequence[Decoding]) -> None:
        """Hand over what is new; a request that has ended is forgotten."""
        for decoding in changed:
            stream = self._streams.get(decoding)
            if stream is None:
                continue
            tokens, has_ended = decoding.emitted(stream.num_reported), decoding.finish_reason is not None
            stream.num_reported += len(tokens)
            if has_ended:
                del self._streams[decoding]
            self._loop.call_soon_threadsafe(partial(stream.feed, tokens, has_ended=has_ended))

    def _fail(self, error: Exception) -> None:
        """End all streams with the error of a step, behind which the engine's state is unknown."""
        self._failure = error
        for decoding, stream in self._streams.items():
            decoding.error, decoding.finish_reason = error, "error"
            self._loop.call_soon_threadsafe(partial(stream.feed, (), has_ended=True))
        self._streams.clear()

"""Continuous batching: who waits, who has a slot of the cache, and whose prompt is read next."""

import heapq
from collections import deque
from dataclasses import dataclass

from kangaroo.drafters.base import Sequence
from kangaroo.engine.decoding import Decoding
from kangaroo.errors import QueueFullError, SettingsError

# Prompt tokens read in one pass, and where others are decoding between two of their steps.
PREFILL_ROWS = 512
INTERLEAVED_ROWS = 128


@dataclass(frozen=True)
class Limits:
    """What an engine may hold at once.

    max_batch_size: requests decoded together, each with a slot of the cache. max_waiting: requests that may queue for
    one, None for any number. max_context: tokens a text may hold, prompt included; None for the model's context.
    """

    max_batch_size: int = 8
    max_waiting: int | None = None
    max_context: int | None = None

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise SettingsError(f"max_batch_size must be at least 1, got {self.max_batch_size}")
        if self.max_waiting is not None and self.max_waiting < 0:
            raise SettingsError(f"max_waiting must be at least 0, got {self.max_waiting}")
        if self.max_context is not None and self.max_context < 2:
            raise SettingsError(f"max_context must be at least 2, got {self.max_context}")


class Scheduler:
    """First come, first served: a request joins as soon as a slot is free, and leaves between steps."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Decoding] = deque()
        self._running: list[Decoding] = []
        self._free = list(range(limits.max_batch_size))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def running(self) -> list[Decoding]:
        """Those that have a slot, in the order they got it."""
        return list(self._running)

    def enqueue(self, decoding: Decoding) -> None:
        """Take a request; raises QueueFullError where no slot is free and the queue is at its bound."""
        bound = self._limits.max_waiting
        # Those that the next admission will serve do not wait.
        if bound is not None and len(self._waiting) >= bound + len(self._free):
            raise QueueFullError(f"at most {bound} requests may wait, and {len(self._waiting)} do; "
                                 "try again later or raise max_waiting")  # fmt: skip
        self._waiting.append(decoding)

    def admit(self) -> list[Decoding]:
        """Give free slots to those that have waited longest; returns the newcomers."""
        admitted = []
        while self._waiting and self._free:
            decoding = self._waiting.popleft()
            # The lowest slot, so that a small batch needs a small cache.
            decoding.sequence = Sequence(decoding.request, slot=heapq.heappop(self._free))
            self._running.append(decoding)
            admitted.append(decoding)
        return admitted

    def plan_reading(self) -> list[tuple[Decoding, int]]:
        """Whose prompt is read in this step, and how many tokens of it: a block of the oldest ones."""
        reading = [one for one in self._running if one.is_reading]
        left = PREFILL_ROWS if len(reading) == len(self._running) else INTERLEAVED_ROWS
        plan = []
        for decoding in reading:
            count = min(decoding.num_unread, left)
            if count:
                plan.append((decoding, count))
                left -= count
        return plan

    def release(self, decoding: Decoding) -> None:
        """Take back the slot, or the place in the queue, of a request that has ended."""
        if decoding in self._waiting:
            self._waiting.remove(decoding)
        elif decoding in self._running:
            assert decoding.sequence is not None, "running requests have slots"
            self._running.remove(decoding)
            heapq.heappush(self._free, decoding.sequence.slot)

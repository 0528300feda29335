"""Many requests of random shape, some given up midway: everything held for them is given back, and no text suffers."""

import gc
import os
import random
import resource
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from kangaroo.drafters.auto import AutoDrafter
from kangaroo.drafters.base import MAX_NODES, Sequence
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.settings import PromptLookupSettings
from kangaroo.drafters.stopping import ConfidenceThreshold, FixedLength
from kangaroo.drafters.tree import Branching
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import SLOT_BLOCK, Engine
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import QueueFullError
from kangaroo.kernels import cpu
from kangaroo.types import Request, SamplingParams
from tests.engine.cases import ON_NATIVE, Factory, auto, kangaroo, lookup, target_on
from tests.engine.scenarios import decode_alone, prompt, read_run
from tests.native import kernels_restored  # noqa: F401

# Set it to soak for longer.
SOAK_REQUESTS = int(os.environ.get("KANGAROO_SOAK", "200"))
# Some of these end before they are given up; about 30 to 40% of all requests do not.
SHARE_GIVEN_UP = 0.4
# Of how many requests one text is compared with plain decoding.
COMPARE_EVERY = 3
BACKEND, FAMILY = ON_NATIVE[0], "mistral"
LIMITS = Limits(max_batch_size=8, max_waiting=12)
TREE = kangaroo(ConfidenceThreshold(5, 0.05), Branching(3, 24))
DRAFTERS: dict[str, tuple[Factory, Pace | None]] = {
    "chain": (kangaroo(FixedLength(4)), None),
    "tree": (TREE, None),
    # As LLM.from_pretrained() has it.
    "auto": (auto([lookup(PromptLookupSettings())], [TREE]), Pace()),
}


def random_request(draw: random.Random) -> Request:
    num_new_tokens = draw.choice([1, 4, 12, 30])
    kinds = [
        SamplingParams(num_new_tokens, seed=0),
        SamplingParams(num_new_tokens, 0.8, draw.randrange(1000), top_p=0.9, repetition_penalty=1.1),
        SamplingParams(num_new_tokens, 1.2, draw.randrange(1000), top_k=30, logprobs=2),
        SamplingParams(num_new_tokens, 0.7, draw.randrange(1000), acceptance="rejection"),
        SamplingParams(num_new_tokens, 0.7, draw.randrange(1000), acceptance="block"),
    ]
    eos_ids = frozenset(draw.sample(range(258), draw.choice([0, 6])))
    return Request(prompt(draw.choice([1, 3, 20, 90]), draw.randrange(5)), draw.choice(kinds), eos_ids)


@dataclass
class Soak:
    """Requests come and are given up at random; to_give_up: the steps that each of those under way is left."""

    engine: Engine
    draw: random.Random
    to_give_up: dict[Decoding, int] = field(default_factory=dict)
    live: list[Decoding] = field(default_factory=list)
    num_submitted: int = 0
    num_refused: int = 0
    num_cancelled: int = 0
    num_compared: int = 0

    def run(self, num_requests: int) -> None:
        """Take and finish so many requests more."""
        goal = self.num_submitted + num_requests
        while self.live or self.num_submitted < goal:
            for _ in range(min(self.draw.choice([0, 0, 1, 3, 9]), goal - self.num_submitted)):
                self.submit()
            self.engine.step()
            self.give_up()
            ended = [one for one in self.live if one.finish_reason is not None]
            self.live = [one for one in self.live if one.finish_reason is None]
            for one in ended:
                self.check(one)
            self.check_held()

    def submit(self) -> None:
        try:
            decoding = self.engine.submit(random_request(self.draw))
        except QueueFullError:
            self.num_refused += 1
            return
        self.num_submitted += 1
        self.live.append(decoding)
        if self.draw.random() < SHARE_GIVEN_UP:
            self.to_give_up[decoding] = self.draw.randrange(4)

    def give_up(self) -> None:
        for decoding, num_steps in list(self.to_give_up.items()):
            self.to_give_up[decoding] = num_steps - 1
            if decoding.finish_reason is not None:
                del self.to_give_up[decoding]
            elif num_steps == 0:
                self.engine.cancel(decoding)
                del self.to_give_up[decoding]

    def check(self, decoding: Decoding) -> None:
        assert decoding.error is None
        if decoding.finish_reason == "cancelled":
            self.num_cancelled += 1
        elif decoding.request.params.acceptance == "coupling" and self.draw.randrange(COMPARE_EVERY) == 0:
            self.num_compared += 1
            # Not through the cache of decode_alone(), which would grow with every text.
            assert read_run(decoding) == decode_alone.__wrapped__(BACKEND, FAMILY, decoding.request)

    def check_held(self) -> None:
        """Slots are held by those who run, and caches by no more than one text may fill."""
        scheduler, cache = self.engine.scheduler, self.engine._cache
        running = [one.sequence for one in scheduler.running]
        assert len({one.slot for one in running}) == len(running) == LIMITS.max_batch_size - scheduler.num_free_slots
        for sequence in running:
            assert cache.lengths[sequence.slot] <= len(sequence.tokens) <= 120
        assert len(cache.lengths) <= LIMITS.max_batch_size
        assert cache.num_slots <= SLOT_BLOCK >= 120 + MAX_NODES
        for drafter in self.drafters():
            # Of auto's sources some sit a text out.
            assert drafter._memory.keys() <= set(running)
            assert drafter._memory.keys() == set(running) or drafter is not self.engine.drafter
            if isinstance(drafter, KangarooDrafter):
                assert drafter._cache.num_slots <= cache.num_slots

    def check_empty(self) -> None:
        assert self.engine.scheduler.num_free_slots == LIMITS.max_batch_size
        assert self.engine.scheduler.num_waiting == 0
        assert not self.engine.scheduler.running
        assert not any(drafter._memory for drafter in self.drafters())
        assert not self.to_give_up
        if self.engine.pace is not None:
            assert not self.engine.pace._drafted
            assert not self.engine.pace._texts

    def drafters(self) -> Iterator[AutoDrafter | KangarooDrafter]:
        """Those of the engine that hold something for each text."""
        drafter = self.engine.drafter
        for one in (drafter, *(drafter._models if isinstance(drafter, AutoDrafter) else ())):
            assert isinstance(one, AutoDrafter | KangarooDrafter)
            yield one


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


class Held(NamedTuple):
    """What is alive: sequences and requests under way, all objects that the collector knows, bytes in Python's hands.

    num_resident_bytes: of the process, the native kernels' included; 0 where the system does not say.
    """

    num_sequences: int
    num_objects: int
    num_bytes: int
    num_resident_bytes: int


def measure_held() -> Held:
    gc.collect()
    objects, pages = gc.get_objects(), Path("/proc/self/statm")
    return Held(
        sum(type(one) in (Sequence, Decoding) for one in objects),
        len(objects),
        tracemalloc.get_traced_memory()[0],
        int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else 0,
    )


@pytest.mark.parametrize(("factory", "pace"), DRAFTERS.values(), ids=DRAFTERS)
def test_soaked_engine_gives_everything_back(factory: Factory, pace: Pace | None) -> None:
    cpu.select(BACKEND.kernels, num_threads=1)
    target = target_on(BACKEND, FAMILY)
    soak = Soak(Engine(target, factory(target, {}), limits=LIMITS, pace=pace), random.Random(20))
    # The first requests fill what is made once: caches of tables, compiled patterns, the largest cache.
    soak.run(SOAK_REQUESTS // 4)
    soak.check_empty()
    before = measure_held()
    soak.run(SOAK_REQUESTS - SOAK_REQUESTS // 4)
    soak.check_empty()
    after = measure_held()
    assert after.num_sequences == before.num_sequences
    assert after.num_objects - before.num_objects < 100
    assert after.num_bytes - before.num_bytes < 100_000
    assert after.num_resident_bytes - before.num_resident_bytes < 100_000_000
    assert soak.num_submitted == SOAK_REQUESTS
    assert 0.2 < soak.num_cancelled / SOAK_REQUESTS < 0.5
    assert soak.num_compared >= SOAK_REQUESTS // 20
    assert soak.num_refused > 0

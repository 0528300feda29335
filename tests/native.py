"""What the tests of the native kernels share: every instruction set in turn, and a number of threads for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kangaroo.kernels import cpu


@pytest.fixture(scope="module", autouse=True, params=cpu.instruction_sets())
def every_instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a module that imports this once for each instruction set, on one thread."""
    before = cpu.selected(), cpu.num_threads()
    cpu.select(request.param, num_threads=1)
    yield
    cpu.select(before[0], num_threads=before[1])


@pytest.fixture(autouse=True)
def kernels_restored() -> Iterator[None]:
    """Undo, in a module that imports this, what each test selects."""
    before = cpu.selected(), cpu.num_threads()
    yield
    cpu.select(before[0], num_threads=before[1])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads inside the block."""
    before = cpu.num_threads()
    cpu.select(cpu.selected(), num_threads=count)
    try:
        yield
    finally:
        cpu.select(cpu.selected(), num_threads=before)

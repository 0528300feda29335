"""What csrc/module.cpp offers. Addresses are those of tensors that kernels/cpu.py has checked."""

from collections.abc import Sequence

from torch import Tensor

class Weight:
    def __init__(
        self, rows: Tensor, paired: bool = False, scales: Tensor | None = None, bias: Tensor | None = None
    ) -> None: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def gather(self, rows: Sequence[int], out: int) -> None: ...

class Cache:
    def __init__(
        self, num_layers: int, num_sequences: int, num_kv_heads: int, num_slots: int, head_dim: int
    ) -> None: ...
    @property
    def num_slots(self) -> int: ...
    def keep(self, sequence: int, start: int, path: Sequence[int]) -> None: ...
    def copy(self, other: Cache, sequence: int, num_slots: int) -> None: ...

class Stack:
    def __init__(
        self, sizes: tuple[int, int, int, int], norm_eps: float, attention_scale: float, softcap: float, gelu: bool
    ) -> None: ...
    def add_layer(self, weights: Sequence[Weight | None], norms: Sequence[Tensor | None], window: int) -> None: ...
    def run(
        self,
        cache: Cache,
        span: tuple[int, int],
        segments: Sequence[tuple[int, int, int, Sequence[int] | None, int]],
        hidden_out: tuple[int, int, int],
        taps: Sequence[tuple[int, int]],
        tables: tuple[int, int, int, int],
        skips: Sequence[int],
    ) -> None: ...
    def decide(
        self,
        cache: Cache,
        span: tuple[int, int],
        segments: Sequence[tuple[int, int, int, Sequence[int] | None, int]],
        entering: tuple[int, int, Weight, float, Sequence[int]],
        taps: Sequence[tuple[int, int]],
        tables: tuple[int, int, int, int],
        head: tuple[Weight, int, float, float, tuple[int, int, int]],
    ) -> list[int]: ...

def run_head(head: tuple[Weight, int, float, float, tuple[int, int, int]], states: tuple[int, int]) -> None: ...

class DraftPlan:
    def __init__(
        self,
        target: Stack,
        adapter: Stack,
        bounds: tuple[int, int, int],
        embedding: tuple[Weight, float],
        head: tuple[Weight, int, float, float, tuple[int, int, int]],
        chooser: tuple[Weight, int, float, float, tuple[int, int, int]],
    ) -> None: ...
    def draft(
        self,
        target: tuple[Cache, tuple[int, int, int, int]],
        adapter: tuple[Cache, tuple[int, int, int, int]],
        starts: Sequence[tuple[int, int, int, int, int, int, int, tuple[int, float, int, float, float]]],
        limits: tuple[float, float, float],
        states: tuple[int, int, int, int, int],
        verifies: bool,
    ) -> tuple[tuple[list[list[int]], list[list[int]], list[list[float]]], list[int], float]: ...

def linear(weight: Weight, hidden: int, num_rows: int, out: int) -> None: ...
def instruction_sets() -> list[str]: ...
def select(name: str) -> None: ...
def selected() -> str: ...
def num_threads() -> int: ...
def set_num_threads(num_threads: int) -> None: ...
def measure_bandwidth(num_bytes: int, num_tries: int) -> float: ...
def measure_peak(num_steps: int, num_tries: int) -> float: ...

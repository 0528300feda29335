"""How deep to draft under the load there is, by what steps were measured to cost and drafts to bring.

Verification is nearly free while a pass waits for weights to be read, and stops being so as a batch grows. The time of
a step is held to be linear in the drafted tokens a sequence, with a line of its own for every batch size.
"""

from collections import deque
from statistics import mean, median

from kangaroo.drafters.base import DEFAULT_NODE_PRICE, MAX_NODES, is_chain
from kangaroo.types import Draft, Outcome

# A gain below this is within what measurements of single steps tell apart.
MIN_GAIN = 1.03
# Steps between two looks at the other side: a draft while plain decoding wins, or a plain step while drafting wins.
PROBE_EVERY = 64
# Steps between two choices: neither costs nor acceptance change faster.
CHOOSE_EVERY = 8
# How many steps a measurement looks back on, and how many it needs at least.
NUM_REMEMBERED, NUM_NEEDED = 33, 3
# Batch sizes this close share a line until each has its own.
MAX_RATIO = 1.5


class _Load:
    """Times of recent steps at one batch size: without a draft, and with so many drafted tokens a sequence."""

    def __init__(self) -> None:
        self.plain_s: deque[float] = deque(maxlen=NUM_REMEMBERED)
        self.drafted: deque[tuple[float, float]] = deque(maxlen=NUM_REMEMBERED)

    @property
    def is_known(self) -> bool:
        return len(self.plain_s) >= NUM_NEEDED and len(self.drafted) >= NUM_NEEDED

    def line(self) -> tuple[float, float]:
        """The time of a plain step, and what every drafted token a sequence adds to it."""
        base_s = median(self.plain_s)
        return base_s, max(0.0, median((time_s - base_s) / depth for depth, time_s in self.drafted))


class Pace:
    """Chooses the depth of drafts that emits most tokens a second, and learns from every step.

    num_steps, num_drafting: steps so far, and those of them that drafted.
    """

    def __init__(self) -> None:
        self.num_steps, self.num_drafting = 0, 0
        self.node_price = DEFAULT_NODE_PRICE
        self._loads: dict[int, _Load] = {}
        self._verify_s: dict[int, deque[float]] = {}
        # Tokens drafted and accepted where nothing but the drafter bounded the draft.
        self._drafts: deque[tuple[int, int]] = deque(maxlen=256)
        self._has_trees = False
        self._batch_size = self._since_choice = self._since_probe = 0
        self._limit = self._granted = MAX_NODES

    def limit(self, num_sequences: int) -> int:
        """The depth to draft to in the coming step; 0 where plain decoding is faster."""
        self._granted = self._decide(num_sequences)
        return self._granted

    def observe(self, draft: Draft, outcome: Outcome, *, draft_time_s: float, verify_time_s: float) -> None:
        """Learn what the step cost and brought."""
        num_sequences, num_rows = len(draft.parents), sum(draft.num_nodes)
        load = self._loads.setdefault(num_sequences, _Load())
        self.num_steps += 1
        if num_rows == num_sequences:
            # A drafter that had nothing to say took its time nevertheless; only a step that asked for none is plain.
            if self._granted == 0:
                load.plain_s.append(draft_time_s + verify_time_s)
            return
        self.num_drafting += 1
        load.drafted.append(((num_rows - num_sequences) / num_sequences, draft_time_s + verify_time_s))
        self._verify_s.setdefault(num_rows, deque(maxlen=NUM_REMEMBERED)).append(verify_time_s)
        for parents, path in zip(draft.parents, outcome.paths, strict=True):
            self._has_trees |= not is_chain(parents)
            if self._granted == MAX_NODES:
                self._drafts.append((len(parents) - 1, len(path) - 1))

    def _decide(self, num_sequences: int) -> int:
        if num_sequences != self._batch_size:
            self._batch_size, self._since_choice = num_sequences, CHOOSE_EVERY
            self._verify_s.clear()
        load = self._nearest_known(num_sequences)
        if load is None:
            own = self._loads.setdefault(num_sequences, _Load())
            return 0 if len(own.plain_s) <= len(own.drafted) and len(own.plain_s) < NUM_NEEDED else MAX_NODES
        self._since_choice += 1
        if self._since_choice >= CHOOSE_EVERY:
            self._since_choice, self._limit = 0, self._choose(load)
            self.node_price = self._price_node(load)
        self._since_probe += 1
        if self._since_probe < PROBE_EVERY:
            return self._limit
        self._since_probe = 0
        return 0 if self._limit == MAX_NODES else MAX_NODES

    def _nearest_known(self, num_sequences: int) -> _Load | None:
        known = [size for size, load in self._loads.items() if load.is_known]
        nearest = min(known, key=lambda size: abs(size - num_sequences), default=0)
        if not nearest or max(nearest, num_sequences) > MAX_RATIO * min(nearest, num_sequences):
            return None
        return self._loads[nearest]

    def _choose(self, load: _Load) -> int:
        """The depth of most expected tokens a second; trees are drafted whole or not at all."""
        base_s, token_s = load.line()
        deepest = max((depth for depth, _ in self._drafts), default=0)
        best, best_rate = 0, MIN_GAIN / base_s
        for limit in (deepest,) if self._has_trees else range(1, deepest + 1):
            num_drafted = mean(min(depth, limit) for depth, _ in self._drafts)
            num_emitted = 1 + mean(min(accepted, limit) for _, accepted in self._drafts)
            rate = num_emitted / (base_s + token_s * num_drafted)
            if rate > best_rate:
                best, best_rate = limit, rate
        return MAX_NODES if best and best == deepest else best

    def _price_node(self, load: _Load) -> float:
        """The chance of being accepted at which one more node pays for its verification."""
        known = sorted((rows, median(times)) for rows, times in self._verify_s.items() if len(times) >= NUM_NEEDED)
        if len(known) < 2:
            return self.node_price
        (few, fast_s), (many, slow_s) = known[0], known[-1]
        row_s = max(0.0, (slow_s - fast_s) / (many - few))
        # A token is worth the time that plain decoding takes for one.
        return min(1.0, row_s * self._batch_size / load.line()[0])

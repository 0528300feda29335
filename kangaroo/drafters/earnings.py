"""What drafting is measured to bring and to cost, recent steps counting most."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from kangaroo.drafters.base import MAX_NODES

# How much an older step counts for after each newer one: in a text, and in what all texts tell.
DECAY, SLOW_DECAY = 0.97, 0.995
# Steps that what is known already counts for beside those of a text.
PRIOR_STEPS = 4.0
# The chance that the first guess of a source nobody knows is right.
FIRST_CHANCE = 0.5
# How far rows must have varied for times to count as much as what was known of them.
PRIOR_SPREAD = 20.0


class StepCost:
    """What a step takes: seconds, and seconds for each row it verifies, by least squares over recent steps."""

    def __init__(self) -> None:
        self._weight = self._rows = self._time_s = self._rows_rows = self._rows_time = 0.0

    def fit(self, node_price: float) -> tuple[float, float]:
        """Seconds of a step without rows, and of a row; as long as little is known a row's share is node_price."""
        if self._time_s == 0:
            return 1.0, node_price
        rows, time_s = self._rows / self._weight, self._time_s / self._weight
        spread = self._rows_rows - rows * self._rows
        expected = node_price * time_s / (1 + node_price * rows)
        slope = (self._rows_time - rows * self._time_s + PRIOR_SPREAD * expected) / (spread + PRIOR_SPREAD)
        # Neither part is ever nothing.
        slope = min(max(slope, 0.01 * time_s / rows), 0.9 * time_s / rows)
        return time_s - slope * rows, slope

    def add(self, rows: int, time_s: float) -> None:
        """Count a step; what took very long was interrupted."""
        if self._weight > PRIOR_STEPS:
            base_s, row_s = self.fit(0.0)
            time_s = min(time_s, 3 * (base_s + row_s * rows))
        self._weight = SLOW_DECAY * self._weight + 1
        self._rows = SLOW_DECAY * self._rows + rows
        self._time_s = SLOW_DECAY * self._time_s + time_s
        self._rows_rows = SLOW_DECAY * self._rows_rows + rows * rows
        self._rows_time = SLOW_DECAY * self._rows_time + rows * time_s


class Chances:
    """How often a free source's guess at each depth was right where those before it were."""

    def __init__(self, prior: Chances | None = None) -> None:
        self._prior = prior
        self._right, self._seen = [0.0] * MAX_NODES, [0.0] * MAX_NODES

    def at(self, depth: int) -> float:
        """The chance at a depth counted from 0; what is not known yet is as before, or as in other texts."""
        if self._prior is not None:
            known = self._prior.at(depth)
        elif depth and self._seen[depth] < 1:
            return self.at(depth - 1)
        else:
            known = FIRST_CHANCE
        return (self._right[depth] + PRIOR_STEPS * known) / (self._seen[depth] + PRIOR_STEPS)

    def add(self, depth: int, *, is_right: bool) -> None:
        decay = SLOW_DECAY if self._prior is None else DECAY
        self._right[depth] = decay * self._right[depth] + is_right
        self._seen[depth] = decay * self._seen[depth] + 1
        if self._prior is not None:
            self._prior.add(depth, is_right=is_right)


@dataclass
class Earnings:
    """Steps that a source with a model was asked in, what they brought and verified, and what drafts took.

    timed, draft_s: the drafts whose time counts, and their time.
    """

    steps: float = 0.0
    tokens: float = 0.0
    nodes: float = 0.0
    timed: float = 0.0
    draft_s: float = 0.0

    def rate(self, costs: tuple[float, float]) -> float:
        """Tokens a second, infinite for a source that was never asked; drafts of unknown cost are free."""
        draft_s = self.draft_s / self.timed if self.timed else 0.0
        time_s = (draft_s + costs[0]) * self.steps + costs[1] * self.nodes
        return self.tokens / time_s if time_s > 0 else math.inf

    def share(self) -> Earnings:
        """The same for at most PRIOR_STEPS steps."""
        share = PRIOR_STEPS / max(self.steps, PRIOR_STEPS)
        return Earnings(*(share * value for value in astuple(self)))

    def add(self, num_tokens: int, num_nodes: int, *, draft_s: float, is_steady: bool) -> None:
        """Count a step; a draft that is not steady had to catch up with the text, which tells at most its cost."""
        if self.timed:
            draft_s = min(draft_s, (3 if is_steady else 1) * self.draft_s / self.timed)
        self.steps = DECAY * self.steps + 1
        self.tokens = DECAY * self.tokens + num_tokens
        self.nodes = DECAY * self.nodes + num_nodes
        if is_steady or self.timed:
            self.timed = DECAY * self.timed + 1
            self.draft_s = DECAY * self.draft_s + draft_s

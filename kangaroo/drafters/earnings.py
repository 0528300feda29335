"""What drafting is measured to bring and to cost, recent steps counting most."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from kangaroo.drafters.ngrams import confidence_of

# How much an older step counts for after each newer one: in a text, and in what all texts tell.
DECAY, SLOW_DECAY = 0.97, 0.995
# Steps that what is known already counts for beside those of a text.
PRIOR_STEPS = 4.0
# The chance that the first guess of a source nobody knows is right.
FIRST_CHANCE = 0.5
# Confidences are told apart by these: shares of matches that agree, then the lengths of single ones.
BIN_STARTS = (0.2, 0.35, *map(confidence_of, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)))
NUM_BINS = 1 + len(BIN_STARTS)
# The share of the time that tries may lose.
TRY_SHARE = 0.01
# The share of a text's time that a source with a model must save, or else waits for so many texts at most; and the
# texts that this is an average of.
MIN_SAVED, MAX_TEXTS, RECENT_TEXTS = 0.03, 32, 4
# Steps are told apart by what they promise, in plain steps: in levels this wide, from one plain step on.
NUM_LEVELS, LEVEL_WIDTH = 4, 0.25
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
    """How often a source's guesses were right whose parents were, by how sure it was of them.

    rates: by the bin of a guess, see BIN_STARTS; NUM_BINS later for those behind other guesses, which came true.
    """

    def __init__(self, prior: Chances | None = None) -> None:
        """prior: of all texts, from which a text starts, and which learns from it."""
        self._prior = prior
        self.rates: list[float] = [FIRST_CHANCE] * (2 * NUM_BINS) if prior is None else prior.rates.copy()
        self._steps = [PRIOR_STEPS] * (2 * NUM_BINS)
        self._most = 1 / (1 - (SLOW_DECAY if prior is None else DECAY))

    def add(self, place: int, *, is_right: bool) -> None:
        """Count a guess."""
        steps = self._steps[place]
        if steps < self._most:
            self._steps[place] = steps = steps + 1
        self.rates[place] += (is_right - self.rates[place]) / steps
        if self._prior is not None:
            self._prior.add(place, is_right=is_right)


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


class Gains:
    """By what factor asking one more lookup raised the rate a step promised, its own time included.

    By how many plain steps the step promised to be worth without it.
    """

    def __init__(self) -> None:
        # What nobody knows is worth a look.
        self._gains, self._steps = [1.01] * NUM_LEVELS, [0.0] * NUM_LEVELS

    def at(self, worth: float) -> float:
        """The factor to expect."""
        return self._gains[_level(worth)]

    def add(self, worth: float, gain: float) -> None:
        """Count a step."""
        level = _level(worth)
        steps = self._steps[level] = min(self._steps[level] + 1, 1 / (1 - DECAY))
        self._gains[level] += (gain - self._gains[level]) / steps


def _level(worth: float) -> int:
    return min(int((worth - 1) / LEVEL_WIDTH), NUM_LEVELS - 1)


@dataclass
class Budget:
    """What recent steps took, and what was lost by asking sources, net of what that won."""

    time_s: float = 0.0
    lost_s: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether sources may be tried."""
        return self.lost_s <= TRY_SHARE * self.time_s

    def add(self, time_s: float, lost_s: float) -> None:
        """Count a step."""
        self.time_s = SLOW_DECAY * self.time_s + time_s
        self.lost_s = SLOW_DECAY * self.lost_s + lost_s


@dataclass
class Standing:
    """Whether texts are worth preparing for a source with a model: what that takes shows in no single step.

    saved: the share of a text's time that the source saved, of recent texts; num_out, patience: the texts since it took
    part, and those it waits.
    """

    saved: float = MIN_SAVED
    num_out: int = 0
    patience: int = 1

    def take_part(self) -> bool:
        """Whether the source takes part in another text."""
        if self.saved >= MIN_SAVED:
            self.patience = 1
        elif self.num_out < self.patience:
            self.num_out += 1
            return False
        else:
            self.patience = min(2 * self.patience, MAX_TEXTS)
        self.num_out = 0
        return True

    def add(self, won_s: float, time_s: float) -> None:
        """Count a text that it took part in."""
        if time_s:
            self.saved += (won_s / (time_s + max(0.0, won_s)) - self.saved) / RECENT_TEXTS

"""How deep to draft under the load there is, by what steps were measured to cost and drafts to bring.

Verification is nearly free while a pass waits for weights to be read, and stops being so as a batch grows. Steps are
timed for every batch size and depth; what a depth brings follows from the drafts that nothing cut short.
"""

from collections import defaultdict, deque
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from statistics import mean, median

from kangaroo.drafters.base import DEFAULT_PRICES, MAX_NODES, Prices, Sequence, is_chain
from kangaroo.types import Draft, Outcome

# A gain or loss below this is within what measurements of single steps tell apart.
MIN_GAIN = 1.03
# What whole drafts may lose before they end.
MAX_LOSS = 0.99
# Steps between two plain ones while drafting wins, and between tries to draft while plain decoding does: texts that
# were hard to guess may become easy.
PROBE_EVERY = 64
MIN_PATIENCE, MAX_PATIENCE = 8, 128
# What a try takes beyond plain steps, and catching up with the text before it, which may be long, may be this share of
# the time between tries.
TRY_SHARE = 0.01
# Drafts of a try: the first may have to catch up, and is not counted. Steps that they are waited for at most: what they
# were measured to take may have been a disturbance.
TRY_LENGTH, MAX_WAIT = 2, 4 * MAX_PATIENCE
# Steps between two choices: neither costs nor acceptance change faster.
CHOOSE_EVERY = 8
# Times a median is taken of, and how many of them the first comparison needs of either kind.
RUN_LENGTH, NUM_NEEDED = 8, 3
# Comparisons that count, and drafts that do.
NUM_RATIOS, NUM_DRAFTS = 5, 64
# Drafts of each sequence that are remembered once drafting has lost.
FEW_DRAFTS = 8
# Texts that tell what to expect of a new one, and the drafts of its own that this counts as much as.
NUM_TEXTS, NUM_EXPECTED = 16, 4
# Batch sizes this close share their times until each has its own.
MAX_RATIO = 1.5
# Depths to choose from besides what the drafter itself would do.
SHALLOW = (1, 2, 3, 4)


class _Load:
    """What drafted steps take at one batch size, in plain steps: only steps close to each other are compared."""

    def __init__(self) -> None:
        # By the depth that drafts were bounded to, 0 for plain steps: the latest times, with when they were taken.
        self._times: dict[int, deque[tuple[int, float]]] = {}
        self._ratios: dict[int, deque[float]] = {}
        # Rows of the latest drafts, and what verifying them took.
        self._verified: deque[tuple[int, float]] = deque(maxlen=NUM_DRAFTS)
        self._num_steps = self._last_bound = 0

    @property
    def is_known(self) -> bool:
        return MAX_NODES in self._ratios

    @property
    def plain_s(self) -> float:
        """The time of a plain step, when one was last run."""
        return median(time_s for _, time_s in self._times[0])

    def needs_plain(self) -> bool:
        """Whether too few plain steps were timed to compare with."""
        return len(self._times.get(0, ())) < NUM_NEEDED

    def ratio(self, bound: int) -> float | None:
        """Plain steps that one drafted to this depth takes, None where it was not measured."""
        return median(self._ratios[bound]) if bound in self._ratios else None

    def add(self, bound: int, time_s: float) -> None:
        """Count a step whose drafts were at most so deep, 0 for a plain one."""
        self._num_steps += 1
        self._times.setdefault(bound, deque(maxlen=RUN_LENGTH)).append((self._num_steps, time_s))
        has_turned, depth = bound != self._last_bound, bound or self._last_bound
        self._last_bound = bound
        # The first comparison rests on several steps of both; later ones are made where one kind follows another.
        if depth == 0 or (depth in self._ratios and not has_turned):
            return
        drafted_s, plain_s = self._recent_s(depth), self._recent_s(0)
        is_due = depth in self._ratios or len(drafted_s) >= NUM_NEEDED
        if is_due and drafted_s and plain_s:
            ratios = self._ratios.setdefault(depth, deque(maxlen=NUM_RATIOS))
            ratios.append(median(drafted_s) / median(plain_s))

    def add_rows(self, num_rows: int, verify_time_s: float) -> None:
        """Count a verification."""
        self._verified.append((num_rows, verify_time_s))

    def price_node(self, num_sequences: int) -> Prices:
        """The chance of being accepted at which one more row pays for its verification.

        What a row costs is the slope of verification times over the rows beyond those of a plain step, by least
        squares from there; a token is worth the time that plain decoding takes for one.
        """
        times: defaultdict[int, list[float]] = defaultdict(list)
        for num_rows, time_s in self._verified:
            times[num_rows - num_sequences].append(time_s)
        weight = sum(len(taken) * more**2 for more, taken in times.items())
        if len(self._verified) < NUM_NEEDED or not weight:
            return DEFAULT_PRICES
        plain_s = self.plain_s
        row_s = sum(len(taken) * more * (median(taken) - plain_s) for more, taken in times.items()) / weight
        price = min(1.0, max(0.0, row_s) * num_sequences / plain_s)
        return Prices(branch=price, chain=price)

    def _recent_s(self, bound: int) -> list[float]:
        oldest = self._num_steps - PROBE_EVERY - RUN_LENGTH
        return [time_s for taken, time_s in self._times.get(bound, ()) if taken >= oldest]


class Pace:
    """Chooses the depth of drafts that emits most tokens a second, and learns from every step.

    num_steps, num_drafting: steps so far, and those of them that drafted.
    """

    def __init__(self) -> None:
        self.num_steps, self.num_drafting = 0, 0
        self.prices = DEFAULT_PRICES
        self._loads: dict[int, _Load] = {}
        # Tokens drafted and accepted where nothing but the drafter bounded the draft.
        self._drafts: deque[tuple[float, float]] = deque(maxlen=NUM_DRAFTS)
        # The same of drafts that the limit cut short, since it was set.
        self._cut_drafts: deque[tuple[float, float]] = deque(maxlen=NUM_DRAFTS)
        # The first of these by texts: of those under way, and the means of those that have ended.
        self._texts: dict[Sequence, list[tuple[int, int]]] = {}
        self._past: deque[tuple[float, float]] = deque(maxlen=NUM_TEXTS)
        self._has_trees = False
        self._batch_size = self._since_choice = self._since_probe = 0
        self._limit = self._granted = self._last_probe = MAX_NODES
        self._patience = MIN_PATIENCE
        # The texts of the last drafts, by how long they were then, and what catching up with a token took.
        self._drafted: dict[Sequence, int] = {}
        self._num_missed, self._catch_up_s = 0, 0.0
        self._is_steady = self._has_news = False
        self._sequences: SequenceOf[Sequence] = ()

    @property
    def is_drafting(self) -> bool:
        """Whether drafting wins as things stand; tries are no part of it."""
        return self._limit > 0

    def limit(self, sequences: SequenceOf[Sequence]) -> int:
        """The depth to draft to in the coming step; 0 where plain decoding is faster."""
        self._meet(sequences)
        last_granted, self._granted = self._granted, self._decide(sequences)
        # A drafter may have to catch up with the text first, which is no part of what drafting costs from then on.
        self._is_steady = True
        if self._granted:
            self._is_steady = last_granted > 0 and all(one in self._drafted for one in sequences)
            self._num_missed = 0 if self._is_steady else self._count_missed(sequences)
            self._drafted = {one: len(one.tokens) for one in sequences}
        return self._granted

    def observe(self, draft: Draft, outcome: Outcome, *, draft_time_s: float, verify_time_s: float) -> None:
        """Learn what the step cost and brought."""
        num_sequences, num_rows = len(draft.parents), sum(draft.num_nodes)
        self.num_steps += 1
        is_plain, load = num_rows == num_sequences, self._loads.setdefault(num_sequences, _Load())
        # A drafter that had nothing to say took its time nevertheless; only a step that asked for none is plain.
        if self._is_steady and (not is_plain or self._granted == 0):
            load.add(self._granted, draft_time_s + verify_time_s)
        if is_plain:
            return
        self.num_drafting += 1
        self._has_news = True
        if self._is_steady:
            load.add_rows(num_rows, verify_time_s)
        elif load.is_known:
            usual_s = (load.ratio(MAX_NODES) or 1.0) * load.plain_s
            self._catch_up_s = max(0.0, draft_time_s + verify_time_s - usual_s) / self._num_missed
        for text, parents, path in zip(self._sequences, draft.parents, outcome.paths, strict=True):
            self._has_trees |= not is_chain(parents)
            brought = len(parents) - 1, len(path) - 1
            if self._granted == MAX_NODES:
                self._drafts.append(brought)
                self._texts[text].append(brought)
            else:
                self._cut_drafts.append(brought)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self._drafted.pop(sequence, None)
        drafts = self._texts.pop(sequence, None)
        if drafts:
            self._past.append(_mean_draft(drafts))

    def _meet(self, sequences: SequenceOf[Sequence]) -> None:
        """Where all texts are new, what the last one was like tells less than what most were like."""
        self._sequences = sequences
        new = [one for one in sequences if one not in self._texts]
        self._texts.update((one, []) for one in new)
        if len(new) == len(sequences) and self._past:
            self._drafts.clear()
            self._cut_drafts.clear()
            self._drafts.extend([_mean_draft(self._past)] * NUM_EXPECTED)
            self._since_choice, self._has_news = CHOOSE_EVERY, True

    def _decide(self, sequences: SequenceOf[Sequence]) -> int:
        num_sequences = len(sequences)
        if num_sequences != self._batch_size:
            self._batch_size, self._since_choice, self._has_news = num_sequences, CHOOSE_EVERY, True
        size = self._nearest_known(num_sequences)
        if size is None:
            self.prices = DEFAULT_PRICES
            return 0 if self._loads.setdefault(num_sequences, _Load()).needs_plain() else MAX_NODES
        self._since_choice += 1
        if self._since_choice >= CHOOSE_EVERY and self._has_news:
            self._since_choice, self._has_news, load = 0, False, self._loads[size]
            self._turn(self._choose(load))
            self.prices = load.price_node(size)
        self._since_probe += 1
        if self._limit:
            self._patience = MIN_PATIENCE
            if self._since_probe < PROBE_EVERY:
                return self._limit
            self._since_probe = 0
            # Beside plain steps, whole drafts now and then show what those that are cut short cannot.
            self._last_probe = MAX_NODES if self._last_probe == 0 and self._limit != MAX_NODES else 0
            return self._last_probe
        if self._since_probe < self._patience:
            return 0
        if self._granted:
            # A try that fails again waits twice as long.
            self._since_probe, self._since_choice = 0, CHOOSE_EVERY
            self._patience = min(2 * self._patience, MAX_PATIENCE)
        elif self._price_try(sequences, self._loads[size]) > TRY_SHARE * self._since_probe:
            return 0
        return MAX_NODES

    def _price_try(self, sequences: SequenceOf[Sequence], load: _Load) -> float:
        """What a try takes that brings nothing, in plain steps."""
        whole = load.ratio(MAX_NODES)
        assert whole is not None, "only what is known to lose is tried"
        catch_up = self._catch_up_s * self._count_missed(sequences) / load.plain_s
        return catch_up + min(TRY_LENGTH * max(0.0, whole - 1), TRY_SHARE * MAX_WAIT)

    def _count_missed(self, sequences: SequenceOf[Sequence]) -> int:
        """Tokens since the last drafts, at least one."""
        return max(1, sum(len(one.tokens) - self._drafted.get(one, 0) for one in sequences))

    def _turn(self, limit: int) -> None:
        if limit == self._limit:
            return
        if limit != MAX_NODES:
            # What deeper drafts would have brought before counts less than what was seen since.
            self._drafts.extend(self._cut_drafts)
        if limit == 0:
            self._since_probe = 0
            # Tries bring little, and texts may become easy: what made drafting lose is soon outweighed.
            while len(self._drafts) > FEW_DRAFTS * self._batch_size:
                self._drafts.popleft()
        self._cut_drafts.clear()
        self._limit = limit

    def _nearest_known(self, num_sequences: int) -> int | None:
        """The known batch size that tells about this one."""
        if num_sequences in self._loads and self._loads[num_sequences].is_known:
            return num_sequences
        known = [size for size, load in self._loads.items() if load.is_known]
        nearest = min(known, key=lambda size: abs(size - num_sequences), default=0)
        if not nearest or max(nearest, num_sequences) > MAX_RATIO * min(nearest, num_sequences):
            return None
        return nearest

    def _choose(self, load: _Load) -> int:
        """Whole drafts unless they lose to plain decoding; then the shallower depth that wins, if one does.

        What a depth costs that was not tried lies on the line between plain steps and whole drafts; trees have none.
        """
        whole = load.ratio(MAX_NODES)
        assert whole is not None, "a load is known by what whole drafts cost"
        gain = (1 + mean(accepted for _, accepted in self._drafts)) / whole
        # A gain that measurements cannot tell from none is no reason to begin; a loss is one to stop.
        if gain >= (MAX_LOSS if self._limit == MAX_NODES else MIN_GAIN):
            return MAX_NODES
        best, best_gain = 0, MIN_GAIN
        num_drafted = sum(depth for depth, _ in self._drafts)
        for bound in () if self._has_trees else SHALLOW:
            # Drafts that were cut no shallower than here show the same as whole ones do, and are newer.
            seen = [*self._drafts, *(self._cut_drafts if bound <= self._limit else ())][-NUM_DRAFTS:]
            num_emitted = 1 + mean(min(accepted, bound) for _, accepted in seen)
            # A batch of many sequences may have drafted for few, none of them among those remembered.
            share = sum(min(depth, bound) for depth, _ in self._drafts) / max(1, num_drafted)
            gain = num_emitted / (load.ratio(bound) or 1 + share * (whole - 1))
            if gain > best_gain:
                best, best_gain = bound, gain
        return best


def _mean_draft(drafts: Collection[tuple[float, float]]) -> tuple[float, float]:
    """Tokens drafted and accepted a draft."""
    return mean(drafted for drafted, _ in drafts), mean(accepted for _, accepted in drafts)

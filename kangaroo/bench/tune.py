"""Which drafts serve a machine best: predicted for every setting from measured costs and judged guesses, then run.

Costs are those of kangaroo.cost; guesses are judged in one teacher-forced pass over the target's own texts, from which
the steps of every setting follow (bench.agreement).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, zip_longest
from pathlib import Path

from kangaroo.bench.agreement import Judged, Step, follow_chains, follow_trees, judge_adapter
from kangaroo.bench.texts import Text, fill_batches, race, split_texts
from kangaroo.cost import Meter, StepCosts, interpolate, measure_costs, measure_node_s
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.base import Prices
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.stopping import ConfidenceThreshold
from kangaroo.drafters.tree import CHAIN, Branching
from kangaroo.errors import SettingsError
from kangaroo.model.transformer import Transformer
from kangaroo.tuning import Tuned

GAMMAS = tuple(range(1, 11))
ETAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
TREE_GAMMAS, TREE_ETAS, TREE_BUDGETS, NUM_SIBLINGS = (4, 6, 8), (0.1, 0.2, 0.3), (8, 16), 3
# Depths whose costs are measured: passes of up to 32 rows, and of as many for every sequence of a larger batch.
DEPTHS, BATCH_DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 15, 23, 31), (1, 2, 4, 7, 10)
# Never stops a draft, but has confidences worked out as any other threshold above 0 does.
LEAST_ETA = 1e-30
NUM_VALIDATED = 3

Costs = Mapping[int, StepCosts]


@dataclass(frozen=True)
class Setting:
    """What is predicted: how an adapter, the place-th of those given, drafts for batches of a size."""

    place: int
    batch_size: int
    gamma: int
    eta: float
    branching: Branching = CHAIN


@dataclass(frozen=True)
class Prediction:
    """A setting's speedup over plain decoding, as it was predicted and, where it was run, measured."""

    setting: Setting
    speedup: float
    tokens_per_step: float
    drafted_per_step: float
    measured: float | None = None
    measured_tokens_per_step: float | None = None

    @property
    def error(self) -> float | None:
        """How far the prediction is from what was measured, in terms of that."""
        return None if self.measured is None else self.speedup / self.measured - 1

    def to_dict(self) -> dict[str, object]:
        """The fields by name, flat, with the error."""
        own = asdict(self)
        setting = own.pop("setting")
        branching = setting.pop("branching")
        return {**setting, **branching, **own, "error": self.error}

    def to_tuned(self) -> Tuned:
        """What the tuning file keeps of one that was run."""
        assert self.measured is not None, "only what was run is kept"
        setting, branching = self.setting, self.setting.branching
        return Tuned(batch_size=setting.batch_size, gamma=setting.gamma, eta=setting.eta, predicted=self.speedup,
                     num_siblings=branching.num_siblings, max_nodes=branching.max_nodes,
                     measured=self.measured)  # fmt: skip


class Tuner:
    """Predicts and runs settings of adapters on the target's own texts."""

    def __init__(self, target: Transformer, texts: Sequence[Text], *, adapters: Sequence[Path]) -> None:
        """Raises AdapterError for one that does not fit the target."""
        self._target = target
        self._texts = texts
        self._adapters = [Adapter.find(folder, target, exit_layer=None) for folder in adapters]
        self._judged = [
            [judge_adapter(target, adapter, text=text, num_guesses=NUM_SIBLINGS) for text in texts]
            for adapter in self._adapters
        ]
        self.costs: list[dict[int, StepCosts]] = [{} for _ in adapters]

    def drafter(self, setting: Setting) -> KangarooDrafter:
        """The drafter of a setting."""
        stopping = ConfidenceThreshold(setting.gamma, setting.eta)
        adapter = self._adapters[setting.place]
        return KangarooDrafter(self._target, adapter, stopping=stopping, branching=setting.branching)

    def measure(self, batch_sizes: Sequence[int]) -> None:
        """Measure every adapter's costs at these batch sizes, and at 1."""
        prompts = [text.token_ids[: text.num_prompt] for text in self._texts]
        for place, costs in enumerate(self.costs):
            for size in sorted({1, *batch_sizes}):
                depths = DEPTHS if size == 1 else BATCH_DEPTHS
                drafter = self.drafter(Setting(place, size, max(depths), LEAST_ETA))
                costs[size] = measure_costs(self._target, drafter, prompts=prompts, depths=depths, batch_size=size)
            setting = Setting(place, 1, max(TREE_GAMMAS), min(TREE_ETAS))
            pair = self.drafter(setting), self.drafter(replace(setting, branching=Branching(NUM_SIBLINGS)))
            node_s = measure_node_s(self._target, pair, prompts=prompts)
            costs[1] = replace(costs[1], node_s=node_s)
            for size in [size for size in costs if size > 1]:
                beside_s = max(0.0, costs[size].token_s - costs[1].token_s) / (size - 1)
                costs[size] = replace(costs[size], node_s=beside_s)

    def predict_all(self, batch_sizes: Sequence[int]) -> Iterator[Prediction]:
        """Every setting of the grid."""
        for place, costs in enumerate(self.costs):
            # Nothing is drafted behind the only token of a chain, however sure it is.
            for gamma, eta in [(1, 0.0), *product(GAMMAS[1:], ETAS)]:
                for size in batch_sizes:
                    setting = Setting(place, size, gamma, eta)
                    yield predict(setting, self._follow(setting), costs=costs)
            for gamma, eta, budget, size in product(TREE_GAMMAS, TREE_ETAS, TREE_BUDGETS, batch_sizes):
                setting = Setting(place, size, gamma, eta, Branching(NUM_SIBLINGS, budget))
                yield predict(setting, self._follow(setting), costs=costs)

    def validate(self, predictions: Sequence[Prediction], *, batch_size: int, num_rounds: int) -> list[Prediction]:
        """Run the settings in turn with plain decoding, at the prices they were predicted with; the fastest first."""
        settings = [one.setting for one in predictions]
        paces = [Meter() for _ in settings]
        for pace, one in zip(paces, settings, strict=True):
            price = self._price(one)
            pace.prices = Prices(branch=price, chain=price)
        drafters = [self.drafter(one) for one in settings]
        texts = fill_batches(self._texts, batch_size)
        _, *raced = race(self._target, drafters, texts=texts, batch_size=batch_size, paces=paces,
                         num_rounds=num_rounds)  # fmt: skip
        ran = [
            replace(one, measured=speedup, measured_tokens_per_step=run.tokens_per_step)
            for one, (run, speedup) in zip(predictions, raced, strict=True)
        ]
        return sorted(ran, key=lambda one: one.measured or 0.0, reverse=True)

    def _price(self, setting: Setting) -> float:
        return node_price(self.costs[setting.place][setting.batch_size])

    def _follow(self, setting: Setting) -> list[list[Step]]:
        """The steps of every text, those repeated that fill a batch."""
        gamma, eta, price, branching = setting.gamma, setting.eta, self._price(setting), setting.branching
        is_chain = branching.num_siblings == 1
        if is_chain and eta == 0 and self._target.device.type != "cpu":
            # Such chains are drafted without a look at confidences.
            price = 0.0

        def follow(one: Judged) -> list[Step]:
            if is_chain:
                return list(follow_chains(one, gamma=gamma, eta=eta, price=price))
            return list(follow_trees(one, branching, gamma=gamma, eta=eta, price=price))

        return fill_batches([follow(one) for one in self._judged[setting.place]], setting.batch_size)


def predict(setting: Setting, steps: Sequence[Sequence[Step]], *, costs: Costs) -> Prediction:
    """The speedup over plain decoding of steps [texts, steps], texts decoded batch_size at a time.

    A group's sequences step together until each has ended; costs: by batch size, 1 among them.
    """
    plain_s, drafted_s = 0.0, 0.0
    plain = {size: one.plain_s for size, one in costs.items()}
    for group in split_texts(steps, setting.batch_size):
        lengths = [sum(step.num_accepted + 1 for step in one) for one in group]
        plain_s += sum(interpolate(plain, sum(length > at for length in lengths)) for at in range(max(lengths)))
        drafted_s += costs[1].first_s * len(group)
        for together in zip_longest(*group):
            active = [step for step in together if step is not None]
            num_levels, num_drafted = max(one.num_levels for one in active), sum(one.num_drafted for one in active)
            # What a batch size costs that was not measured lies between those that were, for as many nodes a sequence.
            times = {size: one.step_s(num_levels=num_levels, num_drafted=num_drafted * size / len(active))
                     for size, one in costs.items()}  # fmt: skip
            drafted_s += interpolate(times, len(active))
    every = [step for one in steps for step in one]
    return Prediction(
        setting,
        speedup=plain_s / drafted_s,
        tokens_per_step=sum(step.num_accepted + 1 for step in every) / len(every),
        drafted_per_step=sum(step.num_drafted for step in every) / len(every),
    )


def node_price(costs: StepCosts) -> float:
    """The chance of being accepted at which one more node pays for its verification (engine/pace.py)."""
    return min(1.0, costs.row_s * costs.batch_size / costs.plain_s)


def tune(tuner: Tuner, *, batch_sizes: Sequence[int], num_rounds: int = 3,
         report: Callable[[str], None] = lambda _: None) -> tuple[list[Prediction], list[Prediction]]:  # fmt: skip
    """Predict every setting and run the best three of each batch size; returns all predictions, and those that ran.

    report: is told what is being done. Raises SettingsError for batch sizes that are not.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise SettingsError(f"batch sizes must be whole numbers of at least 1, got {list(batch_sizes)}")
    report("measuring costs")
    tuner.measure(batch_sizes)
    report("predicting")
    predictions = sorted(tuner.predict_all(batch_sizes), key=lambda one: one.speedup, reverse=True)
    ran = []
    for size in batch_sizes:
        report(f"running the best at batch size {size}")
        best = pick_best([one for one in predictions if one.setting.batch_size == size])
        ran += tuner.validate(best, batch_size=size, num_rounds=num_rounds)
    return predictions, ran


def pick_best(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The first three, without those that come to the same drafts as an earlier one."""
    found: dict[tuple[int, float, float], Prediction] = {}
    for one in predictions:
        found.setdefault((one.setting.place, one.tokens_per_step, one.drafted_per_step), one)
    return list(found.values())[:NUM_VALIDATED]

"""A training run, whatever is trained: steps, evaluations, checkpoints and the report at its end.

The frozen target runs beside what is trained and supplies the states it reads, so no hidden states are saved.
Shapes: B windows, T positions.
"""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from kangaroo.bench.record import stamp
from kangaroo.drafters.companion import fingerprint
from kangaroo.errors import DataError, OutputError, SettingsError
from kangaroo.model.transformer import Transformer
from kangaroo.model.weights import DTYPES
from kangaroo.train.checkpoint import check_same, load_state, optimizer_tensors, restore_optimizer, save_state
from kangaroo.train.data import Dataset
from kangaroo.train.plan import TrainingPlan

REPORT_FILE = "report.json"
LOGITS_PER_CHUNK = 1 << 25  # bounds the memory of [N, V] float32 logits: 128 MiB each
HELD_OUT_TOKENS = 16_384  # positions of the held-out split that one evaluation reads
MAX_GRADIENT_NORM = 1.0

Plan = TypeVar("Plan", bound=TrainingPlan)


@dataclass(frozen=True)
class Progress:
    """One finished step: its training loss in nats, the held-out metrics where it was evaluated.

    report is what report.json holds, on the last step only.
    """

    step: int
    loss: float
    tokens_per_s: float
    metrics: dict[str, float] | None = None
    report: dict[str, Any] | None = None


class TrainingRun(ABC, Generic[Plan]):
    """The state of one training run; noun is what it trains, in its report and its checkpoints."""

    noun: ClassVar[str]

    def __init__(self, target: Transformer, dataset: Dataset, *, plan: Plan, tensors: dict[str, Tensor]) -> None:
        """tensors: the weights to train, by name."""
        self.target, self.dataset, self.plan, self.tensors = target, dataset, plan, tensors
        for tensor in tensors.values():
            tensor.requires_grad_()
        self.optimizer = self.make_optimizer()
        self.step, self.loss = 0, math.nan
        self.learning_s, self.wall_time_s = 0.0, 0.0
        self.metrics: dict[str, float] | None = None
        self.history: list[dict[str, float]] = []
        # What a resumed run must share with this one; hashing the data takes time, so once.
        self.facts = {"target_fingerprint": fingerprint(target), "data": dataset.digest()}
        # As it begins: the code may change under a long run.
        self.stamp = stamp(target.device.type) | {"kernel_backend": target.backend}

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """An optimiser of the weights; a group's "scale" multiplies the plan's learning rate."""

    @abstractmethod
    def learn(self, tokens: Tensor, mask: Tensor) -> float:
        """One optimiser step on windows [B, T + 1] with the mask [B, T] of predicted tokens; returns the loss."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """The metrics of the held-out split."""

    @abstractmethod
    def save_result(self, output: Path) -> dict[str, Any]:
        """Write what was trained, once it has been measured; returns its config."""

    @property
    def num_tokens(self) -> int:
        return self.step * self.plan.batch_size * self.plan.sequence_length

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.learning_s if self.learning_s > 0 else 0.0

    def advance(self) -> Progress:
        """Learn from the next batch; evaluate where the plan says so."""
        plan, started = self.plan, time.perf_counter()
        tokens, mask = self.dataset.batch(plan.batch_size, seed=plan.seed, step=self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(self.step) * group["scale"]
        self.loss = self.learn(tokens.to(self.target.device), mask.to(self.target.device))
        if not math.isfinite(self.loss):
            raise SettingsError(f"the loss is {self.loss} at step {self.step + 1}; start again with a learning_rate "
                                f"below {plan.learning_rate}")  # fmt: skip
        self.step += 1
        self.learning_s += time.perf_counter() - started
        metrics = None
        if self.step % plan.evaluate_every == 0 or self.step == plan.num_steps:
            self.metrics = metrics = self.measure()
            self.history.append({"step": self.step, "train_loss": self.loss} | metrics)
        self.wall_time_s += time.perf_counter() - started
        return Progress(self.step, self.loss, self.tokens_per_s, metrics=metrics)

    def descend(self) -> None:
        """One step along the clipped gradients."""
        torch.nn.utils.clip_grad_norm_(self.tensors.values(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def training_precision(self) -> AbstractContextManager[object]:
        """What matrices multiply in while learning."""
        return autocast(self.target.device, DTYPES[self.plan.precision])

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Pieces of so many rows whose logits are few enough to be held at once."""
        size = max(1, LOGITS_PER_CHUNK // self.target.config.vocab_size)
        return (slice(start, start + size) for start in range(0, num_rows, size))

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Evenly spread held-out windows [B, T + 1] with their masks [B, T]."""
        windows = self.dataset.held_out
        count = min(len(windows), max(1, HELD_OUT_TOKENS // self.plan.sequence_length))
        spread = torch.linspace(0, len(windows) - 1, count, dtype=torch.float64).round().long().numpy()
        for start in range(0, count, self.plan.batch_size):
            tokens, mask = windows.at(spread[start : start + self.plan.batch_size])
            yield tokens.to(self.target.device), mask

    def _names(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor in self.tensors.items()}

    def save(self, output: Path) -> None:
        """Replace output's checkpoint by this state."""
        progress = {"step": self.step, "loss": self.loss, "learning_s": self.learning_s,
                    "wall_time_s": self.wall_time_s, "history": self.history,
                    "plan": asdict(self.plan), "run": self.facts}  # fmt: skip
        weights = {f"{self.noun}.{name}": tensor for name, tensor in self.tensors.items()}
        save_state(output, weights | optimizer_tensors(self.optimizer, self._names()), progress=progress)

    def restore(self, output: Path) -> None:
        """Continue from output's checkpoint; raises ResumeError where it is damaged or of another run."""
        tensors, progress = load_state(output)
        settings = {name: value for name, value in asdict(self.plan).items() if name != "model"}
        check_same("run", progress.get("run", {}), now=self.facts)
        check_same("plan", progress.get("plan", {}), now=settings)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[f"{self.noun}.{name}"])
        restore_optimizer(self.optimizer, self._names(), tensors=tensors)
        self.step, self.loss = progress["step"], progress["loss"]
        self.learning_s, self.wall_time_s = progress["learning_s"], progress["wall_time_s"]
        self.history = progress["history"]

    def finish(self, output: Path) -> dict[str, Any]:
        """Write what was trained and its report."""
        metrics = self.metrics or self.measure()
        try:
            report = self._report(metrics, trained=self.save_result(output))
            (output / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the {self.noun} to {output}: {error.strerror or error}") from error
        return report

    def _report(self, metrics: dict[str, float], *, trained: dict[str, Any]) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "stamp": self.stamp,
            self.noun: trained,
            "num_parameters": sum(tensor.numel() for tensor in self.tensors.values()),
            "num_documents": self.dataset.num_documents,
            "num_skipped_files": self.dataset.num_skipped,
            "num_data_tokens": self.dataset.num_tokens,
            "num_tokens_seen": self.num_tokens,
            "wall_time_s": self.wall_time_s,
            "tokens_per_s": self.tokens_per_s,
            "num_threads": torch.get_num_threads(),
            "metrics": metrics,
            "history": self.history,
        }


def train(run: TrainingRun[Any], output: Path, *, resume: bool) -> Iterator[Progress]:
    """Train step by step; the last step leaves the run's results in output.

    With resume, continue from output's checkpoint exactly where an uninterrupted run would be; the call itself reads
    it, and raises ResumeError.
    """
    if resume:
        run.restore(output)
    return _advance_to_end(run, output)


def _advance_to_end(run: TrainingRun[Any], output: Path) -> Iterator[Progress]:
    plan = run.plan
    while run.step < plan.num_steps:
        progress = run.advance()
        if run.step % plan.checkpoint_every == 0 or run.step == plan.num_steps:
            run.save(output)
        if run.step < plan.num_steps:
            yield progress
    report = run.finish(output)
    yield Progress(run.step, run.loss, run.tokens_per_s, metrics=report["metrics"], report=report)


def check_plan(plan: TrainingPlan, target: Transformer) -> None:
    """Raise KernelError or SettingsError where the plan does not suit the target."""
    target.require_reference("train")
    if plan.sequence_length > target.config.context_length:
        raise SettingsError(f"sequence_length must be at most {target.config.context_length}, the model's context, "
                            f"got {plan.sequence_length}")  # fmt: skip
    if plan.precision == "float32" and target.dtype != torch.float32:
        raise SettingsError(f"precision float32 needs the target in float32, got {target.dtype}; or choose bfloat16")


def check_dataset(dataset: Dataset, target: Transformer) -> None:
    """Raise DataError where the data holds tokens that the target does not know."""
    largest = max(dataset.train.max_token, dataset.held_out.max_token)
    if largest >= target.config.vocab_size:
        raise DataError(f"the tokenizer makes id {largest}, the model knows {target.config.vocab_size}: "
                        "use the model's own tokenizer")  # fmt: skip


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in dtype; float32 is what the weights that are trained are in anyway."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

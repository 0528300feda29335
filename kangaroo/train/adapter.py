"""Online distillation of an adapter: the frozen target runs beside it and supplies both input and labels.

One target pass without gradients gives the states entering the exit layer and the final logits; the adapter
learns to turn the former into the latter under a soft cross-entropy (Kangaroo, section 3.2; DistillSpec).
Shapes: B windows, T positions, N positions with loss, D hidden size, V vocabulary.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kangaroo.drafters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, check_exit_layer
from kangaroo.errors import DataError, OutputError, SettingsError
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import DTYPES
from kangaroo.train.checkpoint import (
    check_same,
    load_state,
    optimizer_tensors,
    prepare_output,
    restore_optimizer,
    save_state,
)
from kangaroo.train.data import Dataset
from kangaroo.train.metrics import Positions
from kangaroo.train.plan import AdapterPlan

REPORT_FILE = "report.json"
RESULTS = (CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE)
LOGITS_PER_CHUNK = 1 << 25  # bounds the memory of [N, V] float32 logits: 128 MiB each
HELD_OUT_TOKENS = 16_384  # positions of the held-out split that one evaluation reads
MAX_GRADIENT_NORM = 1.0


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


def train_adapter(
    target: Transformer, dataset: Dataset, *, plan: AdapterPlan, output: Path, resume: bool = False
) -> Iterator[Progress]:
    """Train step by step; the last step leaves config.json, adapter.safetensors and report.json in output.

    With resume, continue from output's checkpoint exactly where an uninterrupted run would be. The call itself
    checks what can be checked before training. Raises AdapterError for an exit layer outside 1..L-1,
    SettingsError, DataError, OutputError or ResumeError.
    """
    check_plan(plan, target)
    largest = max(dataset.train.max_token, dataset.held_out.max_token)
    if largest >= target.config.vocab_size:
        raise DataError(f"the tokenizer makes id {largest}, the model knows {target.config.vocab_size}: "
                        "use the model's own tokenizer")  # fmt: skip
    prepare_output(output, resume=resume, results=RESULTS)
    run = AdapterRun(target, dataset, plan=plan)
    if resume:
        run.restore(output)
    return _train(run, output)


def _train(run: "AdapterRun", output: Path) -> Iterator[Progress]:
    plan = run.plan
    while run.step < plan.num_steps:
        progress = run.advance()
        if run.step % plan.checkpoint_every == 0 or run.step == plan.num_steps:
            run.save(output)
        if run.step < plan.num_steps:
            yield progress
    report = run.finish(output)
    yield Progress(run.step, run.loss, run.tokens_per_s, metrics=report["metrics"], report=report)


def check_plan(plan: AdapterPlan, target: Transformer) -> None:
    """Raise AdapterError, KernelError or SettingsError where the plan does not suit the target."""
    check_exit_layer(plan.exit_layer, target.num_layers)
    target.require_reference("train")
    if plan.sequence_length > target.config.context_length:
        raise SettingsError(f"sequence_length must be at most {target.config.context_length}, the model's context, "
                            f"got {plan.sequence_length}")  # fmt: skip
    if plan.precision == "float32" and target.dtype != torch.float32:
        raise SettingsError(f"precision float32 needs the target in float32, got {target.dtype}; or choose bfloat16")


def draft_cost(target: Transformer, adapter: Adapter) -> float:
    """Time of drafting one token in plain decoding steps, by the parameters each of them reads."""
    layers = [sum(tensor.numel() for tensor in layer.tensors().values()) for layer in target.layers]
    extra = sum(tensor.numel() for tensor in adapter.tensors.values())
    head = target.head.numel()
    return (sum(layers[: adapter.config.exit_layer]) + extra + head) / (sum(layers) + head)


class AdapterRun:
    """The state of one training run."""

    def __init__(self, target: Transformer, dataset: Dataset, *, plan: AdapterPlan) -> None:
        self.target, self.dataset, self.plan = target, dataset, plan
        self.adapter = Adapter.initialize(target, plan.exit_layer, seed=plan.seed, initialization=plan.initialization)
        self.tensors = self.adapter.tensors
        for tensor in self.tensors.values():
            tensor.requires_grad_()
        self.optimizer = self._make_optimizer()
        self.step, self.loss = 0, math.nan
        self.learning_s, self.wall_time_s = 0.0, 0.0
        self.positions: Positions | None = None
        self.history: list[dict[str, float]] = []
        # What a resumed run must share with this one; hashing the data takes time, so once.
        self.facts = {"target_fingerprint": self.adapter.config.target_fingerprint, "data": dataset.digest()}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW whose steps of the output projection are in units of the states it adds to.

        Their scale differs between models by orders of magnitude, and steps of one size would not get far from zero.
        """
        plan, tensors = self.plan, self.tensors
        tokens, _ = self.dataset.batch(plan.batch_size, seed=plan.seed, step=0)
        shallow, _ = self.target_states(tokens[:, :-1].to(self.target.device))
        scale = float(shallow.float().square().mean(dim=-1).sqrt().median())
        groups: list[dict[str, Any]] = [
            {"params": [tensors["qkv"]], "weight_decay": plan.weight_decay, "scale": 1.0},
            {"params": [tensors["output"]], "weight_decay": plan.weight_decay / scale, "scale": scale},
            {"params": [tensors["input_norm"], tensors["final_norm"]], "weight_decay": 0.0, "scale": 1.0},
        ]
        return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95))

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
        self.loss = self.learn(tokens, mask)
        if not math.isfinite(self.loss):
            raise SettingsError(f"the loss is {self.loss} at step {self.step + 1}; start again with a learning_rate "
                                f"below {plan.learning_rate}")  # fmt: skip
        self.step += 1
        self.learning_s += time.perf_counter() - started
        metrics = None
        if self.step % plan.evaluate_every == 0 or self.step == plan.num_steps:
            self.positions = self.evaluate()
            metrics = self.positions.summary()
            self.history.append({"step": self.step, "train_loss": self.loss} | metrics)
        self.wall_time_s += time.perf_counter() - started
        return Progress(self.step, self.loss, self.tokens_per_s, metrics=metrics)

    def learn(self, tokens: Tensor, mask: Tensor) -> float:
        """One optimiser step on windows [B, T + 1] with the mask [B, T] of predicted tokens; returns the loss.

        Gradients of the head's input are collected in chunks of rows, so no [B, T, V] tensor ever exists.
        """
        tokens, mask = tokens.to(self.target.device), mask.to(self.target.device)
        precision = _autocast(self.target.device, DTYPES[self.plan.precision])
        with precision:
            shallow, final = self.target_states(tokens[:, :-1])
            rows = self.draft_states(shallow)[mask]
        leaf, labels = rows.detach().requires_grad_(), final[mask]
        total = torch.zeros((), device=self.target.device)
        for chunk in self._chunks(len(leaf)):
            with precision:
                loss = self._soft_loss(leaf[chunk], labels[chunk]) / len(leaf)
            loss.backward()
            total += loss.detach()
        rows.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self.tensors.values(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(total)

    def target_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, T, D] of tokens [B, T] that enter the exit layer and that leave the last one."""
        target = self.target
        with torch.no_grad():
            attention = FullSequencePass(target.config, tokens.shape[1], device=target.device)
            hidden, taps = target.forward(
                target.embed(tokens), (0, target.num_layers), attention=attention, taps=(self.plan.exit_layer,)
            )
        return taps[self.plan.exit_layer], hidden

    def draft_states(self, shallow: Tensor) -> Tensor:
        """Normed states [B, T, D] for the shared head from states [B, T, D] entering the exit layer."""
        attention = FullSequencePass(self.adapter.model_config, shallow.shape[1], device=shallow.device)
        return self.adapter.forward(shallow, attention=attention)

    def _soft_loss(self, normed: Tensor, final: Tensor) -> Tensor:
        """Summed cross-entropy of the draft against the target's distribution, states [N, D] each."""
        with torch.no_grad():
            labels = torch.softmax(self.target.logits(final), dim=-1)
        logits = self.target.head_logits(normed)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    def _chunks(self, num_rows: int) -> Iterator[slice]:
        size = max(1, LOGITS_PER_CHUNK // self.target.config.vocab_size)
        return (slice(start, start + size) for start in range(0, num_rows, size))

    @torch.no_grad()
    def evaluate(self) -> Positions:
        """Compare draft and target on evenly spread held-out windows, in the precision they decode in."""
        windows = self.dataset.held_out
        count = min(len(windows), max(1, HELD_OUT_TOKENS // self.plan.sequence_length))
        spread = torch.linspace(0, len(windows) - 1, count, dtype=torch.float64).round().long().numpy()
        parts = [
            self._compare(*windows.at(spread[start : start + self.plan.batch_size]))
            for start in range(0, count, self.plan.batch_size)
        ]
        return Positions.join(parts, shape=(-1, self.plan.sequence_length))

    def _compare(self, tokens: Tensor, mask: Tensor) -> Positions:
        with _autocast(self.target.device, self.target.embedding.dtype):
            shallow, final = self.target_states(tokens[:, :-1].to(self.target.device))
            draft, final, flat = self.draft_states(shallow).flatten(0, 1), final.flatten(0, 1), mask.flatten()
            parts = [
                Positions.compare(
                    self.target.head_logits(draft[chunk]), self.target.logits(final[chunk]), mask=flat[chunk]
                )
                for chunk in self._chunks(len(draft))
            ]
        return Positions.join(parts, shape=(mask.shape[0], mask.shape[1]))

    def _names(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor in self.tensors.items()}

    def save(self, output: Path) -> None:
        """Replace output's checkpoint by this state."""
        progress = {"step": self.step, "loss": self.loss, "learning_s": self.learning_s,
                    "wall_time_s": self.wall_time_s, "history": self.history,
                    "plan": asdict(self.plan), "run": self.facts}  # fmt: skip
        weights = {f"adapter.{name}": tensor for name, tensor in self.tensors.items()}
        save_state(output, weights | optimizer_tensors(self.optimizer, self._names()), progress=progress)

    def restore(self, output: Path) -> None:
        """Continue from output's checkpoint; raises ResumeError where it is damaged or of another run."""
        tensors, progress = load_state(output)
        settings = {name: value for name, value in asdict(self.plan).items() if name != "model"}
        check_same("run", progress.get("run", {}), now=self.facts)
        check_same("plan", progress.get("plan", {}), now=settings)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(tensors[f"adapter.{name}"])
        restore_optimizer(self.optimizer, self._names(), tensors=tensors)
        self.step, self.loss = progress["step"], progress["loss"]
        self.learning_s, self.wall_time_s = progress["learning_s"], progress["wall_time_s"]
        self.history = progress["history"]

    def finish(self, output: Path) -> dict[str, Any]:
        """Write the adapter and its report, with the draft settings the held-out split recommends."""
        positions = self.positions or self.evaluate()
        gamma, eta = positions.recommend(draft_cost(self.target, self.adapter))
        self.adapter.config = self.adapter.config.model_copy(update={"gamma": gamma, "eta": eta})
        report = self._report(positions.summary())
        try:
            self.adapter.save(output, dtype=DTYPES[self.plan.dtype])
            (output / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write the adapter to {output}: {error.strerror or error}") from error
        return report

    def _report(self, metrics: dict[str, float]) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "adapter": self.adapter.config.model_dump(),
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


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in dtype; float32 is what the weights of the adapter are in anyway."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

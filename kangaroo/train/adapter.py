"""Online distillation of an adapter: the frozen target runs beside it and supplies both input and labels.

One target pass without gradients gives the states entering the exit layer and the final logits; the adapter
learns to turn the former into the latter under a soft cross-entropy (Kangaroo, section 3.2; DistillSpec).
Shapes: B windows, T positions, N positions with loss, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kangaroo.drafters.adapter import ADDING, WEIGHTS_FILE, Adapter, check_exit_layer
from kangaroo.drafters.companion import CONFIG_FILE
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import DTYPES
from kangaroo.train import run as training
from kangaroo.train.checkpoint import prepare_output
from kangaroo.train.data import Dataset
from kangaroo.train.metrics import Positions
from kangaroo.train.plan import AdapterPlan
from kangaroo.train.run import REPORT_FILE, Progress, TrainingRun, autocast, check_dataset, train

RESULTS = (CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE)


def train_adapter(
    target: Transformer, dataset: Dataset, *, plan: AdapterPlan, output: Path, resume: bool = False
) -> Iterator[Progress]:
    """Train step by step; the last step leaves config.json, adapter.safetensors and report.json in output.

    With resume, continue from output's checkpoint exactly where an uninterrupted run would be. The call itself
    checks what can be checked before training. Raises AdapterError for an exit layer outside 1..L-1,
    SettingsError, DataError, OutputError or ResumeError.
    """
    check_plan(plan, target)
    check_dataset(dataset, target)
    prepare_output(output, resume=resume, results=RESULTS)
    return train(AdapterRun(target, dataset, plan=plan), output, resume=resume)


def check_plan(plan: AdapterPlan, target: Transformer) -> None:
    """Raise AdapterError, KernelError or SettingsError where the plan does not suit the target."""
    check_exit_layer(plan.exit_layer, target.num_layers)
    training.check_plan(plan, target)


def draft_cost(target: Transformer, adapter: Adapter) -> float:
    """Time of drafting one token in plain decoding steps, by the parameters each of them reads."""
    layers = [sum(tensor.numel() for tensor in layer.tensors().values()) for layer in target.layers]
    extra = sum(tensor.numel() for tensor in adapter.tensors.values())
    head = target.head.numel()
    shared = 0 if "head" in adapter.tensors else head
    return (sum(layers[: adapter.config.exit_layer]) + extra + shared) / (sum(layers) + head)


class AdapterRun(TrainingRun[AdapterPlan]):
    """The state of one training run of an adapter."""

    noun = "adapter"

    def __init__(self, target: Transformer, dataset: Dataset, *, plan: AdapterPlan) -> None:
        self.adapter = Adapter.initialize(target, plan.exit_layer, kind=plan.adapter_kind, seed=plan.seed,
                                          initialization=plan.initialization)  # fmt: skip
        self.head = self.adapter.head(target)
        self.positions: Positions | None = None
        super().__init__(target, dataset, plan=plan, tensors=self.adapter.tensors)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW whose steps of the projections that add to the states are in units of these.

        Their scale differs between models by orders of magnitude, and steps of one size would not get far from zero.
        """
        plan, tensors = self.plan, self.tensors
        tokens, _ = self.dataset.batch(plan.batch_size, seed=plan.seed, step=0)
        shallow, _ = self.target_states(tokens[:, :-1].to(self.target.device))
        scale = float(shallow.float().square().mean(dim=-1).sqrt().median())
        matrices = [name for name, tensor in tensors.items() if tensor.ndim > 1]
        groups: list[dict[str, Any]] = [
            {"params": [tensors[name] for name in matrices if name not in ADDING],
             "weight_decay": plan.weight_decay, "scale": 1.0},
            {"params": [tensors[name] for name in matrices if name in ADDING],
             "weight_decay": plan.weight_decay / scale, "scale": scale},
            {"params": [tensor for tensor in tensors.values() if tensor.ndim == 1], "weight_decay": 0.0, "scale": 1.0},
        ]  # fmt: skip
        return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95))

    def learn(self, tokens: Tensor, mask: Tensor) -> float:
        """One optimiser step on windows [B, T + 1] with the mask [B, T] of predicted tokens; returns the loss.

        Gradients of the head's input are collected in chunks of rows, so no [B, T, V] tensor ever exists.
        """
        precision = self.training_precision()
        with precision:
            shallow, final = self.target_states(tokens[:, :-1])
            rows = self.draft_states(shallow)[mask]
        leaf, labels = rows.detach().requires_grad_(), final[mask]
        total = torch.zeros((), device=self.target.device)
        for chunk in self.chunks(len(leaf)):
            with precision:
                loss = self._soft_loss(leaf[chunk], labels[chunk]) / len(leaf)
            loss.backward()
            total += loss.detach()
        rows.backward(leaf.grad)
        self.descend()
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
        """Normed states [B, T, D] for the head from states [B, T, D] entering the exit layer."""
        attention = FullSequencePass(self.adapter.model_config, shallow.shape[1], device=shallow.device)
        return self.adapter.forward(shallow, attention=attention)

    def _soft_loss(self, normed: Tensor, final: Tensor) -> Tensor:
        """Summed cross-entropy of the draft against the target's distribution, states [N, D] each."""
        with torch.no_grad():
            labels = torch.softmax(self.target.logits(final), dim=-1)
        logits = self.head.head_logits(normed)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    def measure(self) -> dict[str, float]:
        """The metrics of the held-out split."""
        self.positions = self.evaluate()
        return self.positions.summary()

    @torch.no_grad()
    def evaluate(self) -> Positions:
        """Compare draft and target on evenly spread held-out windows, in the precision they decode in."""
        parts = [self._compare(tokens, mask) for tokens, mask in self.held_out_batches()]
        return Positions.join(parts, shape=(-1, self.plan.sequence_length))

    def _compare(self, tokens: Tensor, mask: Tensor) -> Positions:
        with autocast(self.target.device, self.target.embedding.dtype):
            shallow, final = self.target_states(tokens[:, :-1])
            draft, final, flat = self.draft_states(shallow).flatten(0, 1), final.flatten(0, 1), mask.flatten()
            parts = [
                Positions.compare(
                    self.head.head_logits(draft[chunk]), self.target.logits(final[chunk]), mask=flat[chunk]
                )
                for chunk in self.chunks(len(draft))
            ]
        return Positions.join(parts, shape=(mask.shape[0], mask.shape[1]))

    def save_result(self, output: Path) -> dict[str, Any]:
        """Write the adapter with the draft settings that the held-out split recommends; returns its config."""
        assert self.positions is not None, "measured before it is saved"
        gamma, eta = self.positions.recommend(draft_cost(self.target, self.adapter))
        self.adapter.config = self.adapter.config.model_copy(update={"gamma": gamma, "eta": eta})
        self.adapter.save(output, dtype=DTYPES[self.plan.dtype])
        return self.adapter.config.model_dump()

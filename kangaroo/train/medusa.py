"""Training of Medusa heads on a frozen target: each head learns tokens further ahead of the same states.

Head k (from 1), at the position of token t, learns token t + 1 + k of the text; the loss is the sum over the heads of
head_decay ** k times their cross-entropy (Medusa-1, Cai et al. 2024, arXiv 2401.10774, equation 1).
Shapes: B windows, T positions, K heads, N positions with loss, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kangaroo.drafters.companion import CONFIG_FILE
from kangaroo.drafters.medusa_heads import WEIGHTS_FILE, MedusaHeads
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.model.weights import DTYPES
from kangaroo.train.checkpoint import prepare_output
from kangaroo.train.data import Dataset
from kangaroo.train.metrics import Positions, summarize_heads
from kangaroo.train.plan import MedusaPlan
from kangaroo.train.run import (
    REPORT_FILE,
    Progress,
    TrainingRun,
    autocast,
    check_dataset,
    check_plan,
    train,
)

RESULTS = (CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE)


def train_medusa(
    target: Transformer, dataset: Dataset, *, plan: MedusaPlan, output: Path, resume: bool = False
) -> Iterator[Progress]:
    """Train step by step; the last step leaves config.json, heads.safetensors and report.json in output.

    With resume, continue from output's checkpoint exactly where an uninterrupted run would be. The call itself
    checks what can be checked before training. Raises SettingsError, DataError, OutputError or ResumeError.
    """
    check_plan(plan, target)
    check_dataset(dataset, target)
    prepare_output(output, resume=resume, results=RESULTS)
    return train(MedusaRun(target, dataset, plan=plan), output, resume=resume)


class MedusaRun(TrainingRun[MedusaPlan]):
    """The state of one training run of Medusa heads."""

    noun = "heads"

    def __init__(self, target: Transformer, dataset: Dataset, *, plan: MedusaPlan) -> None:
        self.heads = MedusaHeads.initialize(target, plan.num_heads)
        super().__init__(target, dataset, plan=plan, tensors=self.heads.tensors)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW with one rate for all; biases do not decay."""
        decays = {True: self.plan.weight_decay, False: 0.0}
        groups: list[dict[str, Any]] = [
            {"params": [one for one in self.tensors.values() if (one.ndim > 1) == is_matrix],
             "weight_decay": weight_decay, "scale": 1.0}
            for is_matrix, weight_decay in decays.items()
        ]  # fmt: skip
        return torch.optim.AdamW(groups, lr=self.plan.learning_rate, betas=(0.9, 0.95))

    def learn(self, tokens: Tensor, mask: Tensor) -> float:
        """One optimiser step on windows [B, T + 1] with the mask [B, T] of predicted tokens; returns the loss.

        The heads share nothing, so each chunk of rows is done with before the next: no [B, T, V] tensor ever exists.
        """
        plan, total = self.plan, 0.0
        with self.training_precision():
            normed = self.heads.normalize(self.target_states(tokens[:, :-1]))
        for number in range(1, plan.num_heads + 1):
            counted = predictable(mask, number)
            rows, labels = normed[:, :-number][counted], tokens[:, 1 + number :][counted]
            for chunk in self.chunks(len(rows)):
                with self.training_precision():
                    logits = self.heads.logits(rows[chunk], number)
                loss = torch.nn.functional.cross_entropy(logits, labels[chunk], reduction="sum")
                loss = loss * (plan.head_decay**number / len(rows))
                loss.backward()
                total += float(loss.detach())
        self.descend()
        return total

    def target_states(self, tokens: Tensor) -> Tensor:
        """States [B, T, D] of tokens [B, T] that leave the last layer."""
        target = self.target
        with torch.no_grad():
            attention = FullSequencePass(target.config, tokens.shape[1], device=target.device)
            return target.forward(target.embed(tokens), (0, target.num_layers), attention=attention)[0]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """How well every head foresees the target's choices on held-out text, in the precision they decode in."""
        width = self.plan.sequence_length - self.plan.num_heads
        batches = [self._compare(tokens, mask) for tokens, mask in self.held_out_batches()]
        heads = [Positions.join(parts, shape=(-1, width)) for parts in zip(*batches, strict=True)]
        return summarize_heads(heads, decay=self.plan.head_decay)

    def _compare(self, tokens: Tensor, mask: Tensor) -> list[Positions]:
        """For every head the facts [B, T - K] of its guesses, the target's choices k places on beside them."""
        width = self.plan.sequence_length - self.plan.num_heads
        with autocast(self.target.device, self.target.embedding.dtype):
            hidden = self.target_states(tokens[:, :-1])
            drafted = self.heads.normalize(hidden[:, :width]).flatten(0, 1)
            found = []
            for number in range(1, self.plan.num_heads + 1):
                states = hidden[:, number : number + width].flatten(0, 1)
                counted = predictable(mask, number)[:, :width].flatten()
                parts = [
                    Positions.compare(
                        self.heads.logits(drafted[chunk], number), self.target.logits(states[chunk]),
                        mask=counted[chunk],
                    )
                    for chunk in self.chunks(len(drafted))
                ]  # fmt: skip
                found.append(Positions.join(parts, shape=(mask.shape[0], width)))
        return found

    def save_result(self, output: Path) -> dict[str, Any]:
        """Write the heads; returns their config."""
        self.heads.save(output, dtype=DTYPES[self.plan.dtype])
        return self.heads.config.model_dump()


def predictable(mask: Tensor, number: int) -> Tensor:
    """[B, T - k]: where head k's token, and every one on the way to it, is to be predicted, by the mask [B, T]."""
    return mask.unfold(1, number + 1, 1).all(dim=-1)

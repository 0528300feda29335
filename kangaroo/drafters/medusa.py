"""Medusa-1: trained heads guess several tokens ahead from the target's last states, all at once.

The state that chose the newest token, the root, is what the heads read: head 1 guesses the token behind the root,
head 2 the one behind that, whatever the first turns out to be, so that the tree of their candidates has the same
guesses behind every node of a level (Cai et al. 2024, arXiv 2401.10774, section 2.1).
Shapes: D hidden size, V vocabulary, G sequences whose trees are growing.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kangaroo.drafters.base import Batch, Sequence
from kangaroo.drafters.growing import Growth, assemble, draw, grow_all, likeliest, plant
from kangaroo.drafters.medusa_heads import MedusaHeads
from kangaroo.drafters.settings import MedusaSettings
from kangaroo.drafters.stopping import StoppingPolicy, choose_stopping
from kangaroo.drafters.tree import CHAIN, Branching, Guesses
from kangaroo.errors import HeadsError, SettingsError
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import needs_logits
from kangaroo.types import Draft, Outcome

if TYPE_CHECKING:
    from kangaroo.model.checkpoint import LoadedModel


def build(model: LoadedModel, settings: MedusaSettings) -> MedusaDrafter:
    """The drafter these settings ask for; eta 0 never stops early.

    Raises HeadsError where the heads are missing, damaged, or another model's, SettingsError where there are fewer.
    """
    folder = model.heads_folder if settings.heads is None else Path(settings.heads).expanduser()
    if not folder.is_dir():
        raise HeadsError(f"no folder of Medusa heads {folder}; train them with `kangaroo train medusa` or give theirs")
    heads = MedusaHeads.load(folder, model.target)
    num_heads = heads.config.num_heads if settings.num_heads is None else settings.num_heads
    if not 1 <= num_heads <= heads.config.num_heads:
        raise SettingsError(f"num_heads must be in 1..{heads.config.num_heads} (those in {folder}), got {num_heads}")
    stopping = choose_stopping(num_heads, settings.eta)
    branching = Branching(settings.num_siblings, settings.max_nodes)
    return MedusaDrafter(model.target, heads, stopping=stopping, branching=branching)


@dataclass
class _Memory:
    """What is held per sequence between steps.

    normed: the state [1, D] that chose the root, as the heads read it. num_drafted: how deep the last draft was.
    """

    normed: Tensor | None = None
    num_drafted: int = 0


class MedusaDrafter:
    """Drafts with heads on the last states of the target."""

    name = "medusa"

    def __init__(
        self, target: Transformer, heads: MedusaHeads, *, stopping: StoppingPolicy, branching: Branching = CHAIN
    ) -> None:
        """stopping: drafts as deep as it says, and at most one token for each head."""
        self.taps: tuple[int, ...] = (target.num_layers,)
        self._target = target
        self._heads = heads
        self._stopping = stopping
        self._branching = branching
        self._memory: dict[Sequence, _Memory] = {}

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Nothing to make room for; a prompt's last state comes with its prefill."""
        for sequence in sequences:
            self._memory[sequence] = _Memory()

    def draft(self, batch: Batch) -> Draft:
        """Grow every tree level by level, each from the next head."""
        longest = min(self._stopping.max_length, self._heads.config.num_heads)
        growths = [plant(sequence, min(longest, sequence.max_draft)) for sequence in batch.sequences]
        # The fused argmax serves where every tree is a chain of likeliest tokens.
        is_chain = self._branching.num_siblings == 1
        is_greedy = is_chain and not any(needs_logits(growth.params) for growth in growths if growth.max_depth > 0)
        grow_all(growths, self._argmax if is_greedy else self._draw, branching=self._branching,
                 threshold=self._stopping.threshold, prices=batch.prices)  # fmt: skip
        for growth in growths:
            self._memory[growth.sequence].num_drafted = growth.depth
        return assemble(growths)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Keep the state of each sequence's last accepted node, whose choice is the next root."""
        for sequence, path, taps in zip(sequences, outcome.paths, outcome.taps, strict=True):
            memory = self._memory[sequence]
            # One row at a time, so that its numbers cannot depend on the rows beside it.
            memory.normed = self._heads.normalize(taps[self.taps[0]][-1:])
            if memory.num_drafted:
                self._stopping.observe(memory.num_drafted, len(path) - 1)
            memory.num_drafted = 0

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for sequence in sequences:
            self._memory.pop(sequence, None)

    def _read(self, growths: SequenceOf[Growth]) -> Tensor:
        """What the heads read for these sequences, [G, D]."""
        held = [self._memory[growth.sequence].normed for growth in growths]
        found = [normed for normed in held if normed is not None]
        assert len(found) == len(growths), "a prompt is read before its text is drafted"
        return found[0] if len(found) == 1 else torch.cat(found)

    def _argmax(self, growths: SequenceOf[Growth]) -> list[Guesses]:
        """What the next head thinks likeliest behind the end of every chain."""
        return likeliest(*self._heads.guess(self._read(growths), growths[0].depth + 1))

    def _draw(self, growths: SequenceOf[Growth]) -> list[Guesses]:
        """What may follow each node of every frontier, by what the next head says of its sequence."""
        rows = [row for row, growth in enumerate(growths) for _ in growth.tree.frontier]
        logits = self._heads.logits(self._read(growths), growths[0].depth + 1)
        return draw(growths, logits[rows], num_siblings=self._branching.num_siblings)

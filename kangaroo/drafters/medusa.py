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
from kangaroo.drafters.growing import Growth, assemble, draw_behind, find_chances, grow_all, plant
from kangaroo.drafters.medusa_heads import MedusaHeads
from kangaroo.drafters.settings import MedusaSettings
from kangaroo.drafters.stopping import StoppingPolicy, choose_stopping
from kangaroo.drafters.tree import CHAIN, Branching, Guesses
from kangaroo.errors import HeadsError, SettingsError
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import needs_logits, reads_prefix
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

    hidden: the state [1, D] that chose the root. num_drafted: how deep the last draft was.
    """

    hidden: Tensor | None = None
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
        """Ask all heads at once, then grow every tree level by level, each from the next head."""
        longest = min(self._stopping.max_length, self._heads.config.num_heads, self._branching.max_nodes - 1)
        growths = [plant(sequence, min(longest, sequence.max_draft)) for sequence in batch.sequences]
        growing = [growth for growth in growths if growth.max_depth > 0]
        if growing:
            logits = self._heads.predict(self._read(growing), max(growth.max_depth for growth in growing))
            guess = _Guesser(growing, logits, num_siblings=self._branching.num_siblings)
            grow_all(growing, guess, branching=self._branching, threshold=self._stopping.threshold,
                     prices=batch.prices)  # fmt: skip
        for growth in growing:
            self._memory[growth.sequence].num_drafted = growth.depth
        return assemble(growths)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Keep the state of each sequence's last accepted node, whose choice is the next root."""
        for sequence, path, taps in zip(sequences, outcome.paths, outcome.taps, strict=True):
            memory = self._memory[sequence]
            memory.hidden = taps[self.taps[0]][-1:]
            if memory.num_drafted:
                self._stopping.observe(memory.num_drafted, len(path) - 1)
            memory.num_drafted = 0

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for sequence in sequences:
            self._memory.pop(sequence, None)

    def _read(self, growths: SequenceOf[Growth]) -> Tensor:
        """What the heads read for these sequences, [G, D]."""
        held = [self._memory[growth.sequence].hidden for growth in growths]
        found = [hidden for hidden in held if hidden is not None]
        assert len(found) == len(growths), "a prompt is read before its text is drafted"
        return found[0] if len(found) == 1 else torch.cat(found)


class _Guesser:
    """What may follow each node of every frontier, by what the next head says of its sequence."""

    def __init__(self, growths: SequenceOf[Growth], logits: Tensor, *, num_siblings: int) -> None:
        """logits: [K, G, V] of all heads."""
        self._rows = {growth.sequence: row for row, growth in enumerate(growths)}
        self._num_siblings = min(num_siblings, logits.shape[-1])
        chances = find_chances(logits)
        best = chances.topk(self._num_siblings, dim=-1)
        self._tokens, self._probabilities = best.indices.tolist(), best.values.tolist()
        if any(needs_logits(growth.params) for growth in growths):
            self._logits, self._chances = logits.cpu(), chances.cpu().numpy()

    def __call__(self, growths: SequenceOf[Growth]) -> list[Guesses]:
        level = growths[0].depth
        guesses: list[Guesses] = []
        for growth in growths:
            row, frontier = self._rows[growth.sequence], growth.tree.frontier
            if not needs_logits(growth.params):
                probabilities = self._probabilities[level][row]
                found = [Guesses(self._tokens[level][row], probabilities, probabilities[0])]
            else:
                # Only what looks at the text before tells the nodes of a level apart.
                found = [
                    draw_behind(growth, node, logits=self._logits[level, row], chances=self._chances[level, row],
                                num_siblings=self._num_siblings)
                    for node in (frontier if reads_prefix(growth.params) else frontier[:1])
                ]  # fmt: skip
            guesses += found * (len(frontier) // len(found))
        return guesses

"""Draft & Verify: the target drafts without some of its attention and MLP sublayers, and verifies with all of them.

Zhang et al. 2023, arXiv 2309.08168. Drafts run on the target's own cache, behind the committed tokens: what they
write there is overwritten by the verification, which starts from layer 0.
Shapes: B sequences, F nodes of the frontiers of their trees, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from kangaroo.drafters.base import Batch, Sequence
from kangaroo.drafters.depths import DraftDepths
from kangaroo.drafters.growing import Growth, assemble, draw, grow_all, likeliest, place_frontier, plant
from kangaroo.drafters.settings import LayerSkipSettings
from kangaroo.drafters.stopping import StoppingPolicy, choose_stopping
from kangaroo.drafters.tree import CHAIN, Branching, Guesses
from kangaroo.model.cache import CachedPass
from kangaroo.model.skips import SKIP_FILE, SkippedSublayers, read_skip_layers
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import needs_logits
from kangaroo.types import Draft, Outcome

if TYPE_CHECKING:
    from kangaroo.model.checkpoint import LoadedModel


def build(model: LoadedModel, settings: LayerSkipSettings) -> LayerSkipDrafter:
    """The drafter these settings ask for.

    Raises SkipLayersError where the skip list is missing, damaged, or another model's.
    """
    path = model.folder / SKIP_FILE if settings.skip_layers is None else Path(settings.skip_layers).expanduser()
    skips = read_skip_layers(path, (model.name, Path(model.name).name))
    skips.check(model.target.num_layers, where=str(path))
    branching = Branching(settings.num_siblings, settings.max_nodes)
    stopping = choose_stopping(settings.gamma, settings.eta)
    return LayerSkipDrafter(model.target, skips, stopping=stopping, branching=branching)


class LayerSkipDrafter:
    """Drafts with the target less the sublayers of skips."""

    name = "layer_skip"
    taps: tuple[int, ...] = ()

    def __init__(
        self, target: Transformer, skips: SkippedSublayers, *, stopping: StoppingPolicy, branching: Branching = CHAIN
    ) -> None:
        """Raises SkipLayersError where skips name a layer that the target has not, or leave nothing to run."""
        skips.check(target.num_layers, where="skips")
        self.skips = skips
        self._target = target
        self._stopping = stopping
        self._branching = branching
        self._depths = DraftDepths(stopping)

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Nothing to prepare: the draft has no cache of its own."""

    def draft(self, batch: Batch) -> Draft:
        """Draft level by level until the stopping rule says so."""
        longest = min(self._stopping.max_length, self._branching.max_nodes - 1)
        growths = [plant(sequence, min(longest, sequence.max_draft)) for sequence in batch.sequences]
        grow_all(growths, lambda growing: self._guess(growing, self._run(batch, growing)), branching=self._branching,
                 threshold=self._stopping.threshold, prices=batch.prices)  # fmt: skip
        for growth in growths:
            self._depths.note(growth.sequence, growth.depth)
        return assemble(growths)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Tell the stopping rule how much of the last drafts was accepted."""
        self._depths.settle(sequences, outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        self._depths.forget(sequences)

    def _run(self, batch: Batch, growths: SequenceOf[Growth]) -> Tensor:
        """The states [F, D] that leave the skipping target for the nodes of every frontier."""
        segments = []
        tokens: list[int] = []
        for growth in growths:
            frontier = growth.tree.frontier
            segments.append(place_frontier(batch.cache, growth))
            tokens += growth.tree.tokens[frontier.start : frontier.stop]
        target = self._target
        attention, span = CachedPass(batch.cache, segments), (0, target.num_layers)
        return target.forward(target.embed(tokens), span, attention=attention, skips=self.skips)[0]

    def _guess(self, growths: SequenceOf[Growth], hidden: Tensor) -> list[Guesses]:
        """What may follow every frontier's nodes, by the states [F, D] that left the skipping target for them."""
        num_siblings = self._branching.num_siblings
        if num_siblings > 1 or any(needs_logits(growth.params) for growth in growths):
            return draw(growths, self._target.logits(hidden), num_siblings=num_siblings)
        return likeliest(*self._target.guess(hidden, self._target.final_norm))

"""Kangaroo: the target's first e layers and a trained adapter draft; the remaining layers verify.

Double early exit (Liu et al. 2024, arXiv 2404.18911): leave the target at layer e, and stop drafting when the
confidence falls below eta. The shallow states and their keys and values are the target's own, so that
verification resumes at layer e.
Shapes: D hidden size, V vocabulary, B sequences, F nodes of one level of their trees, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from kangaroo.drafters.adapter import COMPLETED, Adapter, check_exit_layer
from kangaroo.drafters.base import MAX_NODES, Batch, Prices, Sequence, draft_roots, place_nodes
from kangaroo.drafters.growing import (
    Growth,
    add_level,
    assemble,
    describe_draw,
    draw,
    join_levels,
    likeliest,
    place_frontier,
    plant,
)
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.drafters.stopping import StoppingPolicy, choose_stopping
from kangaroo.drafters.tree import CHAIN, Branching, Guesses
from kangaroo.model.cache import CachedPass, depths_of
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import needs_logits
from kangaroo.types import Draft, Outcome, Verified

if TYPE_CHECKING:
    from kangaroo.kernels.cpu import DraftPlan, Draw
    from kangaroo.model.checkpoint import LoadedModel
    from kangaroo.model.packed import PackedCache, PackedTransformer

# Long prompts reach the adapter in blocks, so that its attention mask stays small.
FEED_ROWS = 512
# What stands for the draws of a sequence that gets no guesses.
NO_DRAW = 0, 0.0, 0, 1.0, 0.0
# States that may wait for the next draft, which feeds them beside its own.
FEW_ROWS = 16


def build(model: LoadedModel, settings: KangarooSettings) -> KangarooDrafter:
    """The drafter these settings ask for; eta 0 never stops early.

    Raises AdapterError where the adapter is missing, damaged, or another model's or layer's.
    """
    adapter = Adapter.find(settings.adapter or model.adapter_folder, model.target, exit_layer=settings.exit_layer)
    settings = adapter.config.complete(settings)
    gamma, eta, num_siblings, max_nodes = (getattr(settings, name) for name in COMPLETED)
    stopping, branching = choose_stopping(gamma, eta), Branching(num_siblings, max_nodes)
    return KangarooDrafter(model.target, adapter, stopping=stopping, branching=branching)


@dataclass
class _Memory:
    """What is held per sequence between steps.

    draw: how the native kernels draw guesses, None where they cannot. pending: states [R, D] of committed tokens that
    the adapter has not been fed yet. fed: the nodes of the last draft that it has; num_drafted: how deep it was.
    """

    draw: Draw | None
    pending: list[Tensor] = field(default_factory=list)
    fed: set[int] = field(default_factory=set)
    num_drafted: int = 0


@dataclass
class _Growth(Growth):
    """A tree with its row in the batch, its newest level, and the states [F, D] of every level."""

    row: int = 0
    level: range = range(1)
    states: list[Tensor] = field(default_factory=list)


class KangarooDrafter:
    """Drafts with layers [0, e) of the target and an adapter."""

    name = "kangaroo"

    def __init__(
        self, target: Transformer, adapter: Adapter, *, stopping: StoppingPolicy, branching: Branching = CHAIN
    ) -> None:
        """Raises AdapterError where the adapter's exit layer is not in 1..L-1 of target."""
        self.exit_layer = adapter.config.exit_layer
        check_exit_layer(self.exit_layer, target.num_layers)
        self.taps: tuple[int, ...] = (self.exit_layer,)
        self._target = target
        self._adapter, self._attends = adapter, adapter.attends
        self._head = adapter.head(target)
        self._nothing = torch.empty(0, target.config.hidden_size, dtype=target.dtype, device=target.device)
        self._stopping = stopping
        self._branching = branching
        self._cache = adapter.new_cache(target, num_sequences=1, num_slots=1)
        self._memory: dict[Sequence, _Memory] = {}
        self._plan: DraftPlan | None = None
        if adapter.packed is not None:
            packed, head = cast("PackedTransformer", target), cast("PackedTransformer", self._head)
            bounds = self.exit_layer, branching.num_siblings, branching.max_nodes
            self._plan = packed.plan_drafts(adapter.packed, bounds, head=(head, adapter.final_norm))

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room in the adapter's own cache; one without attention never fills it."""
        room = num_slots if self._attends else MAX_NODES
        self._cache.reserve(1 + max(sequence.slot for sequence in sequences), room)
        if self._plan is not None and len(self._memory) == 1:
            # It may now wait while others draft.
            (alone,) = self._memory.values()
            alone.pending = [states.clone() for states in alone.pending]
        for sequence in sequences:
            self._cache.truncate(sequence.slot, 0)
            self._memory[sequence] = _Memory(describe_draw(sequence.request.params))

    def draft(self, batch: Batch) -> Draft:
        """Feed the adapter what it has not seen, then draft level by level until the stopping rule says so."""
        longest = min(self._stopping.max_length, self._branching.max_nodes - 1)
        most = [min(longest, sequence.max_draft) for sequence in batch.sequences]
        if not any(most):
            return draft_roots(batch)
        draws = [self._memory[sequence].draw for sequence, depth in zip(batch.sequences, most, strict=True) if depth]
        if self._plan is not None and None not in draws:
            return self._draft_in_one_call(batch, most)
        growths = [
            _Growth(**vars(plant(sequence, depth)), row=row)
            for row, (sequence, depth) in enumerate(zip(batch.sequences, most, strict=True))
        ]
        growing = [growth for growth in growths if growth.max_depth > 0]
        is_greedy = self._branching.num_siblings == 1 and not any(needs_logits(growth.params) for growth in growing)
        # Filled on the device: a copy from the host would wait for it.
        device = self._target.device
        roots = [torch.full((1,), growth.tree.tokens[0], device=device) for growth in growths]
        levels = [([growth.row for growth in growths], torch.cat(roots))]
        self._run_shallow(batch, growths, tokens=levels[0][1])
        hidden = self._catch_up(growing)
        is_blind = is_greedy and self._stopping.threshold == 0 and device.type != "cpu"
        while growing:
            tokens = self._grow(growing, hidden, prices=batch.prices, is_greedy=is_greedy, is_blind=is_blind)
            growing = [growth for growth in growing if growth.level]
            if growing:
                levels.append(([growth.row for growth in growing], tokens))
                self._run_shallow(batch, growing, tokens=tokens)
            growing = [growth for growth in growing if growth.tree.frontier]
            if growing:
                hidden = self._feed(growing)
        for growth in growths:
            memory = self._memory[growth.sequence]
            memory.fed, memory.num_drafted = growth.fed, len(growth.states) - 1
        hidden = torch.cat([states for growth in growths for states in growth.states])
        draft = replace(assemble(growths), resume_layer=self.exit_layer, hidden=hidden)
        return replace(draft, tokens=join_levels(levels, len(growths)), confidence=None) if is_blind else draft

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Keep the adapter's rows of accepted nodes; the states of the others wait for the next draft.

        Those of a prompt do not, unless it looks as if nothing will be drafted.
        """
        for sequence, path, taps in zip(sequences, outcome.paths, outcome.taps, strict=True):
            memory = self._memory[sequence]
            kept: list[int] = []
            if memory.fed and self._attends:
                kept = list(takewhile(memory.fed.__contains__, path))
                self._cache.keep(sequence.slot, kept)
            if self._attends and len(kept) < len(path):
                memory.pending.append(self._set_aside(memory, path, taps=taps, num_kept=len(kept)))
                if sequence.max_draft > 0 and sum([one.shape[0] for one in memory.pending]) > FEW_ROWS:
                    memory.pending = [self._shorten(sequence, 0)]
            if memory.num_drafted:
                self._stopping.observe(memory.num_drafted, len(path) - 1)
            memory.fed, memory.num_drafted = set(), 0

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for sequence in sequences:
            self._memory.pop(sequence, None)

    def _set_aside(
        self, memory: _Memory, path: SequenceOf[int], *, taps: Mapping[int, Tensor], num_kept: int
    ) -> Tensor:
        """The states of an accepted path behind its first nodes, which stay what they are until the next draft."""
        if self._plan is not None and len(self._memory) > 1:
            # Others may draft before this one does, and their states are written where these lie.
            return taps[self.exit_layer][num_kept:].clone()
        if self._plan is None or memory.draw is None or not memory.num_drafted or path[-1] >= len(path):
            return taps[self.exit_layer][num_kept:]
        # A chain drafted alone: without a tensor operation they come from where they were drafted, its root first.
        return self._plan.states(num_kept, len(path))

    def _run_shallow(self, batch: Batch, growths: SequenceOf[_Growth], *, tokens: Tensor) -> None:
        """Layers [0, e) over the newest level of every tree, tokens [F], on the target's own cache."""
        segments = [
            batch.segment(one.row, num_rows=len(one.level), first_node=one.level.start, parents=one.tree.parents)
            for one in growths
        ]
        attention = CachedPass(batch.cache, segments)
        hidden, _ = self._target.forward(self._target.embed(tokens), (0, self.exit_layer), attention=attention)
        for growth, states in zip(growths, hidden.split([len(one.level) for one in growths]), strict=True):
            growth.states.append(states)

    def _catch_up(self, growths: SequenceOf[_Growth]) -> Tensor:
        """Feed the adapter the pending states and the root's; returns what leaves it for the roots, [B, D]."""
        segments, fresh = [], []
        for growth in growths:
            rows = torch.cat([self._shorten(growth.sequence, FEED_ROWS), growth.states[0]])
            segments.append(place_nodes(self._cache, growth.sequence.slot, num_rows=len(rows)))
            fresh.append(rows)
            self._memory[growth.sequence].pending, growth.fed = [], {0}
        hidden = self._adapter.run(torch.cat(fresh), attention=CachedPass(self._cache, segments))
        for segment in segments:
            self._cache.truncate(segment.sequence, segment.stop - 1)
        return torch.cat([rows[-1:] for rows in hidden.split([len(rows) for rows in fresh])])

    def _shorten(self, sequence: Sequence, num_left: int) -> Tensor:
        """Feed the adapter pending states until at most so many are left; returns those."""
        memory, slot = self._memory[sequence], sequence.slot
        if not memory.pending:
            return self._nothing
        pending = memory.pending[0] if len(memory.pending) == 1 else torch.cat(memory.pending)
        while pending.shape[0] > num_left:
            rows, pending = pending[:FEED_ROWS], pending[FEED_ROWS:]
            block = place_nodes(self._cache, slot, num_rows=len(rows))
            self._adapter.run(rows, attention=CachedPass(self._cache, [block]))
            self._cache.truncate(slot, block.stop)
        return pending

    def _feed(self, growths: SequenceOf[_Growth]) -> Tensor:
        """Feed the adapter every frontier; returns what leaves it, [F, D]."""
        segments, fresh = [], []
        for growth in growths:
            segments.append(place_frontier(self._cache, growth))
            fresh.append(growth.states[-1][: len(growth.tree.frontier)])
            growth.fed.update(growth.tree.frontier)
        return self._adapter.run(torch.cat(fresh), attention=CachedPass(self._cache, segments))

    def _grow(self, growths: SequenceOf[_Growth], hidden: Tensor, *, prices: Prices, is_greedy: bool,
              is_blind: bool) -> Tensor:  # fmt: skip
        """Add a level to every tree, from the states [F, D] that left the adapter; returns its tokens."""
        if is_greedy:
            ids, confidence = self._head.guess(hidden, self._adapter.final_norm)
            # Blind, the host goes on without knowing what was guessed.
            guesses = [Guesses([-1], [1.0], 1.0)] * len(ids) if is_blind else likeliest(ids, confidence)
        else:
            logits = self._head.logits(hidden, self._adapter.final_norm)
            guesses = draw(growths, logits, num_siblings=self._branching.num_siblings)
        num_before = [len(growth.tree.tokens) for growth in growths]
        add_level(growths, guesses, branching=self._branching, threshold=self._stopping.threshold, prices=prices)
        tokens = []
        for growth, first in zip(growths, num_before, strict=True):
            growth.level = range(first, len(growth.tree.tokens))
            tokens += growth.tree.tokens[first:]
        return ids if is_blind else torch.tensor(tokens, device=hidden.device)

    def _draft_in_one_call(self, batch: Batch, most: SequenceOf[int]) -> Draft:
        """The same trees, at most so deep, on packed weights, without returning to Python between levels."""
        assert self._plan is not None, "packed weights only"
        starts, pending, takes_argmax = [], [], True
        for sequence, depth in zip(batch.sequences, most, strict=True):
            memory, slot = self._memory[sequence], sequence.slot
            states = self._shorten(sequence, FEED_ROWS) if depth else self._nothing
            pending.append(states)
            takes_argmax = takes_argmax and not sequence.needs_logits
            starts.append((slot, batch.cache.lengths[slot], slot, self._cache.lengths[slot], sequence.tokens[-1],
                           states.shape[0], depth, memory.draw or NO_DRAW))  # fmt: skip
        (tokens, parents, confidence), states, verified = self._plan.draft(
            cast("PackedCache", batch.cache).cached,
            cast("PackedCache", self._cache).cached,
            starts=starts,
            limits=(self._stopping.threshold, *batch.prices),
            pending=pending[0] if len(pending) == 1 else torch.cat(pending),
            taps=batch.taps if takes_argmax else None,
        )
        for sequence, start, shape in zip(batch.sequences, starts, parents, strict=True):
            memory = self._memory[sequence]
            if start[6]:
                self._cache.truncate(start[2], start[3] + start[5])
                memory.pending = []
            # Those that got children are known to the adapter.
            memory.fed = set(shape[1:])
            memory.num_drafted = len(shape) - 1 if self._branching.num_siblings == 1 else max(depths_of(shape))
        return Draft(
            tokens,
            parents,
            resume_layer=self.exit_layer,
            hidden=states,
            confidence=confidence,
            verified=Verified(*verified) if verified else None,
        )

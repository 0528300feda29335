"""Kangaroo: the target's first e layers and a trained adapter draft; the remaining layers verify.

Double early exit (Liu et al. 2024, arXiv 2404.18911): leave the target at layer e, and stop drafting when the
confidence falls below eta. The shallow states and their keys and values are the target's own, so that
verification resumes at layer e.
Shapes: D hidden size, V vocabulary, R rows of one sequence.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from kangaroo.drafters.adapter import Adapter, check_exit_layer
from kangaroo.drafters.base import Batch, Sequence, chain_draft, chain_shape
from kangaroo.drafters.stopping import ConfidenceThreshold, FixedLength, StoppingPolicy
from kangaroo.model.cache import CachedPass, KVCache, Segment
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import choose
from kangaroo.types import Draft, Outcome, SamplingParams

if TYPE_CHECKING:
    from kangaroo.model.packed import PackedTransformer

DEFAULT_GAMMA = 6
DEFAULT_ETA = 0.6
# Long prompts reach the adapter in blocks, so that its attention mask stays small.
FEED_ROWS = 512


@dataclass(frozen=True)
class KangarooSettings:
    """How to draft; None takes what the adapter recommends, else the paper's gamma 6 and eta 0.6.

    adapter: a folder, None for "adapter" beside the model. exit_layer: only a check against the adapter's.
    """

    adapter: str | None = None
    exit_layer: int | None = None
    gamma: int | None = None
    eta: float | None = None

    def stopping(self, adapter: Adapter) -> StoppingPolicy:
        """The policy these settings and the adapter's recommendation ask for; eta 0 never stops early."""
        gammas = (self.gamma, adapter.config.gamma, DEFAULT_GAMMA)
        etas = (self.eta, adapter.config.eta, DEFAULT_ETA)
        gamma = next(value for value in gammas if value is not None)
        policy = ConfidenceThreshold(gamma, next(value for value in etas if value is not None))
        return FixedLength(gamma) if policy.eta == 0 else policy


@dataclass
class _Memory:
    """What is held per sequence between steps.

    pending: [R, D] states of committed tokens that the adapter has not been fed yet;
    num_speculative: the adapter's newest cached rows, those of the last draft's nodes, root first.
    """

    pending: list[Tensor]
    num_speculative: int = 0


class KangarooDrafter:
    """Drafts with layers [0, e) of the target and an adapter; batch size 1."""

    name = "kangaroo"

    def __init__(self, target: Transformer, adapter: Adapter, *, stopping: StoppingPolicy) -> None:
        """Raises AdapterError where the adapter's exit layer is not in 1..L-1 of target."""
        self.exit_layer = adapter.config.exit_layer
        check_exit_layer(self.exit_layer, target.num_layers)
        self.taps: tuple[int, ...] = (self.exit_layer,)
        self._target = target
        self._adapter = adapter
        self._stopping = stopping
        self._cache: KVCache | None = None
        self._memory: dict[Sequence, _Memory] = {}

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room in the adapter's own cache."""
        if self._cache is None or self._cache.num_slots < num_slots:
            self._cache = None  # freed before the larger one is allocated
            self._cache = self._adapter.new_cache(self._target, num_slots=num_slots)
        self._cache.truncate(0, 0)
        for sequence in sequences:
            self._memory[sequence] = _Memory(pending=[])

    def draft(self, batch: Batch) -> Draft:
        """Feed the adapter what it has not seen, then draft token by token until the stopping rule says so."""
        (sequence,) = batch.sequences
        gamma = min(self._stopping.max_length, sequence.max_draft)
        greedy = sequence.request.params.temperature == 0
        if self._adapter.packed is not None and greedy and gamma > 0 and self._stopping.threshold is not None:
            return self._draft_in_one_call(batch, gamma, threshold=self._stopping.threshold)
        memory = self._memory[sequence]
        # Filled on the device: a copy from the host would wait for it.
        root = torch.full((1,), sequence.tokens[-1], device=self._target.device)
        guesses: list[Tensor] = []
        confidences: list[Tensor] = []
        states = [self._run_shallow(batch, root, offset=0)]
        fresh = torch.cat([*memory.pending, states[0]])
        while len(guesses) < gamma:
            token, confidence = self._predict(fresh, sequence.request.params)
            fresh = self._run_shallow(batch, token, offset=len(states))
            guesses.append(token)
            states.append(fresh)
            confidences.append(confidence)
            if self._stopping.reads_confidence and self._stopping.stops(confidence)[0]:
                break
        if guesses:
            memory.pending = []
        memory.num_speculative = len(guesses)
        confidence = torch.stack([torch.ones(1, device=root.device), *confidences], dim=1)
        draft = chain_draft(root, guesses)
        return replace(draft, resume_layer=self.exit_layer, hidden=torch.cat(states), confidence=confidence)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Keep the adapter's rows of accepted nodes; the states of the others wait for the next draft."""
        assert self._cache is not None, "accept() before begin()"
        for sequence, path, taps in zip(sequences, outcome.paths, outcome.taps, strict=True):
            memory = self._memory[sequence]
            num_kept = min(len(path), memory.num_speculative)
            self._cache.truncate(0, self._cache.lengths[0] - memory.num_speculative + num_kept)
            memory.num_speculative = 0
            memory.pending.append(taps[self.exit_layer][num_kept:])

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for sequence in sequences:
            self._memory.pop(sequence, None)

    def _draft_in_one_call(self, batch: Batch, gamma: int, *, threshold: float) -> Draft:
        """The same chain on packed weights, without returning to Python between tokens."""
        assert self._cache is not None, "draft() before begin()"
        assert self._adapter.packed is not None, "packed weights only"
        (sequence,) = batch.sequences
        memory = self._memory[sequence]
        pending = memory.pending[0] if len(memory.pending) == 1 else torch.cat(memory.pending)
        while pending.shape[0] > FEED_ROWS:
            self._feed(pending[:FEED_ROWS])
            pending = pending[FEED_ROWS:]
        root = sequence.tokens[-1]
        tokens, confidences, states = cast("PackedTransformer", self._target).draft_chain(
            batch.cache,
            sequence.slot,
            adapter=(self._adapter.packed, self._cache),
            norm=self._adapter.final_norm,
            plan=(self.exit_layer, root, gamma, threshold),
            pending=pending,
        )
        # The last guess is not fed to the adapter.
        self._cache.truncate(0, self._cache.lengths[0] + pending.shape[0] + len(tokens))
        memory.pending, memory.num_speculative = [], len(tokens)
        parents, depths = chain_shape(1, 1 + len(tokens))
        return Draft(
            tokens=torch.tensor([[root, *tokens]]),
            parents=parents,
            depths=depths,
            num_nodes=(1 + len(tokens),),
            resume_layer=self.exit_layer,
            hidden=states,
            confidence=torch.tensor([[1.0, *confidences]]),
        )

    def _run_shallow(self, batch: Batch, token: Tensor, *, offset: int) -> Tensor:
        """Layers [0, e) over token [1], offset slots after the cached ones, on the target's own cache; [1, D]."""
        attention = CachedPass(batch.cache, [batch.segment(0, offset=offset, num_rows=1)])
        hidden, _ = self._target.forward(self._target.embed(token), (0, self.exit_layer), attention=attention)
        return hidden

    def _predict(self, states: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
        """Feed states [R, D] to the adapter; returns the token [1] that follows them and its confidence [1]."""
        for block in states.split(FEED_ROWS) if states.shape[0] > FEED_ROWS else (states,):
            hidden, attention = self._feed(block)
        if params.temperature == 0:
            return self._target.guess(hidden[-1:], self._adapter.final_norm)
        logits = self._target.logits(hidden[-1:], self._adapter.final_norm)
        token = choose(logits, attention.positions[-1:], params=[params], num_rows=[1])
        return token, torch.softmax(logits, dim=-1).amax(dim=-1)

    def _feed(self, states: Tensor) -> tuple[Tensor, CachedPass]:
        """Run the adapter over states [R, D] it has not seen; returns what leaves it, and the pass."""
        assert self._cache is not None, "draft() before begin()"
        start, num_rows = self._cache.lengths[0], states.shape[0]
        attention = CachedPass(self._cache, [Segment(0, start, num_rows)])
        hidden = self._adapter.run(states, attention=attention)
        self._cache.truncate(0, start + num_rows)
        return hidden, attention

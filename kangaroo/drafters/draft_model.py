"""A draft model: a smaller checkpoint of the same vocabulary guesses, the target verifies.

Leviathan et al. 2023 (arXiv 2211.17192); transformers calls it assistant_model.
Shapes: D hidden size, V the target's vocabulary, F frontier nodes of all trees, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import takewhile

import torch
from torch import Tensor

from kangaroo.drafters.base import MAX_NODES, Batch, Sequence, draft_roots, place_nodes
from kangaroo.drafters.growing import Growth, assemble, draw, grow_all, likeliest, place_frontier, plant
from kangaroo.drafters.settings import DraftModelSettings
from kangaroo.drafters.stopping import StoppingPolicy, choose_stopping
from kangaroo.drafters.tree import CHAIN, Branching, Guesses
from kangaroo.errors import CheckpointError, SettingsError
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import needs_logits
from kangaroo.types import Draft, Outcome

# Long prompts reach the draft model in blocks, so that a pass stays small.
FEED_ROWS = 512


def build(model: LoadedModel, settings: DraftModelSettings) -> DraftModelDrafter:
    """The drafter these settings ask for, on the target's device and backend; eta 0 never stops early.

    Raises SettingsError for settings outside their range, and CheckpointError where the draft model cannot be loaded
    or has another vocabulary.
    """
    if settings.model is None:
        raise SettingsError("drafter draft_model needs a draft model, got none; set model to a folder or hub id, or "
                            "lay one in the folder draft_model beside the target")  # fmt: skip
    stopping = choose_stopping(settings.gamma, settings.eta)
    branching = Branching(settings.num_siblings, settings.max_nodes)
    target = model.target
    storage = target.storage if settings.dtype is None else settings.dtype
    is_int8 = storage == "int8"
    draft = load_model(
        settings.model,
        dtype=None if is_int8 else storage,
        weights="int8" if is_int8 else None,
        device=str(target.device),
        backend=target.backend,
    )
    check_vocabulary(draft, model)
    return DraftModelDrafter(draft.target, target.config.vocab_size, stopping=stopping, branching=branching)


def check_vocabulary(draft: LoadedModel, target: LoadedModel) -> None:
    """Raise CheckpointError unless both tokenizers have the same tokens under the same ids.

    What the models hold beyond their tokenizers' ids, such as padding rows of an embedding, may differ.
    """
    drafts, targets = draft.tokenizer.vocab(), target.tokenizer.vocab()
    if drafts == targets:
        return
    _, token = min((token_id, token) for token, token_id in drafts.items() ^ targets.items())
    in_draft, in_target = (f"token {ids[token]}" if token in ids else "no token" for ids in (drafts, targets))
    raise CheckpointError(
        f"a draft model must have the target's vocabulary: {token!r} is {in_draft} of the {len(drafts)} in {draft.name}"
        f" and {in_target} of the {len(targets)} in {target.name}; give a draft model of the target's family"
    )


class DraftModelDrafter:
    """Drafts with a model of its own, whose cache follows the text."""

    name = "draft_model"
    taps: tuple[int, ...] = ()

    def __init__(
        self, model: Transformer, vocab_size: int, *, stopping: StoppingPolicy, branching: Branching = CHAIN
    ) -> None:
        """vocab_size: the target's, beyond which nothing may be guessed."""
        self._model = model
        self._vocab_size = vocab_size
        self._stopping = stopping
        self._branching = branching
        self._cache = model.new_cache(1, 1)
        # The last drafts of sequences, until they have been verified.
        self._growths: dict[Sequence, Growth] = {}

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Make room in the draft model's own cache, for no longer texts than it can read."""
        num_slots = min(num_slots, self._model.config.context_length + MAX_NODES)
        self._cache.reserve(1 + max(sequence.slot for sequence in sequences), num_slots)
        for sequence in sequences:
            self._cache.truncate(sequence.slot, 0)

    def draft(self, batch: Batch) -> Draft:
        """Feed the draft model what it has not seen, then draft level by level until the stopping rule says so."""
        growths = [plant(sequence, self._max_depth(sequence)) for sequence in batch.sequences]
        growing = [growth for growth in growths if growth.max_depth > 0]
        if not growing:
            return draft_roots(batch)
        self._growths.update((growth.sequence, growth) for growth in growing)
        grow_all(growths, self._guess, branching=self._branching, threshold=self._stopping.threshold,
                 prices=batch.prices)  # fmt: skip
        return assemble(growths)

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Keep the cache's rows of accepted nodes; tokens that have none wait for the next draft."""
        for sequence, path in zip(sequences, outcome.paths, strict=True):
            growth = self._growths.pop(sequence, None)
            if growth is not None:
                self._cache.keep(sequence.slot, list(takewhile(growth.fed.__contains__, path)))
                self._stopping.observe(growth.depth, len(path) - 1)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget these sequences."""
        for sequence in sequences:
            self._growths.pop(sequence, None)

    def _max_depth(self, sequence: Sequence) -> int:
        """How deep to draft; 0 or less where the text is longer than the draft model can read."""
        # The last guess is not fed, so it may stand behind the end of the context.
        room = self._model.config.context_length + 1 - len(sequence.tokens)
        return min(self._stopping.max_length, sequence.max_draft, self._branching.max_nodes - 1, room)

    def _catch_up(self, growths: SequenceOf[Growth]) -> Tensor:
        """Feed the texts to their ends, the roots; returns what leaves the draft model for the roots, [F, D]."""
        most = max(1, FEED_ROWS // len(growths))
        segments, tokens = [], []
        for growth in growths:
            text, slot = growth.sequence.tokens, growth.sequence.slot
            while (num_unread := len(text) - self._cache.lengths[slot]) > most:
                block = place_nodes(self._cache, slot, num_rows=min(FEED_ROWS, num_unread - most))
                self._run(text[block.base : block.stop], [block])
                self._cache.truncate(slot, block.stop)
            segments.append(place_nodes(self._cache, slot, num_rows=num_unread))
            tokens += text[-num_unread:]
            growth.fed = {0}
        hidden = self._run(tokens, segments)
        for segment in segments:
            self._cache.truncate(segment.sequence, segment.stop - 1)
        return torch.cat([rows[-1:] for rows in hidden.split([segment.num_rows for segment in segments])])

    def _feed(self, growths: SequenceOf[Growth]) -> Tensor:
        """Feed every frontier; returns what leaves the draft model, [F, D]."""
        segments, tokens = [], []
        for growth in growths:
            frontier = growth.tree.frontier
            segments.append(place_frontier(self._cache, growth))
            tokens += growth.tree.tokens[frontier.start : frontier.stop]
            growth.fed.update(frontier)
        return self._run(tokens, segments)

    def _run(self, tokens: list[int], segments: list[Segment]) -> Tensor:
        """All layers over tokens of these segments; returns the states [R, D] that leave the last."""
        model = self._model
        # Ids that only the target's padding rows have stand for the draft model's last.
        known = [min(token, model.config.vocab_size - 1) for token in tokens]
        attention = CachedPass(self._cache, segments)
        return model.forward(model.embed(known), (0, model.num_layers), attention=attention)[0]

    def _guess(self, growths: SequenceOf[Growth]) -> list[Guesses]:
        """Feed every frontier, the texts before the first; returns what may follow the frontiers' nodes."""
        hidden = self._feed(growths) if growths[0].depth else self._catch_up(growths)
        model, num_siblings = self._model, self._branching.num_siblings
        is_in_range = model.config.vocab_size <= self._vocab_size
        if is_in_range and num_siblings == 1 and not any(needs_logits(growth.params) for growth in growths):
            return likeliest(*model.guess(hidden, model.final_norm))
        logits = model.logits(hidden)[:, : self._vocab_size]
        # Every row as long as the target's, for proposals and for logit_bias.
        num_missing = self._vocab_size - logits.shape[1]
        logits = torch.nn.functional.pad(logits, (0, num_missing), value=float("-inf"))
        return draw(growths, logits, num_siblings=num_siblings)

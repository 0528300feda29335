"""The loop of every method: draft, verify in one pass, choose, walk, keep.

Shapes: B sequences, N draft nodes (padded), R packed nodes of all sequences, D hidden size, V vocabulary.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.model.cache import CachedPass
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import choose
from kangaroo.types import Draft, Outcome
from kangaroo.verify import walk

PREFILL_ROWS = 512


def prefill(batch: Batch, drafter: Drafter) -> Outcome:
    """Run the prompts through the target, commit them, and pick the first new token of each.

    Prompts are run in blocks of PREFILL_ROWS, so that attention masks stay small whatever their length.
    """
    target, cache = batch.target, batch.cache
    picked, tapped = [], []
    for row, sequence in enumerate(batch.sequences):
        blocks: list[dict[int, Tensor]] = []
        for tokens in torch.tensor(sequence.tokens, device=target.device).split(PREFILL_ROWS):
            attention = CachedPass(cache, [batch.segment(row, num_rows=len(tokens))])
            span = (0, target.num_layers)
            hidden, taps = target.forward(target.embed(tokens), span, attention=attention, taps=drafter.taps)
            blocks.append(taps)
            cache.truncate(sequence.slot, cache.lengths[sequence.slot] + len(tokens))
        last = _choose(hidden[-1:], attention, target=target, sequences=[sequence], num_rows=[1])
        picked.append((int(last),))
        tapped.append({layer: torch.cat([block[layer] for block in blocks]) for layer in drafter.taps})
    paths = tuple(tuple(range(len(sequence.tokens))) for sequence in batch.sequences)
    outcome = Outcome(paths=paths, tokens=tuple(picked), taps=tuple(tapped))
    drafter.accept(batch.sequences, outcome)
    return outcome


def decode_step(batch: Batch, drafter: Drafter) -> tuple[Draft, Outcome]:
    """Draft for every sequence, verify all nodes in one pass, and commit the accepted branches."""
    target = batch.target
    draft = drafter.draft(batch)
    for sequence, num_nodes in zip(batch.sequences, draft.num_nodes, strict=True):
        assert 1 <= num_nodes <= 1 + sequence.max_draft, f"{drafter.name} drafted {num_nodes - 1} tokens"
    segments = [
        batch.segment(row, num_rows=count, parents=parents[:count])
        for row, (count, parents) in enumerate(zip(draft.num_nodes, draft.parents.tolist(), strict=True))
    ]
    attention = CachedPass(batch.cache, segments)
    entering = target.embed(_pack(draft)) if draft.hidden is None else draft.hidden
    span = (draft.resume_layer, target.num_layers)
    hidden, taps = target.forward(entering, span, attention=attention, taps=drafter.taps)
    choices = _choose(hidden, attention, target=target, sequences=batch.sequences, num_rows=draft.num_nodes)
    draft, choices = _read(draft, choices)
    outcome = _commit(batch, draft, paths=walk(draft, choices), choices=choices, taps=taps)
    drafter.accept(batch.sequences, outcome)
    return draft, outcome


def _pack(draft: Draft) -> Tensor:
    """The draft's tokens [R] without padding."""
    if min(draft.num_nodes) == draft.tokens.shape[1]:
        return draft.tokens.flatten()
    return torch.cat([row[:count] for row, count in zip(draft.tokens, draft.num_nodes, strict=True)])


def _read(draft: Draft, choices: Tensor) -> tuple[Draft, Tensor]:
    """The draft and the choices [R], padded to [B, N], on the host: the one read of the device in a step.

    The draft may still be under way there until now.
    """
    if min(draft.num_nodes) == draft.tokens.shape[1]:
        padded = choices.view(draft.tokens.shape)
    else:
        rows = list(choices.split(draft.num_nodes))
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    if choices.is_cpu:
        return draft, padded
    tokens, padded = torch.stack([draft.tokens, padded]).cpu()
    return replace(draft, tokens=tokens), padded


def _choose(hidden: Tensor, attention: CachedPass, *, target: Transformer, sequences: SequenceOf[Sequence],
            num_rows: SequenceOf[int]) -> Tensor:  # fmt: skip
    """The target's picks [R] after the states [R, D] of the pass's last rows."""
    params = [sequence.request.params for sequence in sequences]
    if all(one.temperature == 0 for one in params):
        return target.argmax(hidden)
    return choose(target.logits(hidden), attention.positions[-len(hidden) :], params=params, num_rows=num_rows)


def _commit(batch: Batch, draft: Draft, *, paths: Tensor, choices: Tensor, taps: dict[int, Tensor]) -> Outcome:
    """Keep the accepted branch of every sequence in the cache and gather what it emits and what was tapped."""
    kept, emitted, tapped, first_row = [], [], [], 0
    rows = zip(batch.sequences, paths.tolist(), choices.tolist(), draft.num_nodes, strict=True)
    for sequence, padded, picks, num_nodes in rows:
        path = [node for node in padded if node >= 0]
        batch.cache.keep(sequence.slot, path)
        # Every accepted node's token is its parent's pick, and the last pick is the bonus token.
        emitted.append(tuple(picks[node] for node in path))
        rows_kept = _select(path, first_row)
        tapped.append({layer: states[rows_kept] for layer, states in taps.items()})
        kept.append(tuple(path))
        first_row += num_nodes
    return Outcome(paths=tuple(kept), tokens=tuple(emitted), taps=tuple(tapped))


def _select(path: list[int], first_row: int) -> slice | Tensor:
    """The packed rows of a path's nodes; those of a chain are a slice, which needs no index on the device."""
    if path == list(range(len(path))):
        return slice(first_row, first_row + len(path))
    return torch.tensor(path) + first_row

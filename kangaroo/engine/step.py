"""The loop of every method: draft, verify in one pass, choose along the walk, keep.

A drafter may have made that pass already, in the call that drafted (types.Draft.verified).

Shapes: B sequences, N draft nodes (padded), R packed nodes of all sequences, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from itertools import accumulate

import torch
from torch import Tensor

from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.model.cache import CachedPass
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import choose, distribution, logprobs_of
from kangaroo.types import Draft, Outcome
from kangaroo.verify import Uniforms, reject, verify_block, walk

# A rule of acceptance at work: the accepted path of one sequence's draft, and what the target emits behind its nodes.
Verdict = tuple[list[int], list[int]]


def prefill(batch: Batch, drafter: Drafter, *, num_rows: SequenceOf[int]) -> Outcome:
    """Run the next num_rows tokens of every sequence's prompt through the target in one pass and commit them.

    A sequence whose prompt is read to its end emits its first token, or nothing if that brings about its error.
    """
    target, cache = batch.target, batch.cache
    segments = [batch.segment(row, num_rows=count) for row, count in enumerate(num_rows)]
    tokens = [
        token
        for sequence, segment in zip(batch.sequences, segments, strict=True)
        for token in sequence.tokens[segment.base : segment.stop]
    ]
    attention, span = CachedPass(cache, segments), (0, target.num_layers)
    hidden, taps = target.forward(target.embed(tokens), span, attention=attention, taps=drafter.taps)
    for segment in segments:
        cache.truncate(segment.sequence, segment.stop)
    ends = [segment.stop == len(one.tokens) for one, segment in zip(batch.sequences, segments, strict=True)]
    blocks = hidden.split(list(num_rows))
    emitted: list[tuple[int, ...]] = [()] * len(segments)
    done = [row for row, end in enumerate(ends) if end]
    if done:
        finished = [batch.sequences[row] for row in done]
        choices = _Choices(finished, [1] * len(done))
        choices.judge(target, torch.cat([blocks[row][-1:] for row in done]))
        for index, row in enumerate(done):
            try:
                emitted[row] = (choices.pick(index)(0, ()),)
            except Exception as error:  # whatever one request's settings bring about must not touch the others
                finished[index].error = error
    split = {layer: states.split(list(num_rows)) for layer, states in taps.items()}
    outcome = Outcome(
        paths=tuple(tuple(range(count)) for count in num_rows),
        tokens=tuple(emitted),
        taps=tuple({layer: states[row] for layer, states in split.items()} for row in range(len(segments))),
    )
    drafter.accept(batch.sequences, outcome)
    return outcome


def verify_draft(batch: Batch, drafter: Drafter, *, draft: Draft) -> Outcome:
    """Verify a draft's nodes in one pass unless they have been, and commit the accepted branches.

    A sequence that errs emits nothing.
    """
    choices = _Choices(batch.sequences, draft.num_nodes)
    taps = _read(batch, draft, choices=choices, taps=drafter.taps)
    all_tokens = draft.tokens.tolist() if isinstance(draft.tokens, Tensor) else draft.tokens
    paths, emitted, tapped, first_row = [], [], [], 0
    for row, sequence in enumerate(batch.sequences):
        path: list[int] = [0]
        picked: list[int] = []
        if sequence.error is None:  # drafting may have brought about one
            try:
                path, picked = _verify(draft, row, tokens=all_tokens[row], choices=choices, sequence=sequence)
            except Exception as error:  # as in prefill()
                sequence.error = error
        batch.cache.keep(sequence.slot, path)
        paths.append(tuple(path))
        emitted.append(tuple(picked))
        tapped.append(_Taps(taps, path, first_row=first_row))
        first_row += draft.num_nodes[row]
    outcome = Outcome(paths=tuple(paths), tokens=tuple(emitted), taps=tuple(tapped))
    drafter.accept(batch.sequences, outcome)
    return outcome


def _read(batch: Batch, draft: Draft, *, choices: "_Choices", taps: tuple[int, ...]) -> Mapping[int, Tensor]:
    """Have the target read the draft unless it has, and note what it says; returns the tapped states [R, D]."""
    if draft.verified is not None:
        choices.ids, _, tapped = draft.verified
        assert not any(choices.wanting), "more than the argmax is wanted"
        assert len(choices.ids) == sum(draft.num_nodes), "the target has read another draft"
        return tapped
    target = batch.target
    segments = [batch.segment(row, num_rows=len(parents), parents=parents) for row, parents in enumerate(draft.parents)]
    attention = CachedPass(batch.cache, segments)
    entering, span = _enter(draft, target), (draft.resume_layer, target.num_layers)
    if not any(choices.wanting):
        choices.ids, tapped = target.decide(entering, span, attention=attention, taps=taps)
        return tapped
    states = target.embed(entering) if isinstance(entering, list) else entering
    hidden, tapped = target.forward(states, span, attention=attention, taps=taps)
    choices.judge(target, hidden)
    return tapped


class _Choices:
    """What the target says behind the nodes of a pass, worked out only where it is asked.

    wanting: which sequences need logits; the others take the plain argmax. ids: the argmax of every row [R], of those
    that need it.
    """

    def __init__(self, sequences: SequenceOf[Sequence], num_nodes: SequenceOf[int]) -> None:
        self.wanting = [sequence.needs_logits for sequence in sequences]
        self.ids: SequenceOf[int] = []
        self._sequences = sequences
        self._num_nodes = num_nodes
        self._first_rows = [0, *accumulate(num_nodes)]
        # Of every row where its logits are.
        self._places: list[int] = []
        self._logits: Tensor | None = None

    def judge(self, target: Transformer, hidden: Tensor) -> None:
        """Work out what is wanted of the states [R, D]."""
        if not any(self.wanting):
            self.ids = target.argmax(hidden).tolist()
            return
        rows = [want for want, count in zip(self.wanting, self._num_nodes, strict=True) for _ in range(count)]
        with_logits, others = ([row for row, want in enumerate(rows) if want is kind] for kind in (True, False))
        self._logits = target.logits(hidden if not others else hidden[with_logits])
        ids = target.argmax(hidden[others]).tolist() if others else []
        self._places = [-1] * len(rows)
        for place, row in enumerate(with_logits):
            self._places[row] = place
        picked = dict(zip(others, ids, strict=True))
        self.ids = [picked.get(row, -1) for row in range(len(rows))]

    def pick(self, index: int) -> Callable[[int, SequenceOf[int]], int]:
        """The target's choice behind a node of the index-th sequence, given the drafted tokens on the way to it."""
        first = self._first_rows[index]
        sequence, ids = self._sequences[index], self.ids
        if not self.wanting[index]:
            return lambda node, drafted: ids[first + node]

        def pick(node: int, drafted: SequenceOf[int]) -> int:
            token = choose(self.logits(index, node), sequence.request.params, prefix=sequence.prefix, drafted=drafted)
            self.record(index, node, token=token, drafted=drafted)
            return token

        return pick

    def logits(self, index: int, node: int) -> Tensor:
        """The logits [V] behind a node."""
        assert self._logits is not None, "only the argmax was computed"
        return self._logits[self._places[self._first_rows[index] + node]]

    def record(self, index: int, node: int, *, token: int, drafted: SequenceOf[int]) -> None:
        """Keep the token's log-probability with its sequence if the request asks for it."""
        sequence = self._sequences[index]
        params = sequence.request.params
        if params.logprobs is not None:
            logits = self.logits(index, node)
            sequence.logprobs.append(logprobs_of(logits, params, token=token, prefix=sequence.prefix, drafted=drafted))


def _verify(draft: Draft, row: int, *, tokens: SequenceOf[int], choices: _Choices, sequence: Sequence) -> Verdict:
    """One sequence's draft under the rule of acceptance its request asks for."""
    params, parents = sequence.request.params, draft.parents[row]
    if len(tokens) > len(parents):
        tokens = tokens[: len(parents)]
    if params.rule == "coupling":
        return walk(tokens, parents, pick=choices.pick(row))
    rule = reject if params.rule == "rejection" else verify_block
    proposals = {} if draft.proposals is None else draft.proposals[row]
    prefix = sequence.prefix
    assert params.seed is not None, "the engine draws a seed for every request"
    path, picked = rule(
        tokens,
        parents,
        target=lambda node, drafted: distribution(choices.logits(row, node), params, prefix=prefix, drafted=drafted),
        proposal=[proposals.get(node) for node in range(len(parents))],
        noise=Uniforms(params.seed, prefix.num_tokens - 1),
    )
    for depth, (node, token) in enumerate(zip(path, picked, strict=True)):
        choices.record(row, node, token=token, drafted=picked[:depth])
    return path, picked


def _enter(draft: Draft, target: Transformer) -> Tensor | list[int]:
    """What enters verification: the states [R, D] of all nodes, or their tokens where the host knows them."""
    if draft.hidden is not None:
        return draft.hidden
    if isinstance(draft.tokens, Tensor):
        packed = [row[:count] for row, count in zip(draft.tokens, draft.num_nodes, strict=True)]
        return target.embed(torch.cat(packed))
    return [token for row in draft.tokens for token in row]


class _Taps(Mapping[int, Tensor]):
    """The tapped states [K, D] of one sequence's path, cut out of the pass's [R, D] only where they are asked for."""

    def __init__(self, states: Mapping[int, Tensor], path: list[int], *, first_row: int) -> None:
        self._states, self._path, self._first_row = states, path, first_row

    def __getitem__(self, layer: int) -> Tensor:
        first, path = self._first_row, self._path
        if path == list(range(len(path))):
            # A slice needs no index on the device.
            return self._states[layer][first : first + len(path)]
        return self._states[layer][torch.tensor(path) + first]

    def __iter__(self) -> Iterator[int]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)

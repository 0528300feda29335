"""Runs requests from prompt to finish: admission, prompts in blocks, steps, stop rules, counts and times."""

import time
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from kangaroo.drafters.base import DEFAULT_PRICES, MAX_NODES, Batch, Drafter, Sequence, draft_roots
from kangaroo.engine.decoding import Decoding, Text
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits, Scheduler
from kangaroo.engine.step import prefill, verify_draft
from kangaroo.errors import PromptError, SettingsError
from kangaroo.kernels import REFERENCE
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import draw_seed
from kangaroo.types import Request

# Caches grow in blocks, so that requests of similar length share one allocation.
SLOT_BLOCK = 256


class Engine:
    """Decodes requests together with one target and one drafter; they join and leave between steps."""

    def __init__(
        self, target: Transformer, drafter: Drafter, *, limits: Limits | None = None, pace: Pace | None = None
    ) -> None:
        """pace: how deep to draft under the load there is; without one as deep as the drafter will.

        Raises SettingsError where limits.max_context is beyond the model's context.
        """
        self.target = target
        self.drafter = drafter
        limits = limits or Limits()
        longest = target.config.context_length
        if limits.max_context is not None and limits.max_context > longest:
            raise SettingsError(f"max_context must be in 2..{longest} (the model's context), got {limits.max_context}")
        self.context_length = limits.max_context or longest
        self.scheduler = Scheduler(limits)
        self.pace = pace
        self._cache = target.new_cache(1, SLOT_BLOCK)
        # The native kernels record nothing for gradients, and entering the mode takes part of every step.
        self._mode = torch.inference_mode() if target.backend == REFERENCE else nullcontext()
        self._now_s = partial(_synchronize, target.device) if target.device.type == "cuda" else time.perf_counter

    def submit(self, request: Request, text: Text | None = None) -> Decoding:
        """Take a request, to be decoded by the steps that follow; a seed is drawn for one that has none.

        text: follows the tokens; stop strings need one. Raises PromptError where the prompt is empty, leaves no room
        in the context, or holds unknown ids, SettingsError for what its params ask that this cannot give, and
        QueueFullError.
        """
        self._check(request)
        if request.params.stop and text is None:
            raise SettingsError("stop strings need the text to be followed: give submit() a TextStream")
        if request.params.n != 1:
            raise SettingsError(f"n must be 1 for one request, got {request.params.n}; submit one for every text")
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=draw_seed()))
        # The last token of a text is never run, so a full context still admits one more.
        wanted = len(request.prompt_ids) + request.params.max_new_tokens
        decoding = Decoding(request, text, max_tokens=min(wanted, self.context_length))
        self.scheduler.enqueue(decoding)
        return decoding

    def step(self) -> list[Decoding]:
        """Admit who waits, read a block of prompts, and decode one step of those whose prompts are read.

        Returns the requests that emitted tokens or ended.
        """
        started_s = self._now_s()
        with self._mode:
            admitted = self.scheduler.admit()
            changed = self._begin(admitted) if admitted else []
            running = self.scheduler.running
            decoding = [one for one in running if not one.is_reading]
            if len(decoding) < len(running):
                changed += self._read(started_s)
            if decoding:
                self._decode(decoding)
                elapsed_s = self._now_s() - started_s
                for one in decoding:
                    one.decode_time_s += elapsed_s
                changed += decoding
        for one in changed:
            if one.finish_reason is not None:
                self._release(one)
        return changed

    def run(self, decoding: Decoding) -> None:
        """Step until this request ends; others go on beside it."""
        while decoding.finish_reason is None:
            self.step()

    def cancel(self, decoding: Decoding) -> None:
        """End a request before the next step and free its slot; one that has ended is left as it is."""
        if decoding.finish_reason is None:
            decoding.finish("cancelled")
            self._release(decoding)

    def _begin(self, admitted: list[Decoding]) -> list[Decoding]:
        """Make room for newcomers; returns those there was none for."""
        try:
            self._make_room(admitted)
        except Exception as error:  # above all no memory for their caches
            if len(admitted) > 1:
                # One may want more than there is, which is not for the others to suffer.
                return [failed for one in admitted for failed in self._begin([one])]
            admitted[0].fail(error)
            self._release(admitted[0])
            return admitted
        return []

    def _make_room(self, admitted: SequenceOf[Decoding]) -> None:
        num_slots = max(one.max_tokens for one in admitted) + MAX_NODES
        num_slots = -(-num_slots // SLOT_BLOCK) * SLOT_BLOCK
        sequences = [_sequence(one) for one in admitted]
        self._cache.reserve(1 + max(one.slot for one in sequences), num_slots)
        for sequence in sequences:
            self._cache.truncate(sequence.slot, 0)
        self.drafter.begin(sequences, num_slots=num_slots)

    def _read(self, started_s: float) -> list[Decoding]:
        """Read the next block of prompts; returns those that emitted their first token."""
        plan = self.scheduler.plan_reading()
        batch = Batch(self.target, self._cache, [_sequence(one) for one, _ in plan])
        for sequence in batch.sequences:
            sequence.max_draft = MAX_NODES if self.pace is None or self.pace.is_drafting else 0
        outcome = prefill(batch, self.drafter, num_rows=[count for _, count in plan])
        for (decoding, count), tokens in zip(plan, outcome.tokens, strict=True):
            decoding.num_unread -= count
            _emit(decoding, tokens)
        elapsed_s = self._now_s() - started_s
        for decoding, _ in plan:
            decoding.prefill_time_s += elapsed_s
        return [decoding for decoding, _ in plan if not decoding.is_reading]

    def _decode(self, decoding: SequenceOf[Decoding]) -> None:
        started_s = self._now_s()
        sequences, pace = [_sequence(one) for one in decoding], self.pace
        limit = MAX_NODES if pace is None else pace.limit(sequences)
        for one, sequence in zip(decoding, sequences, strict=True):
            sequence.max_draft = min(one.room - 1, limit)
        prices = DEFAULT_PRICES if pace is None else pace.prices
        batch = Batch(self.target, self._cache, sequences, prices, self.drafter.taps)
        # Where drafting does not pay the drafter is not even asked: it catches up when it is.
        draft = self.drafter.draft(batch) if limit > 0 else draft_roots(batch)
        drafted_s = self._now_s()
        outcome = verify_draft(batch, self.drafter, draft=draft)
        if draft.verified is not None:
            drafted_s -= draft.verified.time_s
        draft_time_s, verify_time_s = drafted_s - started_s, self._now_s() - drafted_s
        for one, tokens, count in zip(decoding, outcome.tokens, draft.num_nodes, strict=True):
            one.draft_time_s += draft_time_s
            one.verify_time_s += verify_time_s
            num_emitted = _emit(one, tokens)
            if one.error is None:
                one.count(count - 1, num_emitted)
        if pace is not None:
            pace.observe(draft, outcome, draft_time_s=draft_time_s, verify_time_s=verify_time_s)

    def _release(self, decoding: Decoding) -> None:
        if decoding.sequence is not None:
            self.drafter.end([decoding.sequence])
            if self.pace is not None:
                self.pace.forget(decoding.sequence)
        self.scheduler.release(decoding)

    def _check(self, request: Request) -> None:
        num_tokens, vocab_size = len(request.prompt_ids), self.target.config.vocab_size
        if num_tokens == 0:
            raise PromptError("the prompt is empty; give at least one token")
        if num_tokens >= self.context_length:
            raise PromptError(f"the prompt must be under {self.context_length} tokens (the context), got {num_tokens}; "
                              "shorten it or raise max_context if the model allows")  # fmt: skip
        unknown = next((token for token in request.prompt_ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise PromptError(f"token ids must be in 0..{vocab_size - 1}, got {unknown}")
        named = [*dict(request.params.logit_bias), *request.params.stop_token_ids]
        unknown = next((token for token in named if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise SettingsError(f"token ids of logit_bias and stop_token_ids must be in 0..{vocab_size - 1}, "
                                f"got {unknown}")  # fmt: skip


def _synchronize(device: torch.device) -> float:
    """The clock, once the device has caught up."""
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _sequence(decoding: Decoding) -> Sequence:
    assert decoding.sequence is not None, "running requests have slots"
    return decoding.sequence


def _emit(decoding: Decoding, tokens: SequenceOf[int]) -> int:
    """Hand a request the tokens a pass committed, or its error; returns how many it took."""
    error = _sequence(decoding).error
    if error is None:
        try:
            return decoding.emit(tokens)
        except Exception as raised:  # the text that follows the tokens is its caller's, and no one else's
            error = raised
    decoding.fail(error)
    return 0

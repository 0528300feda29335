"""Runs requests from prompt to finish: prefill, steps, stop rules, counts and times."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.engine.step import decode_step, prefill
from kangaroo.errors import KangarooError, PromptError
from kangaroo.kernels import REFERENCE
from kangaroo.model.cache import KVCache
from kangaroo.model.transformer import Transformer
from kangaroo.types import Draft, Outcome, Request

# Caches grow in blocks, so that requests of similar length share one allocation.
SLOT_BLOCK = 256


@dataclass(eq=False)
class Decoding:
    """A request under way: what it has emitted so far, and what that took.

    num_steps counts verification passes, without the prefill. accepted_lengths holds the tokens each emitted.
    """

    sequence: Sequence
    prefill_time_s: float = 0.0
    decode_time_s: float = 0.0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_lengths: list[int] = field(default_factory=list)

    @property
    def new_tokens(self) -> list[int]:
        return self.sequence.tokens[len(self.sequence.request.prompt_ids) :]


class Engine:
    """Decodes requests, one at a time, with one target and one drafter."""

    def __init__(self, target: Transformer, drafter: Drafter, *, max_context: int | None = None) -> None:
        """max_context: tokens a text may hold, prompt included; the model's context length unless smaller."""
        self.target = target
        self.drafter = drafter
        self.context_length = min(target.config.context_length, max_context or target.config.context_length)
        self._cache: KVCache | None = None
        self._running: Decoding | None = None
        # The native kernels record nothing for gradients, and entering the mode takes part of every step.
        self._mode = torch.inference_mode() if target.backend == REFERENCE else nullcontext()

    def begin(self, request: Request) -> Decoding:
        """Prefill a prompt and emit its first token; a request still under way is given up.

        Raises PromptError where the prompt is empty, leaves no room in the context, or holds unknown ids.
        """
        self._check(request)
        prompt = list(request.prompt_ids)
        # The last token of a text is never run, so a full context still admits one more.
        num_slots = min(len(prompt) + request.params.max_new_tokens, self.context_length)
        if self._running is not None:
            self.end(self._running)
        cache = self._cache_for(num_slots)
        decoding = self._running = Decoding(Sequence(request, slot=0, tokens=prompt))
        started_s = self._now_s()
        with self._mode:
            self.drafter.begin([decoding.sequence], num_slots=cache.num_slots)
            outcome = prefill(Batch(self.target, cache, [decoding.sequence]), self.drafter)
        self._emit(decoding, outcome)
        decoding.prefill_time_s = self._now_s() - started_s
        return decoding

    def step(self, decoding: Decoding) -> int:
        """Advance by one draft and its verification; returns how many tokens were emitted.

        Raises KangarooError where another request has begun since: the cache is no longer this one's.
        """
        if decoding is not self._running:
            raise KangarooError("one request at a time: another began before this one ended; finish or close it first")
        sequence = decoding.sequence
        assert self._cache is not None, "step() before begin()"
        assert sequence.finish_reason is None, "step() on a finished request"
        started_s = self._now_s()
        sequence.max_draft = self._room(sequence) - 1
        with self._mode:
            draft, outcome = decode_step(Batch(self.target, self._cache, [sequence]), self.drafter)
        num_emitted = self._emit(decoding, outcome)
        decoding.decode_time_s += self._now_s() - started_s
        self._count(decoding, draft, num_emitted=num_emitted)
        return num_emitted

    def end(self, decoding: Decoding) -> None:
        """Free what the drafter holds for a request, finished or not; ending one twice does nothing."""
        if decoding is self._running:
            self._running = None
            self.drafter.end([decoding.sequence])

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

    def _cache_for(self, num_slots: int) -> KVCache:
        if self._cache is None or self._cache.num_slots < num_slots:
            self._cache = None  # freed before the larger one is allocated
            self._cache = self.target.new_cache(1, -(-num_slots // SLOT_BLOCK) * SLOT_BLOCK)
        self._cache.truncate(0, 0)
        return self._cache

    def _room(self, sequence: Sequence) -> int:
        """How many tokens may still be emitted."""
        wanted = sequence.request.params.max_new_tokens - sequence.num_new_tokens
        return min(wanted, self.context_length - len(sequence.tokens))

    def _emit(self, decoding: Decoding, outcome: Outcome) -> int:
        """Append the committed tokens up to the first stop; returns how many."""
        sequence = decoding.sequence
        request, (committed,) = sequence.request, outcome.tokens
        stops = frozenset() if request.params.ignore_eos else request.eos_ids
        for index, token in enumerate(committed):
            sequence.tokens.append(token)
            sequence.origins.append("bonus" if index == len(committed) - 1 else "draft")
            if token in stops:
                sequence.finish_reason = "stop"
            elif self._room(sequence) == 0:
                sequence.finish_reason = "length"
            if sequence.finish_reason:
                return index + 1
        return len(committed)

    def _count(self, decoding: Decoding, draft: Draft, *, num_emitted: int) -> None:
        decoding.num_steps += 1
        decoding.num_drafted += draft.num_nodes[0] - 1
        origins = decoding.sequence.origins[-num_emitted:]
        decoding.num_accepted += sum(origin == "draft" for origin in origins)
        decoding.accepted_lengths.append(num_emitted)

    def _now_s(self) -> float:
        """The clock, once the device has caught up."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

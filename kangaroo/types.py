"""What goes in and what comes out: plain frozen records, no behaviour beyond arithmetic on themselves.

Shapes: B sequences, N draft nodes (padded to the largest draft), R packed nodes of all sequences, D hidden
size, K accepted nodes, V vocabulary. Nodes of one sequence stand root first, every parent before its children.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal, NamedTuple

from kangaroo.errors import SettingsError

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

_INTEGERS = ("max_new_tokens", "seed", "top_k", "n", "min_new_tokens", "logprobs")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How a request is decoded; temperature 0 is greedy.

    seed None has one drawn; n completions derive theirs from it. top_k 0, top_p 1, min_p 0, repetition_penalty 1 and
    presence_penalty and frequency_penalty 0 are off. logit_bias maps token ids to what is added to their logits, -inf
    to forbid one; it is kept as sorted pairs. stop: texts, and stop_token_ids: tokens, that end the text; neither these
    tokens nor EOS come before min_new_tokens. logprobs: how many of the likeliest tokens are reported beside each
    chosen one (0: it alone; 20 at most, as with OpenAI and vLLM), by the "raw" or the "processed" logits.
    acceptance: how drafts are verified.
    Raises SettingsError for values outside their range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
    logprobs_of: Literal["raw", "processed"] = "raw"
    acceptance: Literal["coupling", "rejection", "block"] = "coupling"

    def __post_init__(self) -> None:
        for name in (*_INTEGERS, *_FLOATS):
            value, is_whole = getattr(self, name), name in _INTEGERS
            is_number = isinstance(value, Integral if is_whole else Real)
            if not (is_number or (value is None and name in ("seed", "logprobs"))):
                raise SettingsError(f"{name} must be a {'whole ' if is_whole else ''}number, got {value!r}")
            if is_number:
                # A number of numpy's would take logits to its own precision.
                object.__setattr__(self, name, int(value) if is_whole else float(value))
        object.__setattr__(self, "logit_bias", tuple(sorted(dict(self.logit_bias).items())))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, (is_allowed, allowed) in self._check().items():
            if not is_allowed:
                raise SettingsError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def rule(self) -> Literal["coupling", "rejection", "block"]:
        """The rule of acceptance at work: greedy choices leave nothing to chance."""
        return self.acceptance if self.temperature > 0 else "coupling"

    def _check(self) -> dict[str, tuple[bool, str]]:
        """For each setting whether its value is allowed, and which values are."""
        # The bounds of temperature, repetition_penalty and logit_bias keep every logit finite in float32.
        biases = dict(self.logit_bias)
        return {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature == 0 or 1e-5 <= self.temperature <= 1e5, "0 (greedy) or in [1e-5, 1e5]"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "in 0..2**63-1 or None"),
            "ignore_eos": (isinstance(self.ignore_eos, bool), "True or False"),
            "top_k": (self.top_k >= 0, "at least 1, or 0 (off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (1e-5 <= self.repetition_penalty <= 1e5, "in [1e-5, 1e5]"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            "logit_bias": (
                all(_is_token(token) and (abs(bias) <= 1e9 or bias == -math.inf) for token, bias in biases.items()),
                "token ids of 0 or above with biases in [-1e9, 1e9] or -inf",
            ),
            "n": (1 <= self.n <= 1024, "in 1..1024"),
            "stop": (all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
            "stop_token_ids": (all(map(_is_token, self.stop_token_ids)), "token ids of 0 or above"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"in 0..max_new_tokens ({self.max_new_tokens})",
            ),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "in 0..20 or None"),
            "logprobs_of": (self.logprobs_of in ("raw", "processed"), "'raw' or 'processed'"),
            "acceptance": (
                self.acceptance in ("coupling", "rejection", "block"),
                "'coupling', 'rejection' or 'block'",
            ),
        }


def _is_token(token: object) -> bool:
    return isinstance(token, Integral) and int(token) >= 0


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities of a chosen token and, best first, of the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict[str, object]:
        """The fields in JSON's terms, which know no infinity: null stands for a probability of 0."""
        top = [{"token_id": token, "logprob": logprob} for token, logprob in self.top]
        own = None if self.logprob == -math.inf else self.logprob
        return {"token_id": self.token_id, "logprob": own, "top": top}


@dataclass(frozen=True)
class Request:
    """One text to continue: its prompt's token ids and how to decode it."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end the text."""
        own = frozenset(self.params.stop_token_ids)
        return own if self.params.ignore_eos else own | self.eos_ids


class Verified(NamedTuple):
    """What the target says of a draft: the argmax behind every node, packed as Draft.hidden, and the time it took.

    taps: the states [R, D] of all nodes, by the layer they enter, of every layer that the batch asks for.
    """

    choices: Sequence[int]
    time_s: float
    taps: Mapping[int, Tensor]


@dataclass(frozen=True)
class Draft:
    """A tree of guesses per sequence; node 0 is the root, the last committed token.

    tokens, parents: for every sequence those of each node, the root's parent being -1. Tokens still under way on the
    device are a tensor [B, N] int64, padded with anything; the trees' shapes are the host's.
    hidden: [R, D], the nodes' states entering layer resume_layer, packed sequence by sequence; None where
    resume_layer is 0. The drafter may write those of its next draft in the same place.
    confidence: for every sequence the draft's raw top-1 probability that proposed each node, 1 for roots, or what a
    lookup makes of its matches; None where the drafter has none, or the host does not know it.
    proposals: for every sequence, by node, the distribution [V] that its children were drawn from, float64; a node
    that has none drew its children from no distribution. None where no request asks for it (SamplingParams.acceptance).
    verified: what the target says, where the drafter had it read the draft in the same call: only for a batch that
    takes the argmax, and says what to tap.
    """

    tokens: Sequence[Sequence[int]] | Tensor
    parents: Sequence[Sequence[int]]
    resume_layer: int = 0
    hidden: Tensor | None = None
    confidence: Sequence[Sequence[float]] | None = None
    proposals: Sequence[Mapping[int, ndarray]] | None = None
    verified: Verified | None = None

    @property
    def num_nodes(self) -> tuple[int, ...]:
        """Nodes of every sequence, the root included."""
        return tuple(map(len, self.parents))


@dataclass(frozen=True)
class Outcome:
    """What one pass committed, per sequence.

    paths: accepted nodes, root first, or the rows of a prefill; tokens: the accepted drafts followed by the bonus
    token, or none where a prompt has not been read to its end.
    taps: for every tapped layer the states [K, D] that enter it, of each sequence's accepted nodes.
    """

    paths: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    taps: tuple[Mapping[int, Tensor], ...]


@dataclass(frozen=True)
class Token:
    """One emitted token; origin is "draft" for an accepted guess, "bonus" for the target's own pick."""

    token_id: int
    text: str
    origin: str


@dataclass(frozen=True)
class Completion:
    """A finished text with its counts and times.

    token_ids holds the new tokens, a final EOS included. num_steps counts verification passes, without the
    prefill, which emits the first token. Times are in seconds; rates are None where the time is zero.
    finish_reason: "stop" (EOS, a stop id or a stop string, before which text ends), "length", "cancelled" or "error",
    which error then explains. seed: what the text was drawn with. logprobs: of every new token where they were asked
    for. index: which of a prompt's n completions this is. accepted_lengths: the tokens every step emitted. draft_time_s
    and verify_time_s: the parts of decode_time_s spent drafting and verifying; the rest is the engine's own.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: str
    prefill_time_s: float
    decode_time_s: float
    num_steps: int
    num_drafted: int
    num_accepted: int
    drafter: str
    model: str
    seed: int | None = None
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None
    accepted_lengths: tuple[int, ...] = field(default=(), repr=False)
    draft_time_s: float = 0.0
    verify_time_s: float = 0.0

    @property
    def num_new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens per second; the first token belongs to the prefill."""
        return (self.num_new_tokens - 1) / self.decode_time_s if self.decode_time_s > 0 else None

    @property
    def tokens_per_step(self) -> float | None:
        return (self.num_new_tokens - 1) / self.num_steps if self.num_steps else None

    @property
    def acceptance_rate(self) -> float | None:
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    def to_dict(self) -> dict[str, object]:
        """The public fields in the order of the command line's JSON; error only where there is one."""
        names = ("text", "token_ids", "num_prompt_tokens", "num_new_tokens", "finish_reason", "prefill_time_s",
                 "decode_time_s", "draft_time_s", "verify_time_s", "tokens_per_s", "num_steps", "tokens_per_step",
                 "num_drafted", "num_accepted",
                 "acceptance_rate", "drafter", "model", "seed", "index")  # fmt: skip
        logprobs = None if self.logprobs is None else [one.to_dict() for one in self.logprobs]
        fields = {name: getattr(self, name) for name in names} | {"token_ids": list(self.token_ids)}
        return fields | {"logprobs": logprobs} | ({} if self.error is None else {"error": self.error})

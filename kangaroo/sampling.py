"""The target's choice as a pure function of (logits row, position, seed): logits processors and Gumbel-max.

One row at a time on the host, in single-threaded numpy, so that no result depends on threads or on the rows beside it.
Shapes: V vocabulary, K token ids that are still in play.
"""

import math
import secrets
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kangaroo.noise import bound_hash, gumbel, hash_tokens, mix
from kangaroo.types import SamplingParams, TokenLogprobs

Array = NDArray[Any]

# Numbers for derive_seed of what else needs randomness: far above any count of completions.
DRAFT_STREAM = 2**62 + 1

_NUM_BLOCKS = 2048  # of a long row, whose largest logits bound the largest of the row
_NUM_LEADERS = 256  # logits whose noise sets the score that all others have to beat
_MAX_PERTURBED = 2048  # up to here noise for all costs less than finding out who needs it
_MAX_SORTED, _NUM_BINS = 4096, 1024


class Prefix:
    """The text before a row, counted: what penalties, the minimum length and the noise depend on.

    stop_ids: the tokens that min_new_tokens forbids (EOS and stop_token_ids).
    """

    def __init__(self, tokens: list[int], *, stop_ids: frozenset[int]) -> None:
        """tokens: the prompt, to which new tokens may be appended."""
        self.stop_ids, self.num_prompt_tokens = stop_ids, len(tokens)
        self._tokens, self._num_counted = tokens, 0
        self._slots, self._token_ids, self._counts = dict[int, int](), array("q"), array("q")

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def count(self, drafted: Sequence[int] = ()) -> tuple[Array, Array]:
        """Distinct token ids [K] of the text and `drafted` behind it, and how many of each [K] are not the prompt's."""
        # Few requests ever ask, so that tokens are counted here and not as they come.
        for index in range(self._num_counted, len(self._tokens)):
            slot = self._slots.setdefault(self._tokens[index], len(self._slots))
            if slot == len(self._token_ids):
                self._token_ids.append(self._tokens[index])
                self._counts.append(0)
            self._counts[slot] += index >= self.num_prompt_tokens
        self._num_counted = len(self._tokens)
        counts, fresh = np.array(self._counts), dict[int, int]()
        for token in drafted:
            if token in self._slots:
                counts[self._slots[token]] += 1
            else:
                fresh[token] = fresh.get(token, 0) + 1
        token_ids = np.array(self._token_ids)
        if fresh:
            token_ids = np.concatenate([token_ids, np.array([*fresh])])
            counts = np.concatenate([counts, np.array([*fresh.values()])])
        return token_ids, counts


def needs_logits(params: SamplingParams) -> bool:
    """Whether the pick is more than the argmax of the raw logits, so that the fused argmax cannot serve.

    A minimum length counts throughout, although it forbids nothing once it is reached.
    """
    return params.temperature > 0 or params.logprobs is not None or reads_prefix(params)


def reads_prefix(params: SamplingParams) -> bool:
    """Whether the pick is shaped by more than temperature, top_k, top_p and min_p: by the text before, or by id."""
    return bool(params.logit_bias or params.min_new_tokens > 0 or _has_penalty(params))


def process(logits: Tensor, params: SamplingParams, *, prefix: Prefix, drafted: Sequence[int] = ()) -> Tensor:
    """The logits [V] float32 that the row's token is drawn from, -inf where removed; `logits` itself if unchanged.

    logits: [V] float32; the row's text is the prefix followed by `drafted`, the path inside the draft down to the row.
    Order: logit_bias, repetition, frequency and presence penalty, min_new_tokens; when sampling, then temperature,
    top_k, top_p, min_p. All as transformers' processors in transformers' order, but for frequency and presence,
    which it lacks: these subtract as in vLLM, for new tokens alone.
    """
    row = _read_row(logits)
    adjusted = _adjust(row, params, prefix=prefix, drafted=drafted)
    token_ids, scores = _warp(adjusted, params)
    if scores is row:
        return logits
    if len(token_ids) < len(row):
        survivors = scores
        scores = np.full_like(row, -np.inf)
        scores[token_ids] = survivors
    return torch.from_numpy(scores).to(logits.device)


def distribution(logits: Tensor, params: SamplingParams, *, prefix: Prefix, drafted: Sequence[int] = ()) -> Array:
    """Probabilities [V], float64, of the row's processed logits: what the rules that reject by chance compare."""
    row = process(logits, params, prefix=prefix, drafted=drafted).cpu().numpy().astype(np.float64)
    if row.max() == -np.inf:
        # As choose() has it where every token was removed.
        row[0] = 0.0
    weights: Array = np.exp(row - row.max())
    return weights / weights.sum()  # type: ignore[no-any-return]


def choose(logits: Tensor, params: SamplingParams, *, prefix: Prefix, drafted: Sequence[int] = ()) -> int:
    """The token that plain decoding emits after this row; arguments as in process().

    The largest processed logit, or at a temperature above 0 the largest of processed logit + Gumbel noise, which is a
    draw from their softmax (Gumbel-max); the lowest id wins ties. A row left without any token yields id 0.
    """
    return choose_children(logits, params, prefix=prefix, drafted=drafted, num_children=1)[0]


def choose_children(
    logits: Tensor, params: SamplingParams, *, prefix: Prefix, drafted: Sequence[int] = (), num_children: int
) -> list[int]:
    """The `num_children` best tokens after this row, best first, by the scores whose best choose() picks.

    Arguments as in process(). Fewer where fewer survive the processors, but at least one.
    """
    token_ids, scores = _warp(_adjust(_read_row(logits), params, prefix=prefix, drafted=drafted), params)
    if params.temperature > 0:
        assert params.seed is not None, "the engine draws the seed of a request that gives none"
        stream = params.seed, prefix.num_tokens + len(drafted) - 1
        token_ids, scores = _perturb(token_ids, scores, stream=stream, count=num_children)
    best = _rank(scores, num_children)
    return [int(token) for token in token_ids[best]]


def logprobs_of(
    logits: Tensor, params: SamplingParams, *, token: int, prefix: Prefix, drafted: Sequence[int] = ()
) -> TokenLogprobs:
    """Log-probabilities of `token` and of the `params.logprobs` likeliest tokens, which may hold it too.

    Other arguments as in process(). They are of the softmax of the raw logits, or of the processed ones where
    params.logprobs_of says so; tokens that were removed are not listed.
    """
    if params.logprobs_of == "processed":
        logits = process(logits, params, prefix=prefix, drafted=drafted)
    row = _read_row(logits)
    highest = row.max()
    if not highest > -math.inf:
        return TokenLogprobs(token, -math.inf, ())
    log_total = float(highest) + math.log(np.exp(row - highest).sum(dtype=np.float64))
    top = _rank(row, params.logprobs) if params.logprobs else ()
    return TokenLogprobs(
        token, float(row[token]) - log_total, tuple((int(one), float(row[one]) - log_total) for one in top)
    )


def gumbel_noise(position: int, token_ids: Tensor, *, seed: int) -> Tensor:
    """Standard Gumbel noise [K] float32 for token ids [K]: a function of (seed, position, token id) alone."""
    noise = gumbel(hash_tokens(token_ids.cpu().numpy(), seed=seed, position=position))
    return torch.from_numpy(noise).to(token_ids.device)


def derive_seed(seed: int, index: int) -> int:
    """The seed, in 0..2**63-1, of the index-th completion or named stream of a request; index 0 keeps `seed`."""
    return mix(mix(mix(seed)) + index) >> 1 if index else seed


def draw_seed() -> int:
    """A seed in 0..2**63-1 from the operating system's entropy."""
    return secrets.randbits(63)


def _read_row(logits: Tensor) -> Array:
    return np.ascontiguousarray(logits.detach().cpu().numpy())


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _adjust(row: Array, params: SamplingParams, *, prefix: Prefix, drafted: Sequence[int]) -> Array:
    """Bias, penalties and minimum length, which touch few tokens; the row itself where they touch none."""
    is_too_short = prefix.num_tokens - prefix.num_prompt_tokens + len(drafted) < params.min_new_tokens
    if not (params.logit_bias or _has_penalty(params) or is_too_short):
        return row
    row = row.copy()
    if params.logit_bias:
        bias = dict(params.logit_bias)
        row[[*bias]] += np.array([*bias.values()], dtype=np.float32)
    if _has_penalty(params):
        token_ids, counts = prefix.count(drafted)
        scores, penalty = row[token_ids], params.repetition_penalty
        scores = np.where(scores < 0, scores * penalty, scores / penalty)
        scores -= params.frequency_penalty * counts.astype(np.float32)
        scores -= params.presence_penalty * (counts > 0).astype(np.float32)
        row[token_ids] = scores
    if is_too_short:
        row[[token for token in prefix.stop_ids if token < len(row)]] = -np.inf
    return row


def _warp(row: Array, params: SamplingParams) -> tuple[Array, Array]:
    """Ids [K], ascending, and scores [K] of what temperature, top_k, top_p and min_p leave of the row."""
    token_ids = _all_ids(len(row))
    if params.temperature == 0:
        return token_ids, row
    scores = row / params.temperature if params.temperature != 1 else row
    if not scores.max() > -np.inf:  # every token is forbidden
        return token_ids, scores
    if 0 < params.top_k < len(row):
        token_ids = _find_leaders(scores, params.top_k)
        scores = scores[token_ids]
        kept = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
        token_ids, scores = token_ids[kept], scores[kept]
    if params.top_p < 1:
        kept = _find_nucleus(scores, params.top_p)
        token_ids, scores = token_ids[kept], scores[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(np.exp(scores - scores.max()) >= np.float32(params.min_p))
        token_ids, scores = token_ids[kept], scores[kept]
    return token_ids, scores


@lru_cache(maxsize=4)
def _all_ids(vocab_size: int) -> Array:
    token_ids = np.arange(vocab_size)
    token_ids.flags.writeable = False  # shared by all rows
    return token_ids


def _find_leaders(scores: Array, count: int) -> Array:
    """Ascending indices of all scores that reach some threshold: at least the `count` largest, mostly few more."""
    highest, num_per_block = scores, len(scores) // _NUM_BLOCKS
    if count <= _NUM_BLOCKS and num_per_block > 1:
        # As many scores as blocks reach a block's maximum, and these are far fewer to select from.
        highest = scores[: num_per_block * _NUM_BLOCKS].reshape(num_per_block, _NUM_BLOCKS).max(axis=0)
    count = min(count, len(highest))
    return np.flatnonzero(scores >= np.partition(highest, -count)[-count])


def _find_nucleus(scores: Array, top_p: float) -> Array:
    """Ascending indices of what TopPLogitsWarper of transformers keeps.

    Removed is a token if the probability of it and all tokens below it is at most 1 - top_p; the largest is kept
    always. Of equal scores the one of the lower id is below.
    """
    weights = np.exp(scores - scores.max())
    total, limit = weights.sum(dtype=np.float64), np.float32(1 - top_p)
    # Tokens less likely than this have less than half the limit together: all of them go.
    near = np.flatnonzero(weights >= 0.5 * float(limit) / len(scores) * total)
    below = (total - weights[near].sum(dtype=np.float64)) / total if len(near) < len(scores) else 0.0
    edge, probs = scores[near], weights[near] / np.float32(total)
    if len(near) > _MAX_SORTED:
        # Too many to sort: all but one of many intervals of scores stay or go as a whole.
        lowest, highest = float(edge.min()), float(edge.max())
        bins = ((edge - np.float64(lowest)) * (_NUM_BINS / ((highest - lowest) or 1.0))).astype(np.intp)
        through = below + np.cumsum(np.bincount(bins, weights=probs))
        edge_bin = min(int((through.astype(np.float32) <= limit).sum()), len(through) - 1)
        below = through[edge_bin - 1] if edge_bin else below
        at_edge = np.flatnonzero(bins == edge_bin)
        near, edge, probs = near[at_edge], edge[at_edge], probs[at_edge]
    order = np.argsort(edge, kind="stable")
    mass = (below + np.cumsum(probs[order], dtype=np.float64)).astype(np.float32)
    mass[-1] = np.inf
    is_kept = scores > edge[order[-1]]
    is_kept[near[order[mass > limit]]] = True
    return np.flatnonzero(is_kept)


def _rank(scores: Array, count: int) -> Array:
    """Indices of the `count` largest scores, best first, of equal ones the lower first; at least one, no other -inf."""
    if count == 1:
        return np.array([scores.argmax()])
    leaders = _find_leaders(scores, count)
    best = leaders[np.argsort(-scores[leaders], kind="stable")[:count]]
    return best[: max(1, np.count_nonzero(scores[best] > -np.inf))]


def _perturb(token_ids: Array, scores: Array, *, stream: tuple[int, int], count: int) -> tuple[Array, Array]:
    """Ids [K], ascending, and scores + noise [K] of all tokens that may be among the `count` best.

    stream: seed and position. A token outside the leaders needs more noise than the distance of its score from what
    the leaders reach; as noise grows with the hash, comparing hashes with one number finds the few that have it.
    """
    seed, position = stream
    hashes = hash_tokens(token_ids, seed=seed, position=position)
    if len(token_ids) > _MAX_PERTURBED:
        leaders = _find_leaders(scores, _NUM_LEADERS + count)
        leading, count = scores[leaders], min(count, len(leaders))
        to_beat, bound = np.partition(leading + gumbel(hashes[leaders]), -count)[-count], leading.min()
        if bound > -np.inf:  # else all tokens are leaders
            is_candidate = hashes >= bound_hash(float(to_beat), float(bound))
            is_candidate[leaders] = True
            candidates = np.flatnonzero(is_candidate)
            token_ids, scores, hashes = token_ids[candidates], scores[candidates], hashes[candidates]
    return token_ids, scores + gumbel(hashes)

"""The exactness check sees every difference, and tells rounding from errors."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kangaroo.bench.check import Acceptance, Checker, judge, total
from kangaroo.bench.prompts import Prompt
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.base import Batch, draft_roots
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.errors import PromptError
from kangaroo.kernels import cpu
from kangaroo.model.checkpoint import LoadedModel
from kangaroo.model.packed import PackedTransformer, pack
from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.sampling import gumbel_noise
from kangaroo.types import Draft, SamplingParams
from tests.spoiling import one_ulp, spoil_wide_passes
from tests.tiny import tame_transformer, tiny_tokenizer

PROMPT = (5, 6, 7)
GREEDY = SamplingParams(max_new_tokens=40)


def loaded(target: Transformer) -> LoadedModel:
    tokenizer = Tokenizer(tiny_tokenizer(), settings={}, chat_template=None)
    return LoadedModel("tiny", Path("tiny"), target, tokenizer, frozenset())


def checker(*, storage: str | None, gamma: int = 3) -> Checker:
    """Kangaroo on a model that accepts about half of its drafts; storage None takes the reference kernels."""
    plain = tame_transformer("llama", 2)
    target = plain if storage is None else pack(plain, storage)
    adapter = Adapter.initialize(plain, 2)
    if isinstance(target, PackedTransformer):
        adapter = adapter.pack(target)
    return Checker(loaded(target), KangarooDrafter(target, adapter, stopping=FixedLength(gamma)))


class Oracle(PlainDrafter):
    """Drafts trees: the true continuation as the second of two siblings on every level."""

    def __init__(self, text: tuple[int, ...]) -> None:
        self._text = text

    def draft(self, batch: Batch) -> Draft:
        (sequence,) = batch.sequences
        depth = min(sequence.max_draft // 2, 3)
        start = len(sequence.tokens)
        if depth == 0:
            return draft_roots(batch)
        tokens, parents = [sequence.tokens[-1]], [-1]
        for level, token in enumerate(self._text[start : start + depth]):
            tokens += [(token + 1) % 258, token]
            parents += [2 * level] * 2
        return Draft(torch.tensor([tokens]), (tuple(parents),))


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_native_kernels_are_identical_to_the_bit(storage: str, temperature: float) -> None:
    result = checker(storage=storage).check(PROMPT, replace(GREEDY, temperature=temperature, seed=3))
    assert result.identical
    assert (result.divergence, result.logits_difference, result.num_compared) == (None, None, 40)
    assert result.plain.token_ids == result.drafted.token_ids
    assert (result.plain.num_steps, result.plain.drafter) == (39, "plain")
    counts = result.acceptance
    assert counts.none + counts.part + counts.all + counts.no_draft == result.drafted.num_steps
    if temperature == 0 and storage != "int8":
        assert min(counts.none, counts.part, counts.all) > 0


def test_tree_drafts_are_followed_along_their_accepted_branch() -> None:
    model = loaded(pack(tame_transformer("llama", 2)))
    text = Checker(model, PlainDrafter()).check(PROMPT, GREEDY).plain.token_ids
    result = Checker(model, Oracle((*PROMPT, *text))).check(PROMPT, GREEDY)
    assert result.identical
    assert result.num_compared == 40
    assert result.acceptance.all > 5
    assert result.acceptance.none == result.acceptance.part == 0


def test_one_ulp_in_wide_passes_is_seen_where_tokens_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = checker(storage="float32").check(PROMPT, GREEDY)
    spoil_wide_passes(monkeypatch, one_ulp)
    result = checker(storage="float32").check(PROMPT, GREEDY)
    assert result.plain.token_ids == result.drafted.token_ids == exact.plain.token_ids
    assert result.divergence is None
    assert not result.identical
    found = result.logits_difference
    assert found is not None
    assert 0 < found.position < 4
    assert 20 < found.num_positions <= 40
    assert found.largest is not None
    assert 0 < found.largest < 1e-4


def test_flipped_tokens_are_reported_with_plain_decodings_own_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = PROMPT[:1]  # so that the prefill is no wide pass, and plain decoding stays honest
    plain = checker(storage="float32")
    honest = plain.check(prompt, GREEDY)
    rows = list(plain._plain.logits())
    spoil_wide_passes(monkeypatch, lambda states: states.flip(-1).contiguous())
    result = checker(storage="float32").check(prompt, GREEDY)
    found = result.divergence
    assert found is not None
    assert result.plain.token_ids == honest.plain.token_ids
    texts = result.plain.token_ids, result.drafted.token_ids
    assert texts[0][: found.position] == texts[1][: found.position]
    assert found.candidates == (texts[0][found.position], texts[1][found.position])
    assert found.candidates[0] != found.candidates[1]
    # Nothing beyond the first difference is compared: the prefixes are no longer the same.
    assert result.num_compared == found.position + 1
    best = rows[found.position].topk(2).values
    assert (found.margin, found.near_tie) == (float(best[0] - best[1]), False)
    assert result.logits_difference is not None


def test_margins_of_sampled_texts_count_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_wide_passes(monkeypatch, lambda states: states.flip(-1).contiguous())
    checks, params = checker(storage="float32"), replace(GREEDY, temperature=2.0, seed=3)
    found = checks.check(PROMPT[:1], params).divergence
    assert found is not None
    noise = gumbel_noise(found.position, torch.arange(258), seed=3)
    scores = list(checks._plain.logits())[found.position] + 2.0 * noise
    best = scores.topk(2)
    assert (int(best.indices[0]), float(best.values[0] - best.values[1])) == (found.candidates[0], found.margin)


def test_a_wide_head_that_rounds_differently_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = cpu.Head.logits

    def perturbed(self: Any, hidden: Tensor, norm: Tensor | None) -> Tensor:
        logits = original(self, hidden, norm)
        return one_ulp(logits) if len(hidden) > 1 else logits

    monkeypatch.setattr(cpu.Head, "logits", perturbed)
    result = checker(storage="float32").check(PROMPT, GREEDY)
    assert result.divergence is None
    assert result.logits_difference is not None


def test_logits_that_are_no_number_have_no_largest_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_wide_passes(monkeypatch, lambda states: torch.full_like(states, math.nan))
    result = checker(storage="float32").check(PROMPT, GREEDY)
    assert result.logits_difference is not None
    assert result.logits_difference.largest is None


def test_negative_zero_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wide in (("zero", 0.0), ("negative zero", -0.0)):
        original = cpu.Head.logits

        def flat(
            self: Any,
            hidden: Tensor,
            norm: Tensor | None,
            *,
            wide: float = wide,
            original: Any = original,
        ) -> Tensor:
            logits: Tensor = original(self, hidden, norm)
            return torch.full_like(logits, wide if len(hidden) > 1 else 0.0)

        with monkeypatch.context() as patch:
            patch.setattr(cpu.Head, "logits", flat)
            result = checker(storage="float32").check(PROMPT, GREEDY)
        assert (result.logits_difference is None) == (name == "zero")


def test_reference_kernels_differ_by_rounding_at_most() -> None:
    result = checker(storage=None).check(PROMPT, GREEDY)
    assert result.divergence is None or result.divergence.near_tie
    if result.logits_difference is not None:
        assert result.logits_difference.largest is not None
        assert result.logits_difference.largest < 1e-3


def test_reference_decoder_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_wide_passes(monkeypatch, lambda states: states.flip(-1), owner=Transformer)
    result = checker(storage=None).check(PROMPT, GREEDY)
    assert result.divergence is not None
    assert not result.divergence.near_tie


def test_a_flip_between_the_two_best_of_a_near_tie_is_explained_and_others_are_not() -> None:
    scores = torch.tensor([0.0, 4.0, 4.0 - 2**-21, 3.9])
    found = judge(scores, (1, 2), position=7, hidden_size=1)
    assert (found.position, found.candidates, found.margin, found.near_tie) == (7, (1, 2), 2**-21, True)
    # A near-tie of the two best does not explain a third.
    assert not judge(scores, (1, 3), position=7, hidden_size=1).near_tie
    assert not judge(scores, (1, None), position=7, hidden_size=1).near_tie
    # 8 ulps of 4.0, times the square root of the hidden size.
    ulp = 2.0**-21
    for gap, hidden_size, expected in ((7, 1, True), (8, 1, False), (15, 4, True), (16, 4, False)):
        scores = torch.tensor([4.0, 4.0 + gap * ulp])
        assert judge(scores, (1, 0), position=0, hidden_size=hidden_size).near_tie == expected


def test_totals() -> None:
    one = checker(storage="float32").check(PROMPT, GREEDY, name="one")
    two = checker(storage="float32").check(PROMPT, SamplingParams(max_new_tokens=1), name="two")
    found = judge(torch.tensor([1.0, 1.0]), (0, 1), position=0, hidden_size=1)
    totals = total([one, two, replace(two, divergence=found)])
    assert (totals["num_prompts"], totals["num_tokens_identical"], totals["num_near_ties"]) == (3, 2, 1)
    assert (totals["num_positions"], totals["num_positions_identical"], totals["num_new_tokens"]) == (42, 42, 42)
    assert totals["num_steps"] == one.drafted.num_steps
    assert totals["tokens_per_step"] == one.drafted.tokens_per_step
    assert totals["acceptance_rate"] == one.drafted.acceptance_rate
    assert totals["accepted_of_draft"] == vars(one.acceptance)
    assert total([two])["tokens_per_step"] is None
    assert total([two])["acceptance_rate"] is None
    assert Acceptance(1, 2, 3, 4) + Acceptance(1, 0, 1, 0) == Acceptance(2, 2, 4, 4)


def test_prompts_that_cannot_be_decoded_are_refused_before_any_is() -> None:
    checks = checker(storage="float32")
    for text, reason in (("x" * 300, "1..255 tokens"), ("\ud800", "valid UTF-8")):
        with pytest.raises(PromptError, match=rf"prompt long.*{reason}"):
            checks.check_all([Prompt("short", "a", {}), Prompt("long", text, {})], GREEDY)
    names = [one.name for one in checks.check_all([Prompt("short", "a", {})], GREEDY)]
    assert names == ["short"]

"""Guesses judged in one teacher-forced pass are those of drafts, and steps counted from them those of decoding."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kangaroo.bench.agreement import Judged, count_steps
from kangaroo.bench.texts import Decoder, Text, add_runs, decode_texts
from kangaroo.drafters.layer_skip import LayerSkipDrafter
from kangaroo.drafters.stopping import ConfidenceThreshold
from kangaroo.errors import SettingsError
from kangaroo.kernels import REFERENCE
from kangaroo.model import packed
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.skips import NO_SKIPS, SkippedSublayers
from kangaroo.model.transformer import Transformer
from kangaroo.search.forced import ForcedTexts
from tests.tiny import tame_transformer

PROMPTS = [(9, 77, 210, 31, 5, 66), (3, 140), tuple(range(40, 57))]
SKIPS = SkippedSublayers(attention=frozenset({2}), mlp=frozenset({1, 3}))


def make_target(family: str, backend: str) -> Transformer:
    target = tame_transformer(family, 1)
    return target if backend == REFERENCE else packed.pack(target)


def judge_by_drafting(target: Transformer, text: Text, skips: SkippedSublayers, *, num_drafted: int) -> list[int]:
    """The guesses of drafts of true tokens, one pass a token, each begun behind num_drafted tokens of the last."""
    cache, tokens, guesses = target.new_cache(1, 64), list(text.token_ids), list[int]()

    def run(first: int, last: int, skips: SkippedSublayers) -> torch.Tensor:
        attention = CachedPass(cache, [Segment(0, first, last - first)])
        entering = target.embed(torch.tensor(tokens[first:last]))
        return target.forward(entering, (0, target.num_layers), attention=attention, skips=skips)[0]

    for start in range(text.num_prompt, len(tokens) - 1, num_drafted):
        run(0, start, NO_SKIPS)
        for at in range(start, min(start + num_drafted, len(tokens) - 1)):
            guesses += target.argmax(run(at, at + 1, skips)).tolist()
    return guesses


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("backend", ["native", REFERENCE])
def test_one_pass_judges_as_drafts_of_the_true_tokens_would(backend: str, family: str) -> None:
    target = make_target(family, backend)
    texts = decode_texts(target, PROMPTS, eos_ids=frozenset(), max_new_tokens=12)
    forced = ForcedTexts(target, texts, num_drafted=4)
    for _ in range(2):  # a candidate leaves no trace for the next
        for text, judged in zip(texts, forced.judge(SKIPS), strict=True):
            guesses = judge_by_drafting(target, text, SKIPS, num_drafted=4)
            true = text.token_ids[text.num_prompt + 1 :]
            assert judged.agrees == [guess == token for guess, token in zip(guesses, true, strict=True)]
            assert all(0 < one <= 1 for one in judged.confidences)
        assert all(all(judged.agrees) for judged in forced.judge(NO_SKIPS))


def test_texts_too_long_for_one_pass_are_judged_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target("llama", "native")
    texts = decode_texts(target, PROMPTS, eos_ids=frozenset(), max_new_tokens=12)
    expected = ForcedTexts(target, texts, num_drafted=4).judge(SKIPS)
    monkeypatch.setattr("kangaroo.search.forced.PASS_ROWS", 15)
    monkeypatch.setattr("kangaroo.search.forced.HEAD_ROWS", 4)
    forced = ForcedTexts(target, texts, num_drafted=4)
    assert len(forced._passes) == 3
    assert forced.judge(SKIPS) == expected


def test_texts_that_end_at_once_are_left_out() -> None:
    target = make_target("llama", "native")
    (text, *_) = decode_texts(target, PROMPTS[:1], eos_ids=frozenset(), max_new_tokens=4)
    first = text.token_ids[text.num_prompt]
    assert decode_texts(target, PROMPTS[:2], eos_ids=frozenset({first}), max_new_tokens=4)[0].num_prompt == 2
    with pytest.raises(SettingsError, match="ends every text at once"):
        decode_texts(target, PROMPTS[:1], eos_ids=frozenset({first}), max_new_tokens=4)


@pytest.mark.parametrize(("gamma", "eta"), [(1, 0.0), (4, 0.0), (4, 0.3), (3, 0.9)])
def test_steps_counted_for_a_draft_that_is_always_right_are_those_of_decoding(gamma: int, eta: float) -> None:
    target = make_target("llama", "native")
    texts = decode_texts(target, PROMPTS, eos_ids=frozenset(), max_new_tokens=20)
    counts = count_steps(ForcedTexts(target, texts, num_drafted=4).judge(NO_SKIPS), gamma=gamma, eta=eta)
    decoder = Decoder(target, LayerSkipDrafter(target, NO_SKIPS, stopping=ConfidenceThreshold(gamma, eta)))
    run = add_runs([decoder.run([text]) for text in texts])
    assert counts.num_tokens == run.num_tokens == 3 * 19
    assert (counts.num_steps, counts.num_drafted) == (run.num_steps, run.num_drafted)
    assert counts.num_accepted == run.num_accepted == run.num_drafted
    assert counts.tokens_per_step == run.tokens_per_step


def test_steps_are_counted_as_by_hand() -> None:
    judged = Judged([True, True, False, True, False, True], [0.9, 0.2, 0.9, 0.9, 0.9, 0.9])
    # Three drafted, two accepted; the bonus token stands at the miss; two drafted, one accepted; none left to draft.
    assert count_steps([judged], gamma=3, eta=0.0) == (6, 3, Counter({3: 1, 2: 1, 0: 1}))
    # The unsure second guess is drafted, and nothing behind it.
    assert count_steps([judged], gamma=3, eta=0.5) == (6, 3, Counter({2: 2, 0: 1}))


@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=12), min_size=1, max_size=3),
    st.integers(1, 6),
    st.floats(0, 1),
)
def test_every_token_is_counted_once(rows: list[list[tuple[bool, float]]], gamma: int, eta: float) -> None:
    judged = [Judged([right for right, _ in row], [sure for _, sure in row]) for row in rows]
    counts = count_steps(judged, gamma=gamma, eta=eta)
    assert counts.num_tokens == sum(map(len, rows)) == counts.num_steps + counts.num_accepted
    assert counts.num_accepted <= counts.num_drafted <= gamma * counts.num_steps

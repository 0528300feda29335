"""Where texts part is reported with the target's margin there."""

import torch

from kangaroo.bench.divergence import find_divergence, run_full_pass
from tests.tiny import tiny_config, tiny_transformer

PROMPT = (5, 6, 7)


def test_equal_texts_have_no_divergence() -> None:
    target = tiny_transformer(tiny_config())
    assert find_divergence(target, PROMPT, first=(1, 2), second=(1, 2)) is None


def test_divergence_names_position_candidates_and_margin() -> None:
    target = tiny_transformer(tiny_config())
    found = find_divergence(target, PROMPT, first=(1, 2, 3), second=(1, 9, 3))
    assert found is not None
    assert (found.position, found.candidates, found.near_tie) == (1, (2, 9), False)
    logits, _ = run_full_pass(target, [*PROMPT, 1])
    best = logits[-1].topk(2).values
    assert found.margin == float(best[0] - best[1]) > 0


def test_text_that_ends_early_diverges_at_its_end() -> None:
    found = find_divergence(tiny_transformer(tiny_config()), PROMPT, first=(1, 2), second=(1,))
    assert found is not None
    assert (found.position, found.candidates) == (1, (2, None))


def test_two_equal_logits_are_a_near_tie() -> None:
    target = tiny_transformer(tiny_config())
    # Every row of the head is the same, so every logit ties.
    target.head = target.head[:1].expand_as(target.head).contiguous()
    found = find_divergence(target, PROMPT, first=(1,), second=(2,))
    assert found is not None
    assert (found.margin, found.near_tie) == (0.0, True)
    assert torch.isfinite(torch.tensor(found.margin))

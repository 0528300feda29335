"""Where texts part is reported with the target's margin there."""

import pytest
import torch

from kangaroo.bench.divergence import find_divergence, shared_length
from kangaroo.model.transformer import FullSequencePass, Transformer
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
    tokens = torch.tensor([[*PROMPT, 1]])
    attention = FullSequencePass(target.config, tokens.shape[1], device=target.device)
    hidden, _ = target.forward(target.embed(tokens), (0, target.num_layers), attention=attention)
    best = target.logits(hidden)[0, -1].topk(2).values
    assert found.margin == pytest.approx(float(best[0] - best[1]), rel=1e-4)
    assert found.margin > 0


def test_only_the_row_in_question_gets_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    target, rows = tiny_transformer(tiny_config()), []

    def head_logits(normed: torch.Tensor) -> torch.Tensor:
        rows.append(normed.numel() // normed.shape[-1])
        return Transformer.head_logits(target, normed)

    monkeypatch.setattr(target, "head_logits", head_logits)
    find_divergence(target, PROMPT, first=(1, 2, 3), second=(1, 2, 9))
    assert rows == [1]


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 4], [1, 2, 3], 2), ([1, 2], [1, 2], 2), ([5, 2], [1, 2], 0)],
)
def test_shared_length(first: list[int], second: list[int], length: int) -> None:
    assert shared_length(first, second) == shared_length(second, first) == length


def test_text_that_ends_early_diverges_at_its_end() -> None:
    found = find_divergence(tiny_transformer(tiny_config()), PROMPT, first=(1, 2), second=(1,))
    assert found is not None
    assert (found.position, found.candidates) == (1, (2, None))


def test_two_equal_logits_are_a_near_tie() -> None:
    target = tiny_transformer(tiny_config())
    # Every row of the head is the same, so every logit ties up to rounding.
    target.head = target.head[:1].expand_as(target.head).contiguous()
    found = find_divergence(target, PROMPT, first=(1,), second=(2,))
    assert found is not None
    # One row's products may be summed in another order for some tokens of the vocabulary than for others.
    assert found.margin == pytest.approx(0.0, abs=1e-6)
    assert found.near_tie

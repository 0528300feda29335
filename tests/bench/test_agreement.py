"""Teacher-forced counts agree with real decoding on the target's own text."""

import pytest

from kangaroo.bench.agreement import count_steps, judge_adapter, repeated_share
from kangaroo.bench.texts import Text
from kangaroo.drafters.adapter import Kind
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.stopping import FixedLength
from kangaroo.engine.engine import Engine
from kangaroo.types import Request, SamplingParams
from tests.tiny import noisy_adapter, tiny_config, tiny_transformer


@pytest.mark.parametrize("gamma", [1, 3, 6])
@pytest.mark.parametrize("num_new_tokens", [1, 2, 17, 40])
@pytest.mark.parametrize("kind", ["attention", "head"])
def test_forced_steps_on_greedy_text_are_the_steps_of_decoding(kind: Kind, gamma: int, num_new_tokens: int) -> None:
    target = tiny_transformer(tiny_config())
    # Weak upper layers let the shallow draft be right about half the time.
    for layer in target.layers[1:]:
        layer.output.mul_(0.1)
        layer.down.mul_(0.1)
    adapter = noisy_adapter(target, 1, kind=kind, noise=0.05)
    engine = Engine(target, KangarooDrafter(target, adapter, stopping=FixedLength(gamma)))
    decoding = engine.submit(Request((5, 6, 7), SamplingParams(max_new_tokens=num_new_tokens)))
    engine.run(decoding)
    text = [5, 6, 7, *decoding.new_tokens]
    judged = judge_adapter(target, adapter, text=Text(tuple(text), 3))
    counts = count_steps([judged], gamma=gamma, eta=0.0)
    assert (counts.num_tokens, counts.num_steps) == (num_new_tokens - 1, decoding.num_steps)
    assert (counts.num_drafted, counts.num_accepted) == (decoding.num_drafted, decoding.num_accepted)
    if num_new_tokens == 40:
        assert 0 < decoding.num_accepted < decoding.num_drafted


def test_repeated_share_counts_grams_seen_before() -> None:
    assert repeated_share([1, 2, 3], length=8) == 0.0
    assert repeated_share(range(20), length=4) == 0.0
    # Grams of [1, 2] * 4 with length 2: 12 21 12 21 12 21 12; two are new.
    assert repeated_share([1, 2] * 4, length=2) == pytest.approx(5 / 7)

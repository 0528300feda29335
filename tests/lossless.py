"""What tests of drafters share: a batch decoded to its end, plainly or with a drafter."""

from collections.abc import Sequence

import torch

from kangaroo.drafters.base import Drafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.model.transformer import Transformer
from kangaroo.types import Request, SamplingParams


def make_prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 258, (length,), generator=generator).tolist()) for length in lengths]


PROMPTS = make_prompts(9, 3, 30)


def decode(
    target: Transformer, drafter: Drafter, params: SamplingParams, *, prompts: Sequence[tuple[int, ...]] = PROMPTS
) -> list[Decoding]:
    """All prompts in one batch, to their ends."""
    engine = Engine(target, drafter, limits=Limits(max_batch_size=len(prompts)))
    decodings = [engine.submit(Request(prompt, params)) for prompt in prompts]
    for decoding in decodings:
        engine.run(decoding)
        assert decoding.error is None, decoding.error
    return decodings


def assert_lossless(
    target: Transformer, drafter: Drafter, params: SamplingParams, *, prompts: Sequence[tuple[int, ...]] = PROMPTS
) -> list[Decoding]:
    """The texts are those of plain decoding; returns the drafter's decodings."""
    plain = decode(target, PlainDrafter(), params, prompts=prompts)
    drafted = decode(target, drafter, params, prompts=prompts)
    assert [one.new_tokens for one in drafted] == [one.new_tokens for one in plain]
    return drafted


def num_accepted(decodings: Sequence[Decoding]) -> int:
    return sum(one.num_accepted for one in decodings)


def num_rejected(decodings: Sequence[Decoding]) -> int:
    """Guesses that came to nothing."""
    return sum(one.num_drafted for one in decodings) - num_accepted(decodings)

"""One small model and what it says, shared by the tests of the engine."""

import pytest

from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.engine import Engine
from kangaroo.model.transformer import Transformer
from kangaroo.types import SamplingParams
from tests.engine.scripts import PROMPT, decode
from tests.tiny import tiny_config, tiny_transformer


@pytest.fixture(scope="session")
def target() -> Transformer:
    return tiny_transformer(tiny_config(num_hidden_layers=2))


@pytest.fixture(scope="session")
def text(target: Transformer) -> list[int]:
    """The prompt and 40 greedy tokens."""
    return [*PROMPT, *decode(Engine(target, PlainDrafter()), SamplingParams(max_new_tokens=40)).new_tokens]

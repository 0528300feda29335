"""What the training tests share: a tiny target, a learnable text, and a way to run to the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kangaroo.model.tokenizer import Tokenizer
from kangaroo.model.transformer import Transformer
from kangaroo.train.adapter import train_adapter
from kangaroo.train.data import Corpus, Dataset, plain_document
from kangaroo.train.plan import AdapterPlan
from kangaroo.train.run import Progress
from tests.tiny import tiny_config, tiny_tokenizer, tiny_transformer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def target() -> Transformer:
    return tiny_transformer(tiny_config())


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), settings={}, chat_template=CHAT)


@pytest.fixture
def dataset(tokenizer: Tokenizer) -> Dataset:
    texts = [f"the {word} kangaroo hops over the {word} log. " * 4 for word in ("red", "old", "big", "shy") * 10]
    documents = tuple(plain_document(f"{i} {text}", tokenizer, eos_id=257) for i, text in enumerate(texts))
    return Dataset(Corpus(documents), sequence_length=16)


@pytest.fixture
def plan() -> AdapterPlan:
    return AdapterPlan(num_steps=6, batch_size=4, sequence_length=16, warmup_steps=2, evaluate_every=3,
                       checkpoint_every=2)  # fmt: skip


@pytest.fixture
def finish(target: Transformer, dataset: Dataset) -> Callable[..., list[Progress]]:
    def run(plan: AdapterPlan, output: Path, **options: Any) -> list[Progress]:
        return list(train_adapter(target, dataset, plan=plan, output=output, **options))

    return run

"""The bundled model works from a fresh checkout, with the network cut."""

import socket

import pytest

from kangaroo import LLM, SamplingParams
from kangaroo.bench.divergence import find_divergence
from kangaroo.llm import DEMO_FOLDER, LoadedModel, build_drafter, load_model

PROMPTS = [
    'def fibonacci(n):\n    """Return the first n Fibonacci numbers as a list."""\n',
    "class Stack:\n    def __init__(self):\n",
    "import os\n\n\ndef list_files(path):\n",
]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("demo")


def test_bundle_is_small_and_carries_its_card() -> None:
    files = [path for path in DEMO_FOLDER.rglob("*") if path.is_file()]
    names = {path.relative_to(DEMO_FOLDER).as_posix() for path in files}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert {"adapter/config.json", "adapter/adapter.safetensors", "adapter/report.json"} <= names
    assert sum(path.stat().st_size for path in files) < 60e6


def test_demo_is_loaded_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert LLM.from_pretrained("demo").drafter.name == "kangaroo"


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_kangaroo_writes_the_text_of_plain_decoding(model: LoadedModel, prompt: str, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=64, temperature=temperature, seed=11)
    plain, kangaroo = (
        LLM(model, build_drafter(model, drafter)).generate(prompt, params) for drafter in ("plain", "kangaroo")
    )
    assert kangaroo.num_accepted > 0
    if temperature == 0 and plain.token_ids != kangaroo.token_ids:
        # The reference kernels round a wide pass differently: only a near-tie may fall the other way.
        prompt_ids = model.tokenizer.encode(prompt)
        found = find_divergence(model.target, prompt_ids, first=plain.token_ids, second=kangaroo.token_ids)
        assert found is not None
        assert found.near_tie
    else:
        assert plain.token_ids == kangaroo.token_ids


def test_adapter_brings_at_least_half_a_token_a_step(model: LoadedModel) -> None:
    llm = LLM(model, build_drafter(model, "kangaroo"))
    completions = [llm.generate(prompt, SamplingParams(max_new_tokens=64)) for prompt in PROMPTS]
    num_tokens = sum(one.num_new_tokens - 1 for one in completions)
    assert num_tokens / sum(one.num_steps for one in completions) > 1.5

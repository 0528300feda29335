"""The bundled model works from a fresh checkout, with the network cut."""

import socket

import pytest

from kangaroo import LLM, SamplingParams
from kangaroo.bench.check import Checker, total
from kangaroo.bench.prompts import BUILT_IN, read_prompts
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.kernels import REFERENCE
from kangaroo.llm import build_drafter
from kangaroo.model.checkpoint import DEMO_FOLDER, LoadedModel, load_model
from kangaroo.model.weights import STORAGES

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
    assert {"medusa/config.json", "medusa/heads.safetensors", "medusa/report.json"} <= names
    assert {"draft_model/config.json", "draft_model/model.safetensors", "draft_model/report.json"} <= names
    assert "skip_layers.json" in names
    assert sum(path.stat().st_size for path in files) < 60e6


def test_demo_is_loaded_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert LLM.from_pretrained("demo").drafter.name == "kangaroo"


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_kangaroo_is_plain_decoding_to_the_bit_in_every_storage(storage: str, eta: float) -> None:
    kept_in = {"weights": storage} if storage == "int8" else {"dtype": storage}
    model = load_model("demo", **kept_in)
    if model.target.backend == REFERENCE:
        pytest.skip("the reference kernels round a wide pass differently")
    checker = Checker(model, build_drafter(model, KangarooSettings(gamma=6, eta=eta)))
    prompts = read_prompts(BUILT_IN)
    results = list(checker.check_all(prompts, SamplingParams(max_new_tokens=40)))
    assert [one.name for one in results if not one.identical] == []
    accepted = total(results)["accepted_of_draft"]
    assert isinstance(accepted, dict)
    assert min(accepted[kind] for kind in ("none", "part", "all")) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", ["kangaroo", "layer_skip", "medusa", "prompt_lookup", "draft_model", "auto"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_drafters_draw_the_text_plain_decoding_draws(
    model: LoadedModel, prompt: str, drafter: str, temperature: float
) -> None:
    params = SamplingParams(max_new_tokens=64, temperature=temperature, seed=11)
    plain, drafted = (LLM(model, build_drafter(model, name)).generate(prompt, params) for name in ("plain", drafter))
    assert drafted.num_accepted > 0
    assert plain.token_ids == drafted.token_ids


@pytest.mark.parametrize("drafter", ["kangaroo", "medusa", "draft_model"])
def test_each_drafter_brings_at_least_half_a_token_a_step(model: LoadedModel, drafter: str) -> None:
    llm = LLM(model, build_drafter(model, drafter))
    completions = [llm.generate(prompt, SamplingParams(max_new_tokens=64)) for prompt in PROMPTS]
    num_tokens = sum(one.num_new_tokens - 1 for one in completions)
    assert num_tokens / sum(one.num_steps for one in completions) > 1.5

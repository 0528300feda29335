"""Which contenders a comparison takes, and what becomes of those that are not here."""

import sys
from pathlib import Path

import pytest
import torch

from kangaroo.bench.contenders import MAX_CONTEXT, TransformersContender
from kangaroo.bench.contenders.roster import (
    NAMES,
    Parts,
    build_contenders,
    choose_names,
    find_vllm_python,
    max_text_tokens,
)
from kangaroo.errors import CheckpointError, SettingsError
from kangaroo.llm import COMPANIONS
from kangaroo.model.checkpoint import load_model
from kangaroo.model.weights import save_checkpoint
from tests.tiny import save_tiny_tokenizer, tiny_config, tiny_raw_config, tiny_tokenizer, tiny_transformer

USUAL = ["prompt_lookup", "transformers", "transformers-prompt-lookup", "llama.cpp"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_checkpoint(tiny_transformer(tiny_config()), folder, raw_config=tiny_raw_config(), dtype=torch.float32)
    save_tiny_tokenizer(folder)
    return folder


def place(folder: Path, drafter: str) -> None:
    (folder / COMPANIONS[drafter]).parent.mkdir(exist_ok=True)
    (folder / COMPANIONS[drafter]).touch()


def test_the_usual_contenders_follow_what_lies_beside_the_model(tmp_path: Path) -> None:
    assert choose_names([], tmp_path, parts=Parts()) == ["plain", *USUAL]
    place(tmp_path, "layer_skip")
    auto = ["plain", "prompt_lookup", "auto", *USUAL[1:]]
    assert choose_names([], tmp_path, parts=Parts()) == auto
    place(tmp_path, "kangaroo")
    assert choose_names([], tmp_path, parts=Parts()) == ["plain", "kangaroo", *USUAL]


def test_names_that_are_wanted_replace_the_usual_and_plain_stays(tmp_path: Path) -> None:
    place(tmp_path, "kangaroo")
    assert choose_names(["transformers", "medusa"], tmp_path, parts=Parts()) == ["plain", "medusa", "transformers"]


def test_parts_add_the_contenders_they_are_for(tmp_path: Path) -> None:
    parts = Parts(adapter="here", draft_model="small", vllm_python=Path("python"))
    names = ["plain", "kangaroo", "draft_model", "transformers-assistant", "vllm"]
    assert choose_names(["plain"], tmp_path, parts=parts) == names


def test_a_draft_model_beside_the_model_serves_those_that_need_one(folder: Path) -> None:
    raw = tiny_raw_config()
    save_checkpoint(tiny_transformer(tiny_config()), folder / "draft_model", raw_config=raw, dtype=torch.float32)
    save_tiny_tokenizer(folder / "draft_model")
    wanted = ["draft_model", "transformers-assistant"]
    names = choose_names(wanted, folder, parts=Parts())
    assert names == ["plain", *wanted]
    contenders, left_out = build_contenders(load_model(str(folder)), names, parts=Parts())
    assert ([one.name for one in contenders], left_out) == (names, {})


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("tortoise", "contender must be one of plain, kangaroo, .*, vllm, got 'tortoise'"),
        ("vllm", "contender vllm needs --vllm-python, got none"),
        ("draft_model", "contender draft_model needs --draft-model"),
        ("transformers-assistant", "needs --draft-model"),
    ],
)
def test_a_name_that_cannot_run_is_refused(tmp_path: Path, name: str, fragment: str) -> None:
    with pytest.raises(SettingsError, match=fragment):
        choose_names([name], tmp_path, parts=Parts())


def test_contenders_that_reserve_their_cache_bound_the_context() -> None:
    assert max_text_tokens(["plain", "transformers"], 131072) == 131072
    assert max_text_tokens(["plain", "llama.cpp"], 131072) == MAX_CONTEXT
    assert max_text_tokens(["plain", "vllm"], 256) == 256


def test_vllm_is_found_beside_this_interpreter_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert find_vllm_python([]) is None
    monkeypatch.delitem(sys.modules, "vllm")
    (tmp_path / "vllm.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_vllm_python([]) == find_vllm_python(["plain", "vllm"]) == Path(sys.executable)
    assert find_vllm_python(["plain", "transformers"]) is None


def test_what_is_not_installed_is_left_out_with_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    parts = Parts(vllm_python=folder / "nowhere")
    contenders, left_out = build_contenders(load_model(str(folder)), ["plain", "llama.cpp", "vllm"], parts=parts)
    assert [one.name for one in contenders] == ["plain"]
    assert "pip install llama-cpp-python" in left_out["llama.cpp"]
    assert "no Python to run vLLM with" in left_out["vllm"]


def test_without_transformers_all_of_its_contenders_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    names = [name for name in NAMES if name.startswith("transformers")]
    contenders, left_out = build_contenders(load_model(str(folder)), names, parts=Parts(draft_model=str(folder)))
    assert contenders == []
    assert list(left_out) == ["transformers", "transformers-prompt-lookup", "transformers-assistant"]


def test_all_of_a_model_share_its_weights_and_write_the_same_text(folder: Path) -> None:
    names = ["plain", "prompt_lookup", "draft_model", "transformers", "transformers-prompt-lookup",
             "transformers-assistant"]  # fmt: skip
    contenders, left_out = build_contenders(load_model(str(folder)), names, parts=Parts(draft_model=str(folder)))
    assert left_out == {}
    assert [one.name for one in contenders] == names
    assert len({one.generate((5, 6, 7), max_new_tokens=12).token_ids for one in contenders}) == 1
    assert len({id(one._model) for one in contenders if isinstance(one, TransformersContender)}) == 1


def test_a_draft_model_of_another_vocabulary_is_an_error(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_checkpoint(tiny_transformer(tiny_config()), other, raw_config=tiny_raw_config(), dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["kangaroo"])
    tokenizer.save(str(other / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="must have the target's vocabulary: 'kangaroo'"):
        build_contenders(load_model(str(folder)), ["plain", "draft_model"], parts=Parts(draft_model=str(other)))

"""Tuned settings are found again for the same adapter on the same hardware only, and never against a user's word."""

import json
import logging
from pathlib import Path

import pytest

from kangaroo import tuning
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.settings import GateSettings, KangarooSettings
from kangaroo.drafters.stopping import ConfidenceThreshold
from kangaroo.drafters.tree import Branching
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import AdapterError, OutputError
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.tuning import Tuned, count_tuned, read_tuned, tuning_file, tuning_key, write_tuned
from tests.cli.conftest import build_model
from tests.tiny import tiny_config, tiny_transformer

KEY: tuning.Key = {"adapter": "a", "threads": 1}


def make_tuned(batch_size: int = 1, **changes: float) -> Tuned:
    fields = {"gamma": 3, "eta": 0.25, "num_siblings": 2, "max_nodes": 9, "predicted": 1.5, "measured": 1.4}
    return Tuned.model_validate({"batch_size": batch_size} | fields | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tuned"), adapter_seed=0)


@pytest.fixture
def model(folder: Path) -> LoadedModel:
    return load_model(str(folder))


def drafts_of(drafter: object) -> tuple[object, Branching]:
    assert isinstance(drafter, KangarooDrafter)
    return drafter._stopping, drafter._branching


def test_the_largest_batch_size_up_to_the_wanted_one_counts() -> None:
    write_tuned(KEY, [make_tuned(8, gamma=8), make_tuned(2, gamma=2)], stamp={})
    found = {size: read_tuned(KEY, batch_size=size) for size in (1, 2, 7, 8, 99)}
    assert {size: one and one.gamma for size, one in found.items()} == {1: None, 2: 2, 7: 2, 8: 8, 99: 8}


def test_what_is_written_replaces_the_same_key_alone() -> None:
    other: tuning.Key = KEY | {"threads": 2}
    for key, gamma in ((KEY, 1), (other, 2), (KEY, 3)):
        path = write_tuned(key, [make_tuned(gamma=gamma)], stamp={"date": "today"})
    assert path == tuning_file()
    assert [read_tuned(key) for key in (KEY, other)] == [make_tuned(gamma=3), make_tuned(gamma=2)]
    assert read_tuned(KEY | {"adapter": "b"}) is None
    assert [one["stamp"] for one in json.loads(path.read_text())["entries"]] == [{"date": "today"}] * 2
    assert [one.name for one in path.parent.iterdir()] == ["tuning.json"]


def test_other_batch_sizes_stay_with_what_found_them() -> None:
    write_tuned(KEY, [make_tuned(size, gamma=size) for size in (1, 2, 4)], stamp={"date": "first"})
    path = write_tuned(KEY, [make_tuned(size, gamma=9) for size in (2, 8)], stamp={"date": "second"})
    found = {size: read_tuned(KEY, batch_size=size) for size in (1, 2, 4, 8)}
    assert {size: one and one.gamma for size, one in found.items()} == {1: 1, 2: 9, 4: 4, 8: 9}
    stamps = {one["stamp"]["date"]: [tuned["batch_size"] for tuned in one["tuned"]]
              for one in json.loads(path.read_text())["entries"]}  # fmt: skip
    assert stamps == {"first": [1, 4], "second": [2, 8]}


def test_entries_are_counted_for_this_processor() -> None:
    assert count_tuned() == 0
    processor = tuning.read_processor().get("model name", "unknown")
    for size in (1, 2):
        write_tuned({"processor": processor}, [make_tuned(size)], stamp={})
    write_tuned({"processor": "another"}, [make_tuned()], stamp={})
    assert count_tuned() == 1


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff", b'{"version": 2}', b'{"entries": [{"key": {}, "tuned": [], "stamp": {}}]}',
     b'{"entries": [{"key": {"adapter": "a", "threads": 1}, "tuned": [{"gamma": 0}], "stamp": {}}]}'],
)  # fmt: skip
def test_a_damaged_file_is_ignored_in_one_line_and_replaced(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    tuning_file().write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_tuned(KEY) is None
    (message,) = caplog.messages
    assert message.startswith(f"{tuning_file()} is ignored, as it cannot be read (")
    assert message.endswith("run `kangaroo tune` again")
    assert "\n" not in message
    write_tuned(KEY, [make_tuned()], stamp={})
    assert read_tuned(KEY) == make_tuned()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("KANGAROO_CACHE", "~/own")
    assert tuning_file() == Path("/home/someone/own/tuning.json")
    monkeypatch.delenv("KANGAROO_CACHE")
    assert tuning_file() == Path("/xdg/kangaroo/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning_file() == Path("/home/someone/.cache/kangaroo/tuning.json")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KANGAROO_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(OutputError, match=r"cannot write .*; set KANGAROO_CACHE to a folder that can be written"):
        write_tuned(KEY, [make_tuned()], stamp={})


def test_a_model_drafts_as_was_tuned_for_its_batches(folder: Path, model: LoadedModel) -> None:
    key = tuning_key(model.target, model.adapter_folder)
    write_tuned(key, [make_tuned(), make_tuned(4, gamma=1, eta=0.5)], stamp={})
    for limits, gamma, eta in ((None, 3, 0.25), (Limits(max_batch_size=4), 1, 0.5)):
        llm = LLM.from_pretrained(str(folder), "kangaroo", limits=limits)
        assert drafts_of(llm.drafter) == (ConfidenceThreshold(gamma, eta), Branching(2, 9))


def test_what_the_user_says_wins(model: LoadedModel) -> None:
    write_tuned(tuning_key(model.target, model.adapter_folder), [make_tuned()], stamp={})
    some = build_drafter(model, KangarooSettings(eta=0.75))
    assert drafts_of(some) == (ConfidenceThreshold(6, 0.75), Branching())
    for one in (KangarooSettings(gamma=2), KangarooSettings(num_siblings=1), KangarooSettings(max_nodes=64)):
        assert drafts_of(build_drafter(model, one))[0] == ConfidenceThreshold(one.gamma or 6, 0.6)
    every = build_drafter(model, KangarooSettings(gamma=7, eta=0.9, num_siblings=4, max_nodes=30))
    assert drafts_of(every) == (ConfidenceThreshold(7, 0.9), Branching(4, 30))
    gated = build_drafter(model, GateSettings(KangarooSettings(), threshold=0.1))
    assert drafts_of(gated._drafter)[0] == ConfidenceThreshold(3, 0.25)  # type: ignore[attr-defined]


def test_tuned_settings_are_of_one_adapter_and_one_machine(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tuned(tuning_key(model.target, model.adapter_folder), [make_tuned()], stamp={})
    untuned = ConfidenceThreshold(6, 0.6), Branching()
    Adapter.initialize(tiny_transformer(tiny_config()), 1, seed=5).save(tmp_path)
    assert drafts_of(build_drafter(model, KangarooSettings(adapter=str(tmp_path)))) == untuned
    assert drafts_of(build_drafter(load_model(str(model.folder), dtype="bfloat16"), "kangaroo")) == untuned
    monkeypatch.setattr(tuning, "read_processor", lambda: {"model name": "another"})
    assert drafts_of(build_drafter(model, "kangaroo")) == untuned


def test_tuning_beats_what_the_adapter_recommends(model: LoadedModel, tmp_path: Path) -> None:
    adapter = Adapter.initialize(tiny_transformer(tiny_config()), 1, seed=6)
    adapter.config.gamma, adapter.config.eta = 2, 0.125
    adapter.save(tmp_path)
    settings = KangarooSettings(adapter=str(tmp_path))
    assert drafts_of(build_drafter(model, settings))[0] == ConfidenceThreshold(2, 0.125)
    write_tuned(tuning_key(model.target, tmp_path), [make_tuned()], stamp={})
    assert drafts_of(build_drafter(model, settings))[0] == ConfidenceThreshold(3, 0.25)


def test_a_missing_adapter_is_still_what_is_wrong(model: LoadedModel, tmp_path: Path) -> None:
    write_tuned(KEY, [make_tuned()], stamp={})
    with pytest.raises(AdapterError, match="no adapter folder"):
        build_drafter(model, KangarooSettings(adapter=str(tmp_path / "none")))

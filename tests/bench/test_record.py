"""Results are stamped with what produced them and name no folder of the machine."""

import json
import sys
from pathlib import Path

import pytest

from kangaroo.bench.record import markdown_table, name_apart, shorten_path, stamp, stamp_text, write_result
from kangaroo.errors import OutputError


def test_stamp_names_command_versions_and_hardware_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["/home/me/benchmarks/speed.py", "--prompts", "/data/x/prompts.jsonl", "--adapter", "2=/a/b/adapter"]
    monkeypatch.setattr(sys, "argv", arguments)
    facts = stamp()
    assert facts["command"] == "python benchmarks/speed.py --prompts prompts.jsonl --adapter 2=adapter"
    assert {"commit", "date", "torch", "cpu", "cpu_cores", "threads", "kernel_backend"} <= set(facts)
    assert str(facts["torch"]) in stamp_text(facts)


def test_stamp_names_the_command_line_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/bin/kangaroo", "bench", "spec-bench", "--output", "/data/out"])
    assert stamp()["command"] == "kangaroo bench spec-bench --output out"


def test_a_path_is_shortened_and_a_hub_id_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    named = {
        "org/name": "org/name", "org/here": "here", "~/org": "org", "~/none/x": "x", ".": tmp_path.name,
        "./org/": "org", "../a": "a", "/a/b.txt": "b.txt", "a/b/c": "c", "demo": "demo", "--model": "--model",
    }  # fmt: skip
    assert {text: shorten_path(text) for text in named} == named
    monkeypatch.setattr(sys, "argv", ["/bin/kangaroo", "tune", "--model=org/name", "--data", str(tmp_path / "x.txt")])
    assert stamp()["command"] == "kangaroo tune --model=org/name --data x.txt"


def test_folders_are_named_by_as_much_as_tells_them_apart() -> None:
    assert name_apart([Path("/a/x/adapter"), Path("/a/y/other")]) == ["adapter", "other"]
    assert name_apart([Path("/a/x/adapter"), Path("/a/y/adapter")]) == ["x/adapter", "y/adapter"]
    assert name_apart([Path("/x/adapter"), Path("/x/adapter")]) == ["adapter", "adapter"]


def test_result_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    write_result(tmp_path / "new" / "speed", {"ratio": 2.0}, text="# Speed\n\n")
    assert json.loads((tmp_path / "new" / "speed.json").read_text()) == {"ratio": 2.0}
    assert (tmp_path / "new" / "speed.md").read_text() == "# Speed\n"


def test_a_stem_keeps_its_dots(tmp_path: Path) -> None:
    write_result(tmp_path / "v1.2", {}, text="")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1.2.json", "v1.2.md"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "speed.md").mkdir()
    with pytest.raises(OutputError, match=r"speed\.json and \.md: .*give another place"):
        write_result(tmp_path / "speed", {}, text="")


def test_table_rounds_floats_to_three_digits() -> None:
    assert markdown_table(["a", "b"], [["x", 1.23456], [2, "y"]]) == "| a | b |\n| --- | --- |\n| x | 1.23 |\n| 2 | y |"

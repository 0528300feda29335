"""Results are stamped with what produced them and name no folder of the machine."""

import json
import sys
from pathlib import Path

import pytest

from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result


def test_stamp_names_command_versions_and_hardware_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["/home/me/benchmarks/speed.py", "--prompts", "/data/x/prompts.jsonl", "--adapter", "2=/a/b/adapter"]
    monkeypatch.setattr(sys, "argv", arguments)
    facts = stamp()
    assert facts["command"] == "python benchmarks/speed.py --prompts prompts.jsonl --adapter 2=adapter"
    assert {"commit", "date", "torch", "cpu", "cpu_cores", "threads", "kernel_backend"} <= set(facts)
    assert str(facts["torch"]) in stamp_text(facts)


def test_result_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    write_result(tmp_path / "new" / "speed", {"ratio": 2.0}, text="# Speed\n\n")
    assert json.loads((tmp_path / "new" / "speed.json").read_text()) == {"ratio": 2.0}
    assert (tmp_path / "new" / "speed.md").read_text() == "# Speed\n"


def test_table_rounds_floats_to_three_digits() -> None:
    assert markdown_table(["a", "b"], [["x", 1.23456], [2, "y"]]) == "| a | b |\n| --- | --- |\n| x | 1.23 |\n| 2 | y |"

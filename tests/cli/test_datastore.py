"""`kangaroo datastore build` from the outside: a store that opens, a report, clear refusals."""

import json
from pathlib import Path

import pytest

from kangaroo.drafters.retrieval import build
from kangaroo.drafters.settings import RetrievalSettings
from kangaroo.model.checkpoint import load_model


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one.txt").write_text("hop over the log. " * 4)
    (folder / "two.jsonl").write_text('{"text": "hop"}\n{"text": "over"}\n')
    return folder


@pytest.fixture
def build_store(run, bare_folder, data, tmp_path):
    """Run `kangaroo datastore build` with these further flags; a repeated flag's last value counts."""

    def build_with(*argv, data=data):
        return run("datastore", "build", "--model", bare_folder, "--data", data, "--output", tmp_path / "out", *argv)

    return build_with


def refusal(ran):
    """The one line that says why the run was refused."""
    assert (ran.status, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_report_is_one_json_object_and_the_store_is_the_models(build_store, bare_folder, tmp_path):
    ran = build_store("--json")
    assert (ran.status, ran.err) == (0, "")
    report = json.loads(ran.out)
    # Every document opens with BOS; the tiny model names no EOS to close it with.
    expected = {"output": str(tmp_path / "out"), "num_documents": 3, "num_tokens": 73 + 4 + 5, "num_skipped_files": 0}
    assert {name: report[name] for name in expected} == expected
    assert report["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    model = load_model(str(bare_folder))
    assert build(model, RetrievalSettings(datastore=str(tmp_path / "out"))).name == "retrieval"


def test_a_summary_is_printed_and_a_second_run_replaces_the_store(build_store, data, tmp_path):
    assert build_store().out.startswith("82 tokens of 3 documents, ")
    assert build_store(data=data / "two.jsonl").out.startswith("9 tokens of 2 documents, ")
    assert json.loads((tmp_path / "out/datastore.json").read_text())["num_documents"] == 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("empty.txt", "\n", "holds no text"), ("broken.jsonl", "{", "broken.jsonl, line 1: no JSON"),
     ("image.png", "x", "unsupported data file")],
)  # fmt: skip
def test_bad_data_is_refused_and_the_store_before_stays(name, content, reason, build_store, tmp_path):
    assert build_store().status == 0
    before = (tmp_path / "out/datastore.json").read_bytes()
    (tmp_path / name).write_text(content)
    assert reason in refusal(build_store(data=tmp_path / name))
    assert (tmp_path / "out/datastore.json").read_bytes() == before


def test_missing_data_leaves_no_folder(build_store, tmp_path):
    assert "no such data file or folder: nowhere" in refusal(build_store(data=Path("nowhere")))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_refused_before_anything_is_read(build_store, data):
    line = refusal(build_store("--output", data, data=Path("nowhere")))
    assert "holds more than a datastore, which would be lost; give another --output" in line
    assert sorted(path.name for path in data.iterdir()) == ["one.txt", "two.jsonl"]


def test_an_unwritable_output_is_refused_before_anything_is_read(build_store, data):
    assert "cannot write to" in refusal(build_store("--output", data / "one.txt" / "sub", data=Path("nowhere")))

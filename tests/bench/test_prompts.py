"""Prompt files of every kind are read alike, and bad ones are refused in one line."""

import gzip
import json
from pathlib import Path

import pytest

from kangaroo.bench.prompts import BUILT_IN, Prompt, read_prompts, spread_prompts
from kangaroo.errors import PromptError


def test_text_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\n\n  def f(x):\r\n    return\r\n\r\n \t\r\nclass A:\n\n")
    assert read_prompts(path) == [Prompt("1", "  def f(x):\n    return", {}), Prompt("2", "class A:", {})]
    assert read_prompts(path, limit=1) == [Prompt("1", "  def f(x):\n    return", {})]


def test_json_lines_name_their_prompts(tmp_path: Path) -> None:
    lines = [
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n"},
        {"question_id": 81, "category": "writing", "turns": ["Compose\u2028a post.", "Rewrite it."]},
        {"text": "Once"},
        {"id": None, "text": "upon", "prompt": "a time"},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    plain, packed = tmp_path / "prompts.jsonl", tmp_path / "prompts.v1.JSONL.gz"
    plain.write_text(text, encoding="utf-8-sig")
    packed.write_bytes(gzip.compress(text.encode()))
    found = read_prompts(plain)
    assert [(one.name, one.text) for one in found] == [
        ("HumanEval/0", "def f():\n"),
        ("81", "Compose\u2028a post."),
        ("3", "Once"),
        ("4", "a time"),
    ]
    assert [one.fields for one in found] == lines
    assert read_prompts(packed) == found


@pytest.mark.parametrize(
    ("count", "limit", "chosen"),
    [(10, 4, [0, 2, 5, 7]), (5, 3, [0, 1, 3]), (7, 1, [0]), (4, 4, [0, 1, 2, 3]), (3, 9, [0, 1, 2])],
)
def test_chosen_prompts_are_evenly_spread(count: int, limit: int, chosen: list[int]) -> None:
    prompts = [Prompt(str(number), "x", {}) for number in range(count)]
    assert [int(one.name) for one in spread_prompts(prompts, limit)] == chosen


def test_built_in_prompts_are_a_dozen() -> None:
    prompts = read_prompts(BUILT_IN)
    assert len(prompts) == len({one.text for one in prompts}) == 12
    assert all(len(one.text) < 400 for one in prompts)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"x", "unsupported prompt file"),
        ("a.gz", b"x", "unsupported prompt file"),
        ("a", b"x", "unsupported prompt file"),
        ("a.txt", None, "No such file"),
        ("a.txt", b" \n\n\t\n", "holds no prompt"),
        ("a.txt", b"caf\xe9", "must be UTF-8, got byte 3 (0xe9)"),
        ("a.jsonl", b"\n", "holds no prompt"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt"', "line 2: malformed JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: malformed JSON"),
        ("a.jsonl", b'["x"]', "line 1: must be a JSON object, got list"),
        ("a.jsonl", b'{"query": "x"}', "must have a prompt, text, question or turns field, got query"),
        ("a.jsonl", b"{}", "must have a prompt, text, question or turns field, got none"),
        ("a.jsonl", b'{"prompt": ""}', "prompt must hold text that is not empty, got ''"),
        ("a.jsonl", b'{"text": 3}', "text must hold text that is not empty, got 3"),
        ("a.jsonl", b'{"turns": []}', "turns must hold text that is not empty, got []"),
        ("a.jsonl", b'{"turns": [null, "x"]}', "turns must hold text that is not empty, got None"),
        ("a.jsonl.gz", b'{"prompt": "x"}', "cannot read the prompts"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}')[:-9], "damaged gzip"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError) as refused:
        read_prompts(path)
    assert reason in str(refused.value)
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match="cannot read the prompts"):
        read_prompts(tmp_path / "folder.txt")

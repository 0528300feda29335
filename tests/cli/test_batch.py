"""`kangaroo generate --prompts`: results in order, bad lines told and skipped, and runs that go on where one ended."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kangaroo.cli import batch
from kangaroo.engine.engine import Engine
from kangaroo.llm import LLM
from kangaroo.sampling import Prefix, choose
from kangaroo.types import SamplingParams

from .conftest import MakeModel, Ran, Run

LENGTHS = (30, 3, 17, 1, 40, 8, 2, 5, 21, 4)
Generate = Callable[..., Ran]


def write(path: Path, lines: list[object]) -> Path:
    """A file of these lines: JSON of what is no text, the text as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    """The results less what takes time or depends on who was decoded together."""
    volatile = ("_s", "_step", "_steps", "_rate", "_drafted", "_accepted")
    return [{key: value for key, value in one.items() if not key.endswith(volatile)} for one in read(path)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Lines of very different lengths, greedy and drawn."""
    lines = [
        {"id": f"line {number}", "prompt": "ab" * (number + 1),
         "params": {"max_new_tokens": length, "temperature": 0.8 * (number % 2)}}
        for number, length in enumerate(LENGTHS)
    ]  # fmt: skip
    return write(tmp_path / "prompts.jsonl", list(lines))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


@pytest.fixture
def generate(run: Run, model_folder: Path, prompts: Path, output: Path) -> Generate:
    """Run the fixture's files, unless told otherwise by flags."""

    def generate(*flags: object, prompts: Path = prompts) -> Ran:
        return run("generate", "--model", model_folder, "--prompts", prompts, "--output", output, "--seed", 9, *flags)

    return generate


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_results_are_in_input_order_and_those_of_each_line_alone(
    generate: Generate, model_folder: Path, prompts: Path, output: Path, batch_size: int
) -> None:
    ran = generate("--batch-size", batch_size, "--ignore-eos")
    assert (ran.status, ran.out) == (0, "")
    assert ran.err.startswith(f"10 lines, 0 failed, {sum(LENGTHS)} tokens, ")
    llm = LLM.from_pretrained(str(model_folder), "plain")
    for number, (line, result) in enumerate(zip(read(prompts), read(output), strict=True), start=1):
        assert list(result)[:4] == ["line", "request_sha256", "id", "text"]
        assert (result["line"], result["id"]) == (number, line["id"])
        params = SamplingParams(**line["params"], seed=result["seed"], ignore_eos=True)
        assert result["token_ids"] == list(llm.generate(line["prompt"], params).token_ids)
    assert len({result["seed"] for result in read(output)}) == 10


def test_slots_are_filled_as_they_come_free(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    widths = []
    step = Engine.step

    def count(engine: Engine) -> object:
        changed = step(engine)
        widths.append(2 - engine.scheduler.num_free_slots)
        return changed

    monkeypatch.setattr(Engine, "step", count)
    lengths = [60, *[6] * 10]
    lines = [{"prompt": "a", "params": {"max_new_tokens": length}} for length in lengths]
    file = write(tmp_path / "lines.jsonl", list(lines))
    assert generate("--batch-size", 2, "--ignore-eos", "--drafter", "plain", prompts=file).status == 0
    # Groups of two would take 60 steps for the first and 6 for each of five others.
    assert len(widths) <= 60 + 4


def test_each_result_is_on_disk_once_all_before_it_are_done(
    generate: Generate, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def stop_in_the_middle(engine: Engine) -> object:
        if output.read_bytes().count(b"\n") >= 3:
            raise RuntimeError("power cut")
        return step(engine)

    monkeypatch.setattr(Engine, "step", stop_in_the_middle)
    ran = generate("--batch-size", 2, "--ignore-eos")
    assert ran.status == 1
    assert "power cut" in ran.err
    # The fourth, of one token, was done before the third.
    assert [result["num_new_tokens"] for result in read(output)] == [30, 3, 17, 1]


@pytest.mark.parametrize("num_lost", [1, 2, 60, 100, 5000])
def test_run_goes_on_behind_the_whole_lines(generate: Generate, output: Path, num_lost: int) -> None:
    generate()
    whole, content = timeless(output), output.read_bytes()
    output.write_bytes(content[:-num_lost])
    num_kept = content[:-num_lost].count(b"\n")
    ran = generate("--json", "--batch-size", 2)
    assert timeless(output) == whole
    assert output.read_bytes().startswith(b"".join(content.splitlines(keepends=True)[:num_kept]))
    counts = json.loads(ran.out)
    assert list(counts) == ["num_lines", "num_done", "num_failed", "num_new_tokens", "wall_time_s"]
    assert (counts["num_lines"], counts["num_done"], counts["num_failed"]) == (10, num_kept, 0)


def test_run_of_a_complete_output_changes_nothing(generate: Generate, output: Path) -> None:
    generate()
    content = output.read_bytes()
    ran = generate()
    assert ran.status == 0
    assert ran.err.startswith("10 lines (10 by an earlier run), 0 failed, 0 tokens")
    assert output.read_bytes() == content


BAD = [
    ("{bad", "must be a JSON object in UTF-8, got '{bad'"),
    ("[1]", "must be a JSON object"),
    ({"id": 1}, "must have either a prompt or messages"),
    ({"prompt": "a", "messages": []}, "must have either a prompt or messages"),
    ({"prompt": ""}, "prompt must be text that is not empty, got ''"),
    ({"prompt": 5}, "prompt must be text that is not empty, got 5"),
    ({"prompt": "x" * 300}, "the prompt must be under 256 tokens (the context), got 301"),
    ({"prompt": "\ud800"}, "text must be valid UTF-8"),
    ({"prompt": "a", "task": 1}, "unknown field 'task'; allowed are prompt, messages, id, params"),
    ({"prompt": "a", "id": [1]}, "id must be text or a whole number, got [1]"),
    ({"messages": [{"role": "user"}]}, "messages must be a list of objects"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "no chat template"),
    ({"prompt": "a", "params": [1]}, "params must be a JSON object, got [1]"),
    ({"prompt": "a", "params": {"heat": 1}}, "unknown field 'heat' of params; allowed are max_new_tokens"),
    ({"prompt": "a", "params": {"top_p": 2}}, "top_p must be in (0, 1], got 2"),
    ({"prompt": "a", "params": {"temperature": "hot"}}, "temperature must be a number"),
    ({"prompt": "a", "params": {"ignore_eos": "no"}}, "ignore_eos must be True or False"),
    ({"prompt": "a", "params": {"logit_bias": {"x": 1}}}, "params must have values of the right types"),
    ({"prompt": "a", "params": {"logit_bias": [1]}}, "params must have values of the right types"),
    ({"prompt": "a", "params": {"stop_token_ids": [999]}}, "must be in 0..257, got 999"),
]


def test_bad_lines_are_told_and_skipped(generate: Generate, output: Path, tmp_path: Path) -> None:
    lines: list[object] = [{"prompt": "first", "id": 0}]
    for line, _ in BAD:
        lines += [line, "", {"prompt": "between"}]
    file = write(tmp_path / "lines.jsonl", lines)
    ran = generate("--max-new-tokens", 3, "--ignore-eos", prompts=file)
    assert (ran.status, ran.out) == (1, "")
    results = read(output)
    assert len(results) == 1 + 2 * len(BAD)
    told = ran.err.splitlines()
    assert told[-1].startswith(f"{len(results)} lines, {len(BAD)} failed, {3 * (1 + len(BAD))} tokens")
    for number, (_, fragment) in enumerate(BAD):
        bad, good = results[1 + 2 * number : 3 + 2 * number]
        assert bad["line"] == 2 + 3 * number
        assert fragment in bad["error"]
        assert told[number] == f"error: line {bad['line']}: {bad['error']}"
        assert good["num_new_tokens"] == 3
    # The errors count as results, and keep counting.
    again = generate("--max-new-tokens", 3, "--ignore-eos", prompts=file)
    assert again.status == 1
    assert again.err.startswith(f"{len(results)} lines ({len(results)} by an earlier run), {len(BAD)} failed, 0 tokens")


def test_line_that_is_no_utf8_is_a_bad_line(generate: Generate, output: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "caf\xe9"}\n{"prompt": "b"}')
    assert generate("--max-new-tokens", 2, prompts=file).status == 1
    assert ["error" in result for result in read(output)] == [False, True, False]


def test_request_that_fails_while_decoded_is_told_and_the_others_go_on(
    generate: Generate, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose_or_fail(logits: Tensor, params: SamplingParams, *, prefix: Prefix, drafted: Sequence[int]) -> int:
        if params.top_k == 7 and prefix.num_tokens - prefix.num_prompt_tokens == 3:
            raise ArithmeticError("no number")
        return choose(logits, params, prefix=prefix, drafted=drafted)

    monkeypatch.setattr("kangaroo.engine.step.choose", choose_or_fail)
    lines: list[object] = [{"prompt": "a", "params": {"top_k": top_k}} for top_k in (5, 7, 9)]
    file = write(tmp_path / "lines.jsonl", lines)
    ran = generate("--max-new-tokens", 12, "--temperature", 1, "--ignore-eos", "--drafter", "plain", prompts=file)
    assert ran.status == 1
    assert ran.err.startswith("error: line 2: no number\n3 lines, 1 failed, 27 tokens")
    assert [(one["finish_reason"], one["num_new_tokens"]) for one in read(output)] == [
        ("length", 12),
        ("error", 3),
        ("length", 12),
    ]


def test_several_texts_of_a_line(generate: Generate, output: Path, tmp_path: Path) -> None:
    lines: list[object] = [{"prompt": "a", "params": {"n": 1}}, {"prompt": "b"}, {"prompt": "b"}]
    file = write(tmp_path / "lines.jsonl", lines)
    assert generate("-n", 3, "--temperature", 1, "--max-new-tokens", 4, prompts=file).status == 0
    one, *several = read(output)
    assert one["index"] == 0
    for result in several:
        assert list(result) == ["line", "request_sha256", "completions"]
        assert [completion["index"] for completion in result["completions"]] == [0, 1, 2]
    assert len({completion["seed"] for result in several for completion in result["completions"]}) == 6


def test_chats(run: Run, make_model: MakeModel, output: Path, tmp_path: Path) -> None:
    folder = make_model()
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = write(tmp_path / "chats.jsonl", [{"messages": messages}, {"prompt": "hey"}])
    argv = ["generate", "--model", folder, "--prompts", file, "--output", output, "--max-new-tokens", 1]
    assert run(*argv, "--chat", "--system", "be").status == 0
    assert [one["num_prompt_tokens"] for one in read(output)] == [len("u:hi;a:ho;"), len("s:be;u:hey;")]


def test_many_lines_that_cannot_begin_do_not_end_the_run(
    generate: Generate, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MAX_HELD", 3)
    file = write(tmp_path / "lines.jsonl", [*["{"] * 10, {"prompt": "a"}])
    assert generate("--max-new-tokens", 2, prompts=file).status == 1
    assert ["error" in result for result in read(output)] == [*[True] * 10, False]


def check_refused(ran: Ran, fragment: str) -> None:
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert fragment in ran.err


def test_output_of_other_prompts_or_settings_is_refused_and_kept(
    generate: Generate, prompts: Path, output: Path, tmp_path: Path
) -> None:
    generate("--max-new-tokens", 2)
    content = output.read_bytes()
    lines = prompts.read_text(encoding="utf-8").splitlines()
    changed = write(tmp_path / "changed.jsonl", [*lines[:4], {"prompt": "other"}, *lines[5:]])
    check_refused(generate("--max-new-tokens", 2, prompts=changed), "line 5, is not the result of these prompts")
    shorter = write(tmp_path / "shorter.jsonl", list(lines[:4]))
    check_refused(generate("--max-new-tokens", 2, prompts=shorter), "line 5, is not the result of these prompts")
    check_refused(generate("--max-new-tokens", 3), "line 1, is not the result of these prompts under these settings")
    assert output.read_bytes() == content


@pytest.mark.parametrize("content", ["notes", "notes\n", '{"line": 1}', '{"line": 1, "text": "a"}\n', "[]\n", "\n"])
def test_file_that_is_no_output_is_refused_and_kept(generate: Generate, output: Path, content: str) -> None:
    output.write_text(content, encoding="utf-8")
    check_refused(generate(), "line 1, is not the result of these prompts")
    assert output.read_text(encoding="utf-8") == content


def test_files_that_cannot_be_used(generate: Generate, output: Path, prompts: Path, tmp_path: Path) -> None:
    check_refused(generate(prompts=tmp_path / "none.jsonl"), "No such file")
    check_refused(generate(prompts=write(tmp_path / "empty.jsonl", ["", " "])), "holds no prompt")
    check_refused(generate("--output", prompts), "line 1, is not the result")
    check_refused(generate("--output", tmp_path), "Is a directory")
    check_refused(generate("--output", tmp_path / "none" / "out"), "cannot write")
    assert not output.exists()

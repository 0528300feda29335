"""Questions of Spec-Bench and of other prompt files, which of them are asked, and how bad ones are refused."""

import json
from pathlib import Path

import pytest

from kangaroo.bench.answers import MT_BENCH
from kangaroo.bench.questions import Question, digest, read_questions
from kangaroo.errors import PromptError


def write(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def spec_bench(tmp_path: Path) -> Path:
    """Two questions a category, as in Spec-Bench's file: first those of MT-Bench, which have two turns."""
    categories = [name for name in (*MT_BENCH, "translation", "qa") for _ in range(2)]
    lines = [{"question_id": 81 + i, "category": name, "turns": ["a", "b"] if name in MT_BENCH else ["a"]}
             for i, name in enumerate(categories)]  # fmt: skip
    return write(tmp_path / "question.jsonl", *lines)


def test_spec_bench_lines_keep_their_ids_categories_and_turns(spec_bench: Path) -> None:
    questions = read_questions(spec_bench, category="other")
    assert len(questions) == 20
    assert questions[0] == Question(81, "writing", ("a", "b"))
    assert questions[-1] == Question(100, "qa", ("a",))
    assert [questions[0].task, questions[-1].task] == ["mt_bench", "qa"]


def test_prompts_are_questions_of_one_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"task_id": "HumanEval/0", "prompt": "def f():"}, {"text": "x", "category": "y"})
    found = read_questions(path, category="code")
    assert found == (Question("HumanEval/0", "code", ("def f():",)), Question("2", "y", ("x",)))


@pytest.mark.parametrize(
    ("only", "expected"),
    [(["qa"], [99, 100]), (["translation", "math"], [87, 88, 97, 98]), (["mt_bench"], range(81, 97))],
)
def test_categories_and_tasks_are_kept(spec_bench: Path, only: list[str], expected: list[int]) -> None:
    assert [one.id for one in read_questions(spec_bench, category="other", only=only)] == list(expected)


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [81]), (3, [81, 97, 99]), (5, [81, 82, 97, 98, 99]), (99, range(81, 101))]
)
def test_a_limit_is_spread_over_the_tasks(spec_bench: Path, limit: int, expected: list[int]) -> None:
    assert [one.id for one in read_questions(spec_bench, category="other", limit=limit)] == list(expected)


def test_a_digest_tells_other_questions_and_another_order_apart() -> None:
    one, two = Question(1, "qa", ("a",)), Question(2, "qa", ("a",))
    assert digest([one, two]) == digest([one, two])
    assert len({digest(some) for some in ([one, two], [two, one], [one], [Question("1", "qa", ("a",))])}) == 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"question_id": 1, "turns": ["a"]}, "question 1 is there twice"),
        ({"question_id": 2, "turns": ["a", ""]}, "question 2: turns must be texts that are not empty, got ['']"),
        ({"question_id": 2, "turns": ["a", None]}, "question 2: turns must be texts that are not empty, got [None]"),
        ({"question_id": 2, "prompt": "a", "turns": []}, "question 2: turns must be texts that are not empty, got []"),
        (
            {"question_id": 2, "turns": ["a"], "category": 3},
            "question 2: category must be text that is not empty, got 3",
        ),
    ],
)
def test_bad_questions_are_refused_in_one_line(tmp_path: Path, line: dict[str, object], reason: str) -> None:
    path = write(tmp_path / "q.jsonl", {"question_id": 1, "turns": ["a"]}, line)
    with pytest.raises(PromptError) as refused:
        read_questions(path, category="other")
    assert reason in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_a_category_that_is_not_there_is_refused(spec_bench: Path) -> None:
    with pytest.raises(PromptError, match=r"no category or task 'rag'; it has writing, mt_bench, .*, qa$"):
        read_questions(spec_bench, category="other", only=["qa", "rag"])

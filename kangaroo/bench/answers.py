"""Answer files in Spec-Bench's own format, one JSON object a line, with more fields beside those its scripts read."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kangaroo.errors import PromptError

# What an output folder holds: answers, what was asked how, and what could not be answered.
FOLDER, RUN_FILE, FAILURES_FILE = "answers", "run.json", "failures.jsonl"
# Spec-Bench reports these categories as one task, and every other category as a task of its own.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


class Choice(BaseModel):
    """One answer, a value for every turn; accept_lengths holds the tokens every step of all turns emitted.

    Spec-Bench's: turns to accept_lengths. idxs is what Kangaroo's copy of it calls decoding_steps. new_tokens counts
    the first token too, and wall_time spans prefill, decoding and turning ids into text. The others are a Completion's.
    """

    model_config = ConfigDict(extra="forbid")

    index: int = 0
    turns: list[str]
    idxs: list[int]
    decoding_steps: list[int]
    new_tokens: list[int]
    wall_time: list[float]
    accept_lengths: list[int]
    token_ids: list[list[int]]
    num_prompt_tokens: list[int]
    num_drafted: list[int]
    num_accepted: list[int]
    prefill_time_s: list[float]
    decode_time_s: list[float]
    draft_time_s: list[float]
    verify_time_s: list[float]
    finish_reasons: list[str]


class Answer(BaseModel):
    """What one drafter answered to one question in one run."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    question_id: int | str
    category: str
    answer_id: str
    model_id: str
    choices: list[Choice]
    tstamp: float


def task_of(category: str) -> str:
    """Spec-Bench's task of a question's category; a category it does not know is a task of its own."""
    return "mt_bench" if category in MT_BENCH else category


def answer_file(folder: Path, drafter: str, *, run: int) -> Path:
    """Where the answers of a drafter's run, counted from 1, are kept in an output folder."""
    return folder / FOLDER / f"{drafter}-run-{run}.jsonl"


def append_answer(path: Path, answer: Answer) -> None:
    """Add a line to an answer file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(answer.model_dump(), ensure_ascii=False) + "\n")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file in order; raises PromptError for one that cannot be read or a line that is no answer."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the answers of {path}: {error}") from error
    answers = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                answers.append(Answer.model_validate_json(line))
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(map(str, problem["loc"]))
                raise PromptError(f"{path}, line {number}: no answer ({where}: {problem['msg']}); "
                                  "remove the line, and its question is asked again") from error  # fmt: skip
    return answers

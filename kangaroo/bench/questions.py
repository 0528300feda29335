"""Questions of a benchmark: Spec-Bench's, or any file of prompts."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kangaroo.bench.answers import task_of
from kangaroo.bench.prompts import NAME_FIELDS, Prompt, read_prompts
from kangaroo.errors import PromptError


@dataclass(frozen=True)
class Question:
    """What one user asks in one or more turns, the later ones behind the answers to the former."""

    id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        """The task of Spec-Bench that its category belongs to."""
        return task_of(self.category)


def read_questions(
    path: Path, *, category: str, only: Sequence[str] = (), limit: int | None = None
) -> tuple[Question, ...]:
    """The questions of a file that read_prompts reads, in its order.

    A line with a list of `turns` has these, any other its prompt as the only one. category: of lines that name none.
    only: the categories and tasks to keep, all if empty. limit: how many questions to keep, spread evenly over the
    tasks. Raises PromptError for what read_prompts refuses, for bad turns, for an id that comes twice, and for a
    category that is not there.
    """
    questions = [_read(prompt, category, where=f"{path}, question {prompt.name}") for prompt in read_prompts(path)]
    twice = next((name for name, count in Counter(one.id for one in questions).items() if count > 1), None)
    if twice is not None:
        raise PromptError(f"{path}: question {twice} is there twice; every question needs an id of its own")
    known = dict.fromkeys(name for one in questions for name in (one.category, one.task))
    unknown = next((name for name in only if name not in known), None)
    if unknown is not None:
        raise PromptError(f"{path} has no category or task {unknown!r}; it has {', '.join(known)}")
    kept = [one for one in questions if not only or {one.category, one.task} & set(only)]
    return tuple(kept if limit is None else _spread(kept, limit))


def digest(questions: Sequence[Question]) -> str:
    """Short hash of the questions, their order included."""
    listed = [(one.id, one.category, one.turns) for one in questions]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _read(prompt: Prompt, category: str, *, where: str) -> Question:
    fields = prompt.fields
    turns = fields["turns"] if isinstance(fields.get("turns"), list) else [prompt.text]
    wrong = [turn for turn in turns if not isinstance(turn, str) or not turn]
    if wrong or not turns:
        raise PromptError(f"{where}: turns must be texts that are not empty, got {(wrong or turns)!r:.60}")
    named = fields.get("category", category)
    if not isinstance(named, str) or not named:
        raise PromptError(f"{where}: category must be text that is not empty, got {named!r:.60}")
    # Spec-Bench's scripts expect the very ids of the file, whole numbers included.
    own = next((fields[key] for key in NAME_FIELDS if isinstance(fields.get(key), str | int)), prompt.name)
    return Question(own, named, tuple(turns))


def _spread(questions: Sequence[Question], limit: int) -> list[Question]:
    """The first question of every task, then the second, until there are enough; in their old order."""
    seen: Counter[str] = Counter()
    ranks = []
    for one in questions:
        ranks.append(seen[one.task])
        seen[one.task] += 1
    chosen = sorted(range(len(questions)), key=ranks.__getitem__)[:limit]
    return [questions[index] for index in sorted(chosen)]

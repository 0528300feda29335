"""Lines of prompts and of their results, as JSON: what is allowed, and how far an output file is."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from kangaroo.errors import OutputError, PromptError, SettingsError
from kangaroo.types import Completion, SamplingParams

FIELDS = ("prompt", "messages", "id", "params")


@dataclass(frozen=True)
class Line:
    """A line of the input that is not blank; number counts all lines from 1.

    request_sha256: of the line and of the settings of the run, by which its result is known again.
    """

    number: int
    content: bytes
    request_sha256: str

    @property
    def head(self) -> dict[str, Any]:
        """How its result begins."""
        return {"line": self.number, "request_sha256": self.request_sha256}


@dataclass(frozen=True)
class Progress:
    """What an output file holds: whole lines, how many of them failed, and the bytes they take."""

    num_done: int
    num_failed: int
    num_bytes: int


def read_lines(path: Path, settings: Mapping[str, object]) -> list[Line]:
    """The prompts of a file under the settings of the run; raises PromptError where there are none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read the prompts of {path}: {error.strerror}; give a .jsonl file") from error
    common = sha256(json.dumps(settings, sort_keys=True).encode())
    lines = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            digest = common.copy()
            digest.update(line.strip())
            lines.append(Line(number, line, digest.hexdigest()))
    if not lines:
        raise PromptError(f'{path} holds no prompt; give lines like {{"prompt": "def "}}')
    return lines


def read_progress(path: Path, lines: Sequence[Line]) -> Progress:
    """How far the output of these lines is; a last line cut short counts as not there.

    Raises OutputError where the file holds anything but results of these lines under the same settings.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}; give another --output") from error
    *results, rest = content.split(b"\n")
    num_failed = 0
    for index, result in enumerate(results):
        record = _parse(result) if index < len(lines) else None
        if not isinstance(record, dict) or not record.items() >= lines[index].head.items():
            raise _foreign(path, index)
        num_failed += find_error(record) is not None
    begin = json.dumps(lines[len(results)].head)[:-1].encode() if len(results) < len(lines) else b""
    if not (rest.startswith(begin) if len(rest) > len(begin) > 0 else begin.startswith(rest)):
        raise _foreign(path, len(results))
    return Progress(len(results), num_failed, len(content) - len(rest))


def find_error(result: Mapping[str, Any]) -> str | None:
    """The error that a result tells, of its line or of one of its completions."""
    errors = (one["error"] for one in (result, *result.get("completions", ())) if "error" in one)
    return next(errors, None)


def describe(completions: Sequence[Completion]) -> dict[str, object]:
    """A prompt's completions as the command line's JSON: the fields of the only one, or a list of several."""
    if len(completions) == 1:
        return completions[0].to_dict()
    return {"completions": [one.to_dict() for one in completions]}


def read_fields(content: bytes) -> dict[str, Any]:
    """The fields of a line; raises PromptError where it is not a JSON object with a prompt or messages to continue."""
    fields = _parse(content)
    if not isinstance(fields, dict):
        shown = content.strip().decode("utf-8", errors="replace")
        raise PromptError(f"must be a JSON object in UTF-8, got {shown!r:.60}")
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise PromptError(f"unknown field {unknown[0]!r:.60}; allowed are {', '.join(FIELDS)}")
    if ("prompt" in fields) == ("messages" in fields):
        raise PromptError("must have either a prompt or messages")
    if not isinstance(fields.get("id", ""), str | int):
        raise PromptError(f"id must be text or a whole number, got {fields['id']!r:.60}")
    prompt, messages = fields.get("prompt", "-"), fields.get("messages", [{"role": "", "content": ""}])
    if not isinstance(prompt, str) or not prompt:
        raise PromptError(f"prompt must be text that is not empty, got {prompt!r:.60}")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise PromptError(f"messages must be a list of objects with a role and content as text, got {messages!r:.60}")
    return fields


def override(params: SamplingParams, fields: object) -> SamplingParams:
    """The params with a line's own in place; raises SettingsError for unknown fields and bad values."""
    if not isinstance(fields, dict):
        raise SettingsError(f"params must be a JSON object, got {fields!r:.60}")
    unknown = [name for name in fields if name not in vars(params)]
    if unknown:
        raise SettingsError(f"unknown field {unknown[0]!r:.60} of params; allowed are {', '.join(vars(params))}")
    try:
        if "logit_bias" in fields:
            # The keys of a JSON object are text.
            fields = fields | {"logit_bias": {int(key): value for key, value in fields["logit_bias"].items()}}
        return replace(params, **fields)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"params must have values of the right types, got {fields!r:.120}") from error


def _parse(content: bytes) -> object:
    """The JSON of a line, None where it is none."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _foreign(path: Path, index: int) -> OutputError:
    return OutputError(f"{path}, line {index + 1}, is not the result of these prompts under these settings; "
                       "give another --output, or delete it to begin anew")  # fmt: skip

"""Prompt files: plain text, or JSON lines as HumanEval and Spec-Bench publish them, gzipped or not."""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kangaroo.errors import PromptError
from kangaroo.model.tokenizer import Tokenizer

BUILT_IN = Path(__file__).parents[1] / "assets" / "prompts.txt"
ALLOWED = ".txt, .jsonl or .jsonl.gz"
NAME_FIELDS = ("task_id", "question_id", "id")


@dataclass(frozen=True)
class Prompt:
    """A text to continue, by the name its file gives it, else by its number counted from 1.

    fields: everything its JSON line holds; {} for plain text.
    """

    name: str
    text: str
    fields: dict[str, Any]


def read_prompts(path: Path, *, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file in order, the first `limit` of them if given.

    A .txt file holds prompts separated by blank lines, without the line breaks around them; a .jsonl file one object
    a line, whose prompt is its `prompt`, `text` or `question`, else the first of its Spec-Bench `turns`; either may be
    gzipped. Raises PromptError for a file that cannot be read, a malformed line, or where there is no prompt.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if kind not in (".txt", ".jsonl"):
        raise PromptError(f"unsupported prompt file {path}; give {ALLOWED}")
    text = _read_text(path)
    prompts = _split_text(text) if kind == ".txt" else _read_lines(text, path)
    if not prompts:
        raise PromptError(f"{path} holds no prompt; give {ALLOWED} with at least one")
    return prompts[:limit]


def spread_prompts(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """At most limit of the prompts, evenly spread over all of them, in order; the first is the first's."""
    count = min(limit, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, *, max_tokens: int) -> list[int]:
    """Its tokens; raises PromptError unless they are 1..max_tokens, for which the context has room."""
    try:
        ids = tokenizer.encode(prompt.text)
    except PromptError as error:
        raise PromptError(f"prompt {prompt.name}: {error}") from error
    if not 0 < len(ids) <= max_tokens:
        raise PromptError(f"prompt {prompt.name} must be 1..{max_tokens} tokens for the context to hold the text, "
                          f"got {len(ids)}; leave it out or change it")  # fmt: skip
    return ids


def _read_text(path: Path) -> str:
    try:
        content = path.expanduser().read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except OSError as error:
        raise PromptError(f"cannot read the prompts of {path}: {error.strerror or error}; give {ALLOWED}") from error
    except (EOFError, zlib.error) as error:
        raise PromptError(f"cannot read the prompts of {path}: damaged gzip ({error}); fetch it again") from error
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        at = f"byte {error.start} ({content[error.start]:#04x})"
        raise PromptError(f"the prompts of {path} must be UTF-8, got {at}; convert the file") from error


def _split_text(text: str) -> list[Prompt]:
    """Blocks between blank lines; indentation of a block's first line is the prompt's own."""
    blocks = [block.strip("\n") for block in re.split(r"\n(?:[ \t]*\n)+", text)]
    blocks = [block for block in blocks if block.strip()]
    return [Prompt(str(number), block, {}) for number, block in enumerate(blocks, start=1)]


def _read_lines(text: str, path: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    # Only a line feed ends a line here: JSON text may hold the other separators of str.splitlines().
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: malformed JSON ({error})") from error
        if not isinstance(fields, dict):
            raise PromptError(f"{where}: must be a JSON object, got {type(fields).__name__}")
        name = next((fields[key] for key in NAME_FIELDS if isinstance(fields.get(key), str | int)), len(prompts) + 1)
        prompts.append(Prompt(str(name), _text_of(fields, where=where), fields))
    return prompts


def _text_of(fields: dict[str, Any], *, where: str) -> str:
    key = next((key for key in ("prompt", "text", "question", "turns") if key in fields), None)
    if key is None:
        raise PromptError(
            f"{where}: must have a prompt, text, question or turns field, got {', '.join(fields) or 'none'}"
        )
    text = fields[key]
    if key == "turns":
        text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str) or not text:
        raise PromptError(f"{where}: {key} must hold text that is not empty, got {text!r:.60}")
    return text

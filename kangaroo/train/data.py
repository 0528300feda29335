"""Training data: files and folders into documents, documents into windows, windows into batches.

A document is a run of token ids with a loss mask, True where the token is one to learn to predict. Documents
are laid end to end and cut into windows of T + 1 tokens (T predictions); B windows make a batch.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kangaroo.errors import DataError, PromptError
from kangaroo.model.tokenizer import Tokenizer

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst"})
SOURCE_SUFFIXES = frozenset(
    {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".js", ".ts",
     ".jsx", ".tsx", ".rb", ".php", ".swift", ".cs", ".sh", ".sql", ".lua", ".r", ".jl", ".hs", ".ml", ".pl"}
)  # fmt: skip
ALLOWED = ".txt, .jsonl, .md, .rst or a source suffix such as .py"
MAX_SOURCE_FILE = 1 << 20  # bytes; a larger source file met in a folder is most likely generated
HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class Document:
    """tokens: [n] int32; mask: [n] bool, True where the token is predicted with loss."""

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Corpus:
    """Documents in reading order, and how many files of folders were passed over, by the reason."""

    documents: tuple[Document, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def skipped_note(self) -> str:
        """What was passed over, in words; empty where nothing was."""
        counts = [f"{count} {'file' if count == 1 else 'files'} {reason}" for reason, count in self.skipped.items()]
        return f"skipped {' and '.join(counts)}" if counts else ""


def read_corpus(
    paths: Sequence[Path], tokenizer: Tokenizer, *, eos_id: int | None = None,
    track: Callable[[Sequence[tuple[Path, bool]]], Iterable[tuple[Path, bool]]] = iter
) -> Corpus:  # fmt: skip
    """Read files and folders; eos_id closes every plain document, while a chat ends as its template says.

    A folder is walked in sorted order without hidden entries; large source files and files that are no UTF-8
    are counted and passed over there. track: passes on the files, as a progress bar does, each with whether it was
    found in a folder. Raises DataError for a missing path, an unsupported file, a malformed line, or where nothing was
    found.
    """
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    files: list[tuple[Path, bool]] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"no such data file or folder: {path}; give {ALLOWED}, or a folder of those")
        files += [(file, path.is_dir()) for file in _files(path)]
    for file, within_folder in track(files):
        found = _read_file(file, tokenizer, eos_id=eos_id, within_folder=within_folder)
        if isinstance(found, str):
            skipped[found] += 1
        else:
            documents += found
    corpus = Corpus(tuple(documents), skipped)
    if not documents:
        names, note = ", ".join(str(path) for path in paths), corpus.skipped_note()
        raise DataError(f"{names} holds no text to learn from{f' ({note})' if note else ''}; "
                        f"give {ALLOWED}, or a folder of those")  # fmt: skip
    return corpus


def _files(path: Path) -> Iterator[Path]:
    """The path itself, or a folder's readable files in sorted order."""
    known = TEXT_SUFFIXES | SOURCE_SUFFIXES | {".jsonl"}
    if not path.is_dir():
        if path.suffix.lower() not in known:
            raise DataError(f"unsupported data file {path}; give {ALLOWED}, or a folder of those")
        yield path
        return
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in known:
                yield Path(folder) / name


def _read_file(path: Path, tokenizer: Tokenizer, *, eos_id: int | None, within_folder: bool) -> list[Document] | str:
    """The documents of one file, or why a folder's file is passed over."""
    suffix = path.suffix.lower()
    is_jsonl = suffix == ".jsonl"
    try:
        if within_folder and suffix in SOURCE_SUFFIXES and path.stat().st_size > MAX_SOURCE_FILE:
            return f"over {MAX_SOURCE_FILE >> 20} MiB"
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if within_folder and not is_jsonl:
            return "not in UTF-8"
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not is_jsonl:
        return [plain_document(text, tokenizer, eos_id=eos_id)] if text.strip() else []
    documents: list[Document] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            documents += _read_line(line, tokenizer, eos_id=eos_id, where=f"{path}, line {number}")
    return documents


def _read_line(line: str, tokenizer: Tokenizer, *, eos_id: int | None, where: str) -> list[Document]:
    """The documents of one JSON line with "text" or "messages"."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}; repair or remove the line") from error
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return [plain_document(record["text"], tokenizer, eos_id=eos_id)] if record["text"].strip() else []
    if isinstance(record, dict) and _is_conversation(record.get("messages")):
        try:
            return chat_documents(record["messages"], tokenizer)
        except PromptError as error:
            raise DataError(f"{where}: {error}") from error
    raise DataError(f'{where}: give an object with a string "text", or with "messages", a list of objects '
                    'with string "role" and "content"')  # fmt: skip


def _is_conversation(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )


def plain_document(text: str, tokenizer: Tokenizer, *, eos_id: int | None) -> Document:
    """A text under the checkpoint's own rule for BOS, then EOS; its first token follows nothing, so no loss."""
    ids = tokenizer.encode(text) + ([] if eos_id is None else [eos_id])
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[:1] = False
    return Document(np.array(ids, dtype=np.int32), mask)


def chat_documents(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> list[Document]:
    """A conversation under the chat template, with the loss on what the assistant wrote.

    A template may write an earlier turn otherwise once others follow (Qwen 3 drops its reasoning); then every
    assistant turn becomes a document of its own, as it stands when it is generated. Raises PromptError where
    there is no template or it refuses the messages.
    """
    turns = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not turns:
        return []
    prompts = [tokenizer.render_chat(messages[:i], add_generation_prompt=True) for i in turns]
    ends = [tokenizer.render_chat(messages[: i + 1], add_generation_prompt=False) for i in turns]
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    if all(whole.startswith(text) for text in (*prompts, *ends)):
        return [_masked(whole, list(zip(prompts, ends, strict=True)), tokenizer=tokenizer)]
    return [_masked(end, [(prompt, end)], tokenizer=tokenizer) for prompt, end in zip(prompts, ends, strict=True)]


def _masked(text: str, spans: Iterable[tuple[str, str]], *, tokenizer: Tokenizer) -> Document:
    """text with loss between each span's prompt and end, both beginnings of text."""
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.bool_)
    for prompt, end in spans:
        first, last = (_shared_prefix(ids, beginning, tokenizer=tokenizer) for beginning in (prompt, end))
        mask[first:last] = True
    mask[:1] = False
    return Document(ids, mask)


def _shared_prefix(ids: npt.NDArray[np.int32], text: str, *, tokenizer: Tokenizer) -> int:
    """How many leading ids the text alone encodes to as well."""
    own = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)[: len(ids)]
    differs = np.flatnonzero(own != ids[: len(own)])
    return int(differs[0]) if len(differs) else len(own)


class Windows:
    """Windows of T + 1 tokens of one stream, each starting on the last token of the one before."""

    def __init__(self, documents: Sequence[Document], sequence_length: int) -> None:
        """Windows without a single token to predict are left out."""
        self.sequence_length = sequence_length
        self._tokens = np.concatenate([np.empty(0, np.int32), *(document.tokens for document in documents)])
        self._mask = np.concatenate([np.empty(0, np.bool_), *(document.mask for document in documents)])
        starts = range(0, len(self._tokens) - sequence_length, sequence_length)
        kept = [start for start in starts if self._mask[start + 1 : start + sequence_length + 1].any()]
        self._starts = np.array(kept, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def max_token(self) -> int:
        return int(self._tokens.max(initial=0))

    def digest(self) -> str:
        """Short hash of the stream and its mask."""
        content = hashlib.sha256(self._tokens.tobytes())
        content.update(self._mask.tobytes())
        return content.hexdigest()[:16]

    def at(self, indices: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Windows [B, T + 1] int64 and the mask [B, T] of their predicted tokens."""
        columns = self._starts[indices][:, None] + np.arange(self.sequence_length + 1)
        tokens = torch.from_numpy(self._tokens[columns].astype(np.int64))
        return tokens, torch.from_numpy(self._mask[columns[:, 1:]])


class Dataset:
    """A corpus split into training and held-out windows; every batch is a function of (seed, step) alone."""

    def __init__(self, corpus: Corpus, *, sequence_length: int) -> None:
        """Documents are held out by a hash of their content, so duplicates stay on one side.

        Where that leaves a side without a window (one long document, say), the end of the stream is held out.
        Raises DataError where two windows cannot be filled.
        """
        self.num_documents, self.num_skipped = len(corpus.documents), corpus.num_skipped
        sides: tuple[list[Document], list[Document]] = ([], [])
        for document in corpus.documents:
            sides[_is_held_out(document)].append(document)
        self.train, self.held_out = (Windows(side, sequence_length) for side in sides)
        if not (len(self.train) and len(self.held_out)):
            pieces = _cut(corpus.documents, sequence_length)
            self.train, self.held_out = (Windows([piece], sequence_length) for piece in pieces)
        if not (len(self.train) and len(self.held_out)):
            num_learned = sum(int(document.mask.sum()) for document in corpus.documents)
            raise DataError(f"the data holds {self.num_tokens} tokens, {num_learned} of them to learn: too few for two "
                            f"windows of {sequence_length}; give more data or a smaller --sequence-length")  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens + self.held_out.num_tokens

    def digest(self) -> str:
        """Short hash of everything a batch can hold."""
        return self.train.digest() + self.held_out.digest()

    def batch(self, batch_size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Training windows [B, T + 1] and mask [B, T] of a step; every epoch is shuffled anew."""
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = np.divmod(places, len(self.train))
        orders = {epoch: _shuffled(len(self.train), seed=seed, epoch=epoch) for epoch in set(epochs.tolist())}
        indices = [orders[e][p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)]
        return self.train.at(np.array(indices, dtype=np.int64))


@lru_cache(maxsize=4)
def _shuffled(num_windows: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(num_windows)


def _is_held_out(document: Document) -> bool:
    digest = hashlib.sha256(document.tokens.tobytes()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _cut(documents: Sequence[Document], sequence_length: int) -> tuple[Document, Document]:
    """The whole stream before and after the point that holds out its end, at least one window of it."""
    tokens = np.concatenate([document.tokens for document in documents])
    mask = np.concatenate([document.mask for document in documents])
    place = max(0, len(tokens) - max(sequence_length + 1, int(HELD_OUT_SHARE * len(tokens))))
    return Document(tokens[:place], mask[:place]), Document(tokens[place:], mask[place:])

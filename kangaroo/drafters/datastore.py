"""A corpus kept for lookup: its token ids and their suffix array, in memory-mapped files.

The store of REST (He et al. 2023, arXiv 2311.08252). Documents stand end to end, each closed by a sentinel (the
vocabulary's size, which is no token), so that no match and no continuation crosses from one into the next. Token ids
are kept big-endian: comparing their bytes compares their numbers, and a lookup is a bisection over byte strings.
Shapes: S token ids of the corpus, its sentinels included.
"""

import hashlib
import json
import shutil
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from kangaroo.errors import DatastoreError, OutputError

HEADER_FILE, TOKENS_FILE, SUFFIXES_FILE = "datastore.json", "tokens.npy", "suffixes.npy"
_ADVICE = "build it again with `kangaroo datastore build`"

Array = NDArray[Any]


class Header(BaseModel):
    """What a datastore was built for and from; num_tokens leaves the sentinels out, sha256 is by file name."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    vocab_size: int
    tokenizer_fingerprint: str
    num_documents: int
    num_tokens: int
    sha256: dict[str, str]


class Datastore:
    """A corpus in which the places of any run of tokens are found."""

    def __init__(self, tokens: Array, suffixes: Array, *, header: Header) -> None:
        """tokens: [S], big-endian; suffixes: [S], the suffix array of tokens."""
        self.header = header
        self._tokens = tokens
        self._suffixes = suffixes
        # Views for bisecting: an item of these takes a fraction of the time of an item of the arrays.
        self._bytes = tokens.view(np.uint8).data
        self._places = suffixes.data

    @classmethod
    def open(cls, folder: str | Path, *, vocab_size: int, fingerprint: str) -> "Datastore":
        """Map a datastore into memory, once its checksums have been verified.

        fingerprint: of the tokenizer. Raises DatastoreError where the folder is missing or damaged, or was built for
        another vocabulary.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise DatastoreError(f"no datastore folder {folder}; build one with `kangaroo datastore build`")
        header = _read_header(folder / HEADER_FILE)
        if (header.vocab_size, header.tokenizer_fingerprint) != (vocab_size, fingerprint):
            raise DatastoreError(f"{folder} was built for another tokenizer or vocabulary; build one for this model")
        tokens, suffixes = (_map(folder / name, header) for name in (TOKENS_FILE, SUFFIXES_FILE))
        return cls(tokens, suffixes, header=header)

    def find(self, context: SequenceOf[int], *, min_ngram: int, max_ngram: int) -> tuple[int, range]:
        """The length of the context's longest suffix that the corpus holds, and its places in the suffix array.

        Length 0 and no place where not even the last min_ngram tokens occur.
        """
        pattern = np.array(context[-max_ngram:], dtype=self._tokens.dtype).tobytes()
        width = self._tokens.itemsize
        shortest, longest, place = min_ngram - 1, len(pattern) // width, -1
        # What holds a run of tokens holds its every suffix, so lengths are bisected too.
        while shortest < longest:
            length = (shortest + longest + 1) // 2
            found = self._find_first(pattern[-length * width :])
            if found >= 0:
                shortest, place = length, found
            else:
                longest = length - 1
        if place < 0:
            return 0, range(0)
        pattern = pattern[-longest * width :]
        return longest, range(place, bisect_right(self._places, pattern, lo=place, key=self._reader(len(pattern))))

    def continuations(self, length: int, places: range, *, num_tokens: int, max_matches: int) -> list[list[int]]:
        """At most num_tokens tokens behind each of max_matches matches, spread evenly over all places of find()."""
        if len(places) > max_matches:
            chosen = [places[index * len(places) // max_matches] for index in range(max_matches)]
            starts = self._suffixes[chosen]
        else:
            starts = self._suffixes[places.start : places.stop]
        columns = starts.astype(np.int64)[:, None] + np.arange(length, length + num_tokens)
        rows = self._tokens[np.minimum(columns, len(self._tokens) - 1)].tolist()
        sentinel = self.header.vocab_size
        return [row[: row.index(sentinel)] if sentinel in row else row for row in rows]

    def _find_first(self, pattern: bytes) -> int:
        """The first place in the suffix array of a suffix that begins with these bytes, -1 where there is none."""
        read = self._reader(len(pattern))
        place = bisect_left(self._places, pattern, key=read)
        return place if place < len(self._places) and read(self._places[place]) == pattern else -1

    def _reader(self, num_bytes: int) -> Callable[[int], bytes]:
        """What gives the first bytes of a suffix."""
        content, width = self._bytes, self._tokens.itemsize
        return lambda suffix: content[suffix * width : suffix * width + num_bytes].tobytes()


def build_datastore(documents: Iterable[Array], output: str | Path, *, vocab_size: int, fingerprint: str) -> Header:
    """Sort the suffixes of documents (token ids, [n] each) by libdivsufsort and write the datastore in one step.

    A datastore that output holds is replaced. fingerprint: of the tokenizer. Raises OutputError where output cannot be
    written or holds anything else, DatastoreError where there are no tokens, an unknown one, or no pydivsufsort.
    """
    output = Path(output).resolve()
    check_output(output)
    documents = [document for document in documents if len(document)]
    if not documents:
        raise DatastoreError("the corpus is empty; give at least one document with text")
    lowest, highest = min(int(one.min()) for one in documents), max(int(one.max()) for one in documents)
    if lowest < 0 or highest >= vocab_size:
        raise DatastoreError(f"token ids must be in 0..{vocab_size - 1}, the model's vocabulary, "
                             f"got {lowest if lowest < 0 else highest}")  # fmt: skip
    kind = np.uint16 if vocab_size <= np.iinfo(np.uint16).max else np.uint32
    tokens = np.concatenate([part.astype(kind) for one in documents for part in (one, np.array([vocab_size]))])
    suffixes = _sort_suffixes(tokens)
    with _replacing(output) as folder:
        np.save(folder / TOKENS_FILE, tokens.astype(tokens.dtype.newbyteorder(">")))
        np.save(folder / SUFFIXES_FILE, suffixes)
        header = Header(
            vocab_size=vocab_size,
            tokenizer_fingerprint=fingerprint,
            num_documents=len(documents),
            num_tokens=len(tokens) - len(documents),
            sha256={name: _checksum(folder / name) for name in (TOKENS_FILE, SUFFIXES_FILE)},
        )
        (folder / HEADER_FILE).write_text(json.dumps(header.model_dump(), indent=2) + "\n", encoding="utf-8")
    return header


def check_output(output: Path) -> None:
    """Raise OutputError unless a datastore can be written here: over another one, to an empty folder, or a new one."""
    output = output.resolve()
    try:
        names = {path.name for path in output.iterdir()} if output.exists() else set()
        with tempfile.TemporaryFile(dir=next(folder for folder in output.parents if folder.exists())):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error.strerror or error}; give another --output") from error
    if names and (HEADER_FILE not in names or names - {HEADER_FILE, TOKENS_FILE, SUFFIXES_FILE}):
        raise OutputError(f"{output} holds more than a datastore, which would be lost; give another --output")


def _sort_suffixes(tokens: Array) -> Array:
    """The suffix array [S] of tokens, in the narrowest type that counts them."""
    try:
        library = import_module("pydivsufsort")
    except ImportError as error:
        raise DatastoreError(f"building a datastore needs pydivsufsort ({error}); "
                             "install it, or kangaroo-decoding[retrieval]") from error  # fmt: skip
    suffixes: Array = library.divsufsort(tokens)
    return suffixes.astype(np.uint32 if len(tokens) <= np.iinfo(np.uint32).max else np.uint64)


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A new folder beside output that takes its place at the end of the block, and is gone after an error."""
    fresh, old = (output.with_name(f".{output.name}.{state}") for state in ("unfinished", "replaced"))
    try:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        if output.exists():
            output.rename(old)
        fresh.rename(output)
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error.strerror or error}; give another --output") from error
    finally:
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _read_header(path: Path) -> Header:
    try:
        return Header.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DatastoreError(f"{path.parent} is no datastore: {path.name}: {error.strerror}; {_ADVICE}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DatastoreError(f"{path} is damaged: {where or 'JSON'}: {first['msg']}; {_ADVICE}") from error


def _map(path: Path, header: Header) -> Array:
    """The array of a file whose checksum is the header's."""
    try:
        if _checksum(path) != header.sha256.get(path.name):
            raise DatastoreError(f"{path} is damaged: its content does not match its checksum; {_ADVICE}")
        # A plain array over the mapping: every operation on a np.memmap runs Python code of its own.
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DatastoreError(f"{path} is damaged: {error}; {_ADVICE}") from error


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

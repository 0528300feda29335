"""What a file must pass to enter a corpus, and how it looks then: filters, benchmark windows, near duplicates."""

import ast
import gzip
import json
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from sources import Source

Signature = npt.NDArray[np.uint64]

MIN_FILE, MAX_FILE = 300, 200_000
MAX_LINE, MAX_MEAN_LINE = 400, 80
MAX_TABLE_SHARE = 0.35  # digits, quotes, commas and backslashes, of all bytes
MAX_LITERAL_SHARE = 0.45  # string literals that are not docstrings, of all characters
WINDOW = 60  # bytes without whitespace that a file may not have in common with a benchmark problem
NEAR_DUPLICATE = 0.7  # equal values of two signatures, an estimate of the share of lines in common
BANDS, ROWS = 16, 4

# Bundled copies come under their own licence, which the distribution's metadata does not state.
BUNDLED_DIRS = {"_vendor", "vendor", "vendored", "_vendored", "extern", "_extern", "externals", "third_party"}
DATA_PATHS = ("cfnlint/data/", "lib2to3/tests/data/", "pydoc_data/")
TEST_DIRS = {"test", "tests", "idle_test", "_tests"}
RESTRICTIVE_NOTICE = re.compile(
    r"GNU (Lesser |Library |Affero )?General Public|Mozilla Public License|\b[AL]?GPL|proprietary rights",
    re.I,
)
GENERATED = re.compile(
    r"do not (manually )?edit|auto-?(matically )?generated|generated (by|from|automatically|code|file|with)"
    r"|@generated|code ?gen(erated)? by",
    re.I,
)
LICENCE_WORDS = re.compile(r"copyright|licen[sc]e|all rights reserved|\(c\)", re.I)


@dataclass
class Document:
    """One accepted file: its normalised text, the UTF-8 bytes of it, and its MinHash signature."""

    distribution: str
    path: str
    text: str
    size: int
    signature: Signature

    @property
    def key(self) -> str:
        """A name of the file that is the same on every machine."""
        return f"{self.distribution}/{self.path}"

    @property
    def is_test(self) -> bool:
        """Whether the file is a test, judged by its path."""
        path = PurePosixPath(self.path)
        in_tests = bool(TEST_DIRS.intersection(path.parts[:-1]))
        return in_tests or path.name.startswith("test_") or path.name in {"conftest.py", "tests.py"}


def examine(source: Source, *, benchmark: Path | None) -> Document | str:
    """Read one file: the document to keep, or the reason for its removal."""
    problem = path_problem(source.path)
    if problem:
        return problem
    try:
        data = Path(source.location).read_bytes()
        raw = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return "unreadable"
    if not MIN_FILE <= len(data) <= MAX_FILE:
        return "size"
    text = normalise(raw)
    problem = head_problem(raw) or shape_problem(text) or benchmark_problem(text, benchmark)
    return problem or Document(source.distribution, source.path, text, len(text.encode()), signature(text))


def path_problem(path: str) -> str | None:
    """Why the place of a file speaks against it, or None."""
    if BUNDLED_DIRS.intersection(PurePosixPath(path).parts):
        return "bundled_third_party"
    return "data_directory" if any(part in path for part in DATA_PATHS) else None


def head_problem(raw: str) -> str | None:
    """Why the head of a file speaks against it, or None."""
    if RESTRICTIVE_NOTICE.search(raw[:4000]):
        return "restrictive_notice"
    head = "\n".join(line for line in raw[:1500].split("\n") if line.lstrip().startswith(("#", '"""', "'''")))
    return "generated" if GENERATED.search(head) else None


def shape_problem(text: str) -> str | None:
    """Why the form of a normalised file speaks against it, or None."""
    data, lines = text.encode(), text.split("\n")
    if len(data) < MIN_FILE:
        return "size"
    if max(map(len, lines)) > MAX_LINE or len(text) / len(lines) >= MAX_MEAN_LINE:
        return "long_lines"
    if 1 - len(data.translate(None, b"0123456789'\",\\")) / len(data) > MAX_TABLE_SHARE:
        return "data_table"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not_this_python"
    # Walking the tree is the slow part, so only files with many quotes take it.
    quotes = text.count('"') + text.count("'")
    is_table = quotes > 0.03 * len(text) and literal_length(tree) > MAX_LITERAL_SHARE * len(text)
    return "string_table" if is_table else None


def literal_length(tree: ast.Module) -> int:
    """The characters inside string literals other than docstrings."""
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            total += len(node.value)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            total -= len(node.value.value)
    return total


def normalise(raw: str) -> str:
    """Unix line ends, no trailing whitespace, no licence header, one final newline."""
    lines = [line.rstrip() for line in raw.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return "\n".join(strip_licence_header(lines)).strip("\n") + "\n"


def strip_licence_header(lines: list[str]) -> list[str]:
    """Drop the leading comment blocks that state copyright or licence, keep the other ones."""
    end = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    blocks: list[list[str]] = [[]]
    for line in lines[:end]:
        blocks[-1].append(line)
        if not line:
            blocks.append([])
    kept = [line for block in blocks if not LICENCE_WORDS.search("\n".join(block)) for line in block]
    return kept + lines[end:]


def windows(text: str) -> Iterator[bytes]:
    """All windows of WINDOW bytes of the text in lower case without any whitespace."""
    data = "".join(text.lower().split()).encode()
    return (data[i : i + WINDOW] for i in range(len(data) - WINDOW + 1))


@cache  # every worker reads the benchmark once
def benchmark_windows(path: Path) -> frozenset[bytes]:
    """The windows of every solution and every problem docstring in a HumanEval-format file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    found: set[bytes] = set()
    for problem in problems:
        found.update(windows(problem["canonical_solution"]))
        for node in ast.walk(ast.parse(problem["prompt"] + problem["canonical_solution"])):
            if isinstance(node, ast.FunctionDef):
                found.update(windows(ast.get_docstring(node, clean=False) or ""))
    return frozenset(found)


def benchmark_problem(text: str, benchmark: Path | None) -> str | None:
    """Whether a file shares a window with a problem of the benchmark."""
    if benchmark is None or benchmark_windows(benchmark).isdisjoint(windows(text)):
        return None
    return "shares_text_with_benchmark"


@cache
def permutations() -> tuple[Signature, Signature]:
    """The multipliers and offsets of the MinHash functions; fixed, so that a corpus can be built again."""
    generator = np.random.default_rng(20240229)
    high = np.iinfo(np.uint32).max
    multipliers = generator.integers(1, high, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return multipliers, generator.integers(0, high, BANDS * ROWS, dtype=np.uint64)


def signature(text: str) -> Signature:
    """The MinHash signature of the set of lines of a file."""
    lines = {line.strip() for line in text.split("\n")}
    hashes = np.array([zlib.crc32(line.encode()) for line in lines if len(line) > 7] or [0], np.uint64)
    multipliers, offsets = permutations()
    # The high bits of a product modulo 2**64 depend on all bits of the input; the low ones do not.
    mixed = hashes[:, None] * multipliers[None, :] * np.uint64(0x9E3779B97F4A7C15) + offsets
    smallest: Signature = (mixed >> np.uint64(32)).min(axis=0)
    return smallest


def without_near_duplicates(documents: Iterable[Document]) -> list[Document]:
    """The first of each group of equal or nearly equal files."""
    buckets: dict[tuple[int, bytes], list[Document]] = defaultdict(list)
    kept = []
    for document in documents:
        bands = [(i, document.signature[i * ROWS : (i + 1) * ROWS].tobytes()) for i in range(BANDS)]
        rivals = {id(rival): rival for band in bands for rival in buckets[band]}.values()
        if any(np.mean(rival.signature == document.signature) >= NEAR_DUPLICATE for rival in rivals):
            continue
        for band in bands:
            buckets[band].append(document)
        kept.append(document)
    return kept

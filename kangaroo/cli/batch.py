"""A file of prompts decoded together: a result for each line, in the same order, as soon as it is done."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, BinaryIO

from kangaroo.cli.prompt_lines import Line, Progress, describe, find_error, override, read_fields
from kangaroo.errors import KangarooError, OutputError
from kangaroo.types import SamplingParams

if TYPE_CHECKING:
    from kangaroo.engine.decoding import Decoding
    from kangaroo.llm import LLM

# Lines that are under way, or done before an earlier one and so not yet written.
MAX_HELD = 256
# Numbers for derive_seed of the lines' seeds, far from those of a line's completions.
LINE_STREAM = 2**61


@dataclass
class _Job:
    """A line on its way; error is why it could not begin."""

    head: dict[str, Any]
    begun: list[Decoding] = field(default_factory=list)
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return all(decoding.finish_reason is not None for decoding in self.begun)


class Batch:
    """Decodes lines together: the engine is given the next as its slots come free."""

    def __init__(self, llm: LLM, params: SamplingParams, *, encode: Callable[[str], list[int]], num_slots: int) -> None:
        """params: of lines that do not say otherwise; encode: a prompt to token ids; num_slots: of the engine."""
        self._llm = llm
        self._params = params
        self._encode = encode
        self._num_slots = num_slots

    def run(self, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
        """The result of every line, in order, once it and all before it are done; one that fails tells its error."""
        coming, jobs = iter(lines), deque[_Job]()
        try:
            while True:
                while self._llm.engine.scheduler.num_waiting < self._num_slots and len(jobs) < MAX_HELD:
                    line = next(coming, None)
                    if line is None:
                        break
                    jobs.append(self._begin(line))
                if not jobs:
                    return
                if jobs[0].is_done:
                    yield self._finish(jobs.popleft())
                else:
                    self._llm.engine.step()
        finally:
            for decoding in (one for job in jobs for one in job.begun):
                self._llm.engine.cancel(decoding)

    def _begin(self, line: Line) -> _Job:
        job = _Job(line.head)
        try:
            fields = read_fields(line.content)
            if "id" in fields:
                job.head["id"] = fields["id"]
            job.begun = self._submit(fields, number=line.number)
        except KangarooError as error:
            job.error = " ".join(str(error).split())
        return job

    def _submit(self, fields: Mapping[str, Any], *, number: int) -> list[Decoding]:
        from kangaroo.sampling import derive_seed

        params = self._params
        if params.seed is not None:
            params = replace(params, seed=derive_seed(params.seed, LINE_STREAM + number))
        params = override(params, fields.get("params", {}))
        if "prompt" in fields:
            return self._llm.submit(self._encode(fields["prompt"]), params)
        return self._llm.submit(self._llm.model.tokenizer.encode_chat(fields["messages"]), params)

    def _finish(self, job: _Job) -> dict[str, Any]:
        if job.error is not None:
            return job.head | {"error": job.error}
        return job.head | describe([self._llm.completion(one, index=index) for index, one in enumerate(job.begun)])


@dataclass
class Counts:
    """What became of the lines of a file, num_done of them in an earlier run; tokens and time are of this run alone."""

    num_lines: int
    num_done: int
    num_failed: int
    num_new_tokens: int = 0
    wall_time_s: float = 0.0

    def __str__(self) -> str:
        resumed = f" ({self.num_done} by an earlier run)" if self.num_done else ""
        rate = self.num_new_tokens / self.wall_time_s if self.wall_time_s else 0
        return (f"{self.num_lines} lines{resumed}, {self.num_failed} failed, {self.num_new_tokens} tokens, "
                f"{rate:.1f} tokens/s")  # fmt: skip


class Results:
    """The output file, open behind the lines that an earlier run has done."""

    def __init__(self, path: Path, progress: Progress) -> None:
        """Raises OutputError where the file cannot be written."""
        self.path = path
        self.progress = progress
        try:
            self._file: BinaryIO = path.open("ab")
            self._file.truncate(progress.num_bytes)
        except OSError as error:
            raise self._refusal(error) from error

    def write(self, batch: Batch, lines: Sequence[Line]) -> Counts:
        """Decode the lines that are left and append the result of each; errors are reported on stderr as well."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        started_s, num_done = perf_counter(), self.progress.num_done
        counts = Counts(len(lines), num_done, self.progress.num_failed)
        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        with self._file, Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=len(lines), completed=num_done)
            for result in batch.run(lines[num_done:]):
                self._append(result)
                if (error := find_error(result)) is not None:
                    counts.num_failed += 1
                    console.print(f"error: line {result['line']}: {error}")
                counts.num_new_tokens += sum(
                    one.get("num_new_tokens", 0) for one in result.get("completions", [result])
                )
                bar.advance(task)
        counts.wall_time_s = perf_counter() - started_s
        return counts

    def _append(self, result: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(result).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror}; give another --output")

"""`kangaroo datastore`: the corpus that the retrieval drafter (REST) looks its guesses up in."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kangaroo.cli.shared import JsonOption, ModelOption

datastore_app = typer.Typer(help="Keep a corpus for drafting by retrieval (REST).", no_args_is_help=True)


@datastore_app.callback()
def datastore() -> None:
    """Keep a corpus for drafting by retrieval (REST)."""


@datastore_app.command()
def build(
    model: Annotated[str, ModelOption],
    data: Annotated[list[Path], typer.Option(help="A .txt, .jsonl or source file, or a folder; repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder for the datastore; one that is there already is replaced.")],
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Tokenize a corpus as the model does, sort its suffixes and write both as a datastore.

    Needs pydivsufsort, which the extra "retrieval" of kangaroo-decoding installs; drafting from the datastore does not.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kangaroo.drafters.datastore import build_datastore, check_output
    from kangaroo.model.checkpoint import Vocabulary
    from kangaroo.train.data import read_corpus

    started_s = time.perf_counter()
    check_output(output)
    vocabulary = Vocabulary.load(model)
    tokenizer = vocabulary.tokenizer
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        corpus = read_corpus(
            data,
            tokenizer,
            eos_id=min(vocabulary.eos_ids, default=None),
            track=lambda files: bar.track(files, description="files read"),
        )
        bar.add_task("sorting and writing", total=None)
        header = build_datastore((document.tokens for document in corpus.documents), output,
                                 vocab_size=vocabulary.size, fingerprint=tokenizer.fingerprint())  # fmt: skip
    if note := corpus.skipped_note():
        print(note, file=sys.stderr)
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    wall_time_s = time.perf_counter() - started_s
    if json_output:
        report = {"output": str(output), "num_documents": header.num_documents, "num_tokens": header.num_tokens,
                  "num_bytes": num_bytes, "num_skipped_files": corpus.num_skipped,
                  "wall_time_s": wall_time_s}  # fmt: skip
        print(json.dumps(report))
    else:
        print(f"{header.num_tokens:,} tokens of {header.num_documents:,} documents, {num_bytes / 1e6:,.1f} MB, "
              f"in {wall_time_s:.1f} s; written to {output}")  # fmt: skip

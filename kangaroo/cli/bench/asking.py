"""What the verbs that put questions to drafters share: their flags, and the run from questions to report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from kangaroo.cli.drafter_options import drafter_settings
from kangaroo.cli.shared import DrafterName, usage_error
from kangaroo.errors import EngineError
from kangaroo.types import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from kangaroo.bench.questions import Question
    from kangaroo.bench.spec_bench import Asked, SpecBench
    from kangaroo.drafters.settings import Settings

TemplateName = Literal["vicuna", "chatml", "llama3", "alpaca", "checkpoint", "none"]
# Of all questions at most this share may fail.
MAX_FAILED = 0.01
# The drafter that each flag is for.
OWNERS = {"adapter": "kangaroo", "gamma": "kangaroo", "eta": "kangaroo", "num_siblings": "kangaroo",
          "max_nodes": "kangaroo", "heads": "medusa", "skip_layers": "layer_skip", "datastore": "retrieval",
          "draft_model": "draft_model"}  # fmt: skip
# Questions of one task resemble each other, so the time left is told from a long stretch.
ETA_PERIOD_S = 600.0

Drafters = Annotated[
    str,
    typer.Option(
        help=f"Whom to ask, by commas: {', '.join(get_args(DrafterName))}. plain, which the others are compared with, "
        "is added where it is not named."
    ),
]
Output = Annotated[
    Path,
    typer.Option(help="Folder for the answers, the failures and the report. The same command again goes on in it."),
]
Runs = Annotated[int, typer.Option(min=1, help="How often to ask everything.")]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Ask only so many questions, spread evenly over the tasks.", show_default="all"),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of an answer to one turn.")]
Template = Annotated[
    TemplateName | None,
    typer.Option(
        help="How turns and answers become a prompt: as Vicuna, ChatML, Llama 3 or Alpaca were trained, by the "
        "checkpoint's own chat template, or the texts alone.",
        show_default="checkpoint where it has a chat template, else none",
    ),
]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Which texts to draw at a temperature above 0.")]
Adapter = Annotated[
    str | None, typer.Option(help="kangaroo's adapter folder.", show_default="the folder 'adapter' of the model")
]
Gamma = Annotated[
    int | None,
    typer.Option(
        help="kangaroo's most tokens drafted in depth per step. Giving this or one of the next three turns tuned "
        "settings off.",
        show_default="as tuned, else as the adapter recommends, else 6",
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(
        help="kangaroo stops drafting behind a token of less confidence, in [0, 1]; 0 never stops early.",
        show_default="as tuned, else as the adapter recommends, else 0.6",
    ),
]
NumSiblings = Annotated[
    int | None,
    typer.Option(
        help="kangaroo's guesses for the token behind one guess; above 1 drafts are trees.",
        show_default="as tuned, else 1",
    ),
]
MaxNodes = Annotated[
    int | None,
    typer.Option(help="Most tokens a draft of kangaroo holds, its root included.", show_default="as tuned, else 64"),
]
Heads = Annotated[
    str | None, typer.Option(help="medusa's folder of heads.", show_default="the folder 'medusa' of the model")
]
SkipLayers = Annotated[
    str | None, typer.Option(help="layer_skip's skip list.", show_default="skip_layers.json of the model")
]
Datastore = Annotated[
    str | None, typer.Option(help="retrieval's folder.", show_default="the folder 'datastore' of the model")
]
DraftModel = Annotated[
    str | None,
    typer.Option(help="draft_model's folder or hub id.", show_default="the folder 'draft_model' of the model"),
]


@dataclass(frozen=True)
class Flags:
    """What the command line says, beside the questions; settings are the flags of OWNERS by name."""

    model: str
    drafters: str
    settings: Mapping[str, object]
    output: Path
    runs: int
    template: str | None
    params: SamplingParams
    dtype: str | None
    weights: str | None
    device: str
    json_output: bool


def run_bench(bench: str, questions: tuple[Question, ...], *, flags: Flags) -> None:
    """Ask all drafters all questions and write the report; exits with status 1 where too many questions failed.

    Raises EngineError where no question was answered, of which there is nothing to report.
    """
    from rich.console import Console

    from kangaroo.bench.report import render_summary, write_report
    from kangaroo.bench.spec_bench import Plan, SpecBench
    from kangaroo.model.checkpoint import load_model

    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    drafters = _choose_drafters(flags, notes)
    with notes.status("loading the model"):
        loaded = load_model(flags.model, dtype=flags.dtype, weights=flags.weights, device=flags.device)
        storage = flags.weights or flags.dtype or "float32"
        plan = Plan(bench, questions, drafters, flags.params, flags.runs, storage, flags.template)
        asking = SpecBench(loaded, plan, output=flags.output)
    if asking.num_done:
        notes.print(f"going on in {flags.output}: {asking.num_done} of {asking.num_wanted} answers are there")
    failed = [one for one in _follow(asking.ask_all(), asking) if one.reason is not None]
    if len(failed) == asking.num_wanted:
        raise EngineError(f"all questions failed, the first because: {failed[0].reason}; see {flags.output}")
    report = write_report(flags.output, tokenizer=loaded.tokenizer)
    if flags.json_output:
        print(json.dumps(report), flush=True)
    else:
        console = Console()
        console.print(render_summary(report))
        console.print(f"written to {flags.output}", highlight=False, markup=False, soft_wrap=True)
    num_failed = len({one.question.id for one in failed})
    if num_failed:
        notes.print(f"{num_failed} of {len(questions)} questions failed, question {failed[0].question.id} because: "
                    f"{failed[0].reason}; all are in {flags.output / 'failures.jsonl'}")  # fmt: skip
    if num_failed > MAX_FAILED * len(questions):
        raise typer.Exit(1)


def _choose_drafters(flags: Flags, notes: Console) -> dict[str, Settings]:
    """The settings of every drafter that is asked, plain's first."""
    from kangaroo.drafters.settings import SETTINGS, find_settings

    names = [name.strip() for name in flags.drafters.split(",")]
    unknown = next((name for name in names if name not in SETTINGS), None)
    if unknown is not None:
        raise usage_error("--drafters", f"must be of {', '.join(SETTINGS)}, got {unknown!r}")
    if "plain" not in names:
        notes.print("plain is asked too: the others are compared with it")
    given = {flag: value for flag, value in flags.settings.items() if value is not None}
    for flag in given:
        if OWNERS[flag] not in names:
            raise usage_error(f"--{flag.replace('_', '-')}", f"it does nothing without {OWNERS[flag]} in "
                              "--drafters; add that or leave it out")  # fmt: skip
    chosen = {}
    for name in dict.fromkeys(["plain", *names]):
        settings: Any = drafter_settings(name, {flag: given[flag] for flag in given if OWNERS[flag] == name})
        chosen[name] = find_settings(settings)() if isinstance(settings, str) else settings
    return chosen


def _follow(answers: Iterator[Asked], asking: SpecBench) -> Iterator[Asked]:
    """Draw a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=ETA_PERIOD_S
    ) as bar:
        task = bar.add_task("warming up", total=asking.num_wanted, completed=asking.num_done)
        for one in answers:
            bar.update(task, advance=1, description=f"run {one.run}, {one.question.task}")
            yield one

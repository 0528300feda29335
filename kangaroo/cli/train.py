"""`kangaroo train`: make a drafter's trained parts for a model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from kangaroo.cli.shared import Dtype, JsonOption, ModelOption

if TYPE_CHECKING:
    from kangaroo.model.checkpoint import LoadedModel
    from kangaroo.model.transformer import Transformer
    from kangaroo.train.data import Dataset
    from kangaroo.train.plan import TrainingPlan
    from kangaroo.train.run import Progress

Kind = Literal["attention", "mlp", "layer", "head"]
Initialization = Literal["target", "ones"]
Data = Annotated[list[Path], typer.Option(help="A .txt, .jsonl or source file, or a folder; repeatable.")]
Output = Annotated[Path, typer.Option(help="Folder for what is trained, its report and the checkpoint.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
BatchSize = Annotated[int, typer.Option(help="Windows per step.")]
SequenceLength = Annotated[int, typer.Option(help="Predicted tokens per window.")]
LearningRate = Annotated[float, typer.Option(help="Peak rate of AdamW, cosine decay to 0.")]
WarmupSteps = Annotated[int, typer.Option(help="Steps of linear warm-up.")]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of the matrices.")]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between held-out evaluations.")]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="What matrices multiply in; auto is bfloat16 where the machine has it."),
]
SavedDtype = Annotated[Dtype, typer.Option(help="Storage of the saved weights.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")]

PlanT = TypeVar("PlanT", bound="TrainingPlan")

train_app = typer.Typer(help="Train the small parts a drafter adds to a model.", no_args_is_help=True)


@train_app.callback()
def train() -> None:
    """Train the small parts a drafter adds to a model."""


@train_app.command()
def adapter(
    model: Annotated[str, ModelOption],
    data: Data,
    output: Output,
    exit_layer: Annotated[int, typer.Option(help="Layers the draft runs, in 1..L-1.")] = 2,
    adapter_kind: Annotated[
        Kind, typer.Option(help="Attention, an MLP, a decoder layer of both, or attention under a head of its own.")
    ] = "attention",
    steps: Steps = 1000,
    batch_size: BatchSize = 16,
    sequence_length: SequenceLength = 512,
    learning_rate: LearningRate = 2e-3,
    warmup_steps: WarmupSteps = 50,
    weight_decay: WeightDecay = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and batch order.")] = 0,
    evaluate_every: EvaluateEvery = 100,
    checkpoint_every: CheckpointEvery = 100,
    initialization: Annotated[
        Initialization, typer.Option(help="Where the norms start: at the target's own or at ones.")
    ] = "target",
    precision: Precision = "auto",
    dtype: SavedDtype = "float32",
    device: Device = "cpu",
    resume: Resume = False,
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Distil the Kangaroo adapter of a model from its own predictions on your data."""
    from kangaroo.model.checkpoint import resolve_device
    from kangaroo.train.adapter import RESULTS, check_plan, train_adapter
    from kangaroo.train.checkpoint import prepare_output
    from kangaroo.train.plan import AdapterPlan, resolve_precision

    plan = AdapterPlan(
        model=model,
        exit_layer=exit_layer,
        adapter_kind=adapter_kind,
        num_steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        seed=seed,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        initialization=initialization,
        precision=resolve_precision(precision, resolve_device(device)),
        dtype=dtype,
    )
    prepare_output(output, resume=resume, results=RESULTS)
    loaded, dataset = _prepare(plan, data, device=device, check=check_plan)
    report = _follow(train_adapter(loaded.target, dataset, plan=plan, output=output, resume=resume), plan)
    trained = report["adapter"]
    facts = {"kind": trained["kind"], "recommended gamma, eta": f"{trained['gamma']}, {trained['eta']}"}
    _print_report(report, output, title=f"adapter at exit layer {trained['exit_layer']}", facts=facts,
                  as_json=json_output)  # fmt: skip


@train_app.command()
def medusa(
    model: Annotated[str, ModelOption],
    data: Data,
    output: Output,
    num_heads: Annotated[int, typer.Option(help="Heads to train; each drafts one token further ahead.")] = 4,
    head_decay: Annotated[
        float, typer.Option(help="The loss of the k-th head counts this to the power of k, in (0, 1].")
    ] = 0.8,
    steps: Steps = 1000,
    batch_size: BatchSize = 16,
    sequence_length: SequenceLength = 512,
    learning_rate: LearningRate = 1e-3,
    warmup_steps: WarmupSteps = 50,
    weight_decay: WeightDecay = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of the batch order.")] = 0,
    evaluate_every: EvaluateEvery = 100,
    checkpoint_every: CheckpointEvery = 100,
    precision: Precision = "auto",
    dtype: SavedDtype = "float32",
    device: Device = "cpu",
    resume: Resume = False,
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Train Medusa heads on the last states of a model; the text they learn is best the model's own."""
    from kangaroo.model.checkpoint import resolve_device
    from kangaroo.train.checkpoint import prepare_output
    from kangaroo.train.medusa import RESULTS, train_medusa
    from kangaroo.train.plan import MedusaPlan, resolve_precision
    from kangaroo.train.run import check_plan

    plan = MedusaPlan(
        model=model,
        num_heads=num_heads,
        head_decay=head_decay,
        num_steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        seed=seed,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        precision=resolve_precision(precision, resolve_device(device)),
        dtype=dtype,
    )
    prepare_output(output, resume=resume, results=RESULTS)
    loaded, dataset = _prepare(plan, data, device=device, check=check_plan)
    report = _follow(train_medusa(loaded.target, dataset, plan=plan, output=output, resume=resume), plan)
    _print_report(report, output, title=f"{num_heads} Medusa heads", facts={}, as_json=json_output)


def _prepare(
    plan: PlanT, data: list[Path], *, device: str, check: Callable[[PlanT, Transformer], None]
) -> tuple[LoadedModel, Dataset]:
    """The target, checked against the plan before any data is read, and the data."""
    from rich.console import Console

    from kangaroo.kernels import REFERENCE
    from kangaroo.model.checkpoint import load_model, resolve_device
    from kangaroo.train.data import Dataset, read_corpus

    with Console(stderr=True).status("loading the model and reading the data"):
        kept_in = plan.precision if resolve_device(device).type == "cuda" else "float32"
        loaded = load_model(plan.model, dtype=kept_in, device=device, backend=REFERENCE)
        check(plan, loaded.target)
        # Of several EOS ids the lowest is the one that ends documents (Llama 3, Qwen); the others end turns.
        corpus = read_corpus(data, loaded.tokenizer, eos_id=min(loaded.eos_ids, default=None))
    if note := corpus.skipped_note():
        print(note, file=sys.stderr)
    return loaded, Dataset(corpus, sequence_length=plan.sequence_length)


def _follow(progress: Iterator[Progress], plan: TrainingPlan) -> dict[str, Any]:
    """Draw a progress bar on stderr until training ends; returns its report."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[facts]}"))  # fmt: skip
    report: dict[str, Any] = {}
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=plan.num_steps, facts="")
        for event in progress:
            if event.metrics is not None:
                facts = ", ".join(f"{label} {value}" for label, value in _describe(event.metrics))
                bar.console.print(f"step {event.step}: held out: {facts}", soft_wrap=True)
            facts = f"loss {event.loss:.3f}, {event.tokens_per_s:,.0f} tokens/s"
            bar.update(task, completed=event.step, facts=facts)
            report = event.report or report
    return report


def _describe(metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Held-out metrics by name, in words."""
    names = {"top1": "top-1 accuracy", "top3": "top-3 accuracy", "expected_acceptance": "expected acceptance",
             "ctar": "CTAR"}  # fmt: skip
    yield "loss", f"{metrics['loss']:.3f} nats"
    for key, value in metrics.items():
        stem, number = re.fullmatch(r"(.+?)(_\d+)?", key).groups(default="")  # type: ignore[union-attr]
        if stem in names:
            yield names[stem] + number.replace("_", "@"), f"{value:.1%}"
    yield "expected tokens per step", f"{metrics['expected_tokens_per_step']:.2f}"


def _print_report(report: dict[str, Any], output: Path, *, title: str, facts: dict[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}, held-out split", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    facts = facts | {"parameters": f"{report['num_parameters']:,}", "tokens seen": f"{report['num_tokens_seen']:,}",
                     "time": f"{report['wall_time_s']:.0f} s"}  # fmt: skip
    for label, value in (*_describe(report["metrics"]), *facts.items()):
        table.add_row(label, value)
    console = Console()
    console.print(table)
    console.print(f"written to {output}", soft_wrap=True, markup=False, highlight=False)

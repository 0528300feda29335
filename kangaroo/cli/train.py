"""`kangaroo train`: make a drafter's trained parts for a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kangaroo.cli.shared import Dtype, JsonOption, ModelOption

if TYPE_CHECKING:
    from kangaroo.train.adapter import Progress
    from kangaroo.train.plan import AdapterPlan

Initialization = Literal["target", "ones"]
Precision = Literal["auto", "float32", "bfloat16"]

train_app = typer.Typer(help="Train the small parts a drafter adds to a model.", no_args_is_help=True)


@train_app.callback()
def train() -> None:
    """Train the small parts a drafter adds to a model."""


@train_app.command()
def adapter(
    model: Annotated[str, ModelOption],
    data: Annotated[list[Path], typer.Option(help="A .txt, .jsonl or source file, or a folder; repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, its report and the checkpoint.")],
    exit_layer: Annotated[int, typer.Option(help="Layers the draft runs, in 1..L-1.")] = 2,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Predicted tokens per window.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW, cosine decay to 0.")] = 2e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the matrices.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and batch order.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Steps between held-out evaluations.")] = 100,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    initialization: Annotated[
        Initialization, typer.Option(help="Where the norms start: at the target's own or at ones.")
    ] = "target",
    precision: Annotated[
        Precision, typer.Option(help="What matrices multiply in; auto is bfloat16 where the machine has it.")
    ] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Storage of the saved weights.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --output.")] = False,
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Distil the Kangaroo adapter of a model from its own predictions on your data."""
    from rich.console import Console

    from kangaroo.kernels import REFERENCE
    from kangaroo.model.checkpoint import load_model, resolve_device
    from kangaroo.train.adapter import RESULTS, check_plan, train_adapter
    from kangaroo.train.checkpoint import prepare_output
    from kangaroo.train.data import Dataset, read_corpus
    from kangaroo.train.plan import AdapterPlan, resolve_precision

    where = resolve_device(device)
    plan = AdapterPlan(
        model=model,
        exit_layer=exit_layer,
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
        precision=resolve_precision(precision, where),
        dtype=dtype,
    )
    prepare_output(output, resume=resume, results=RESULTS)
    with Console(stderr=True).status("loading the model and reading the data"):
        kept_in = plan.precision if where.type == "cuda" else "float32"
        loaded = load_model(model, dtype=kept_in, device=device, backend=REFERENCE)
        check_plan(plan, loaded.target)
        # Of several EOS ids the lowest is the one that ends documents (Llama 3, Qwen); the others end turns.
        corpus = read_corpus(data, loaded.tokenizer, eos_id=min(loaded.eos_ids, default=None))
    if note := corpus.skipped_note():
        print(note, file=sys.stderr)
    dataset = Dataset(corpus, sequence_length=sequence_length)
    report = _follow(train_adapter(loaded.target, dataset, plan=plan, output=output, resume=resume), plan)
    if json_output:
        print(json.dumps(report))
    else:
        _print_summary(report, output)


def _follow(progress: Iterator[Progress], plan: AdapterPlan) -> dict[str, Any]:
    """Draw a progress bar on stderr until training ends; returns its report."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[facts]}"))  # fmt: skip
    report: dict[str, Any] = {}
    top1 = ""
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=plan.num_steps, facts="")
        for event in progress:
            if event.metrics is not None:
                top1 = f", top-1 {event.metrics['top1']:.1%}"
                bar.console.print(f"step {event.step}: {_held_out_line(event.metrics)}", soft_wrap=True)
            facts = f"loss {event.loss:.3f}{top1}, {event.tokens_per_s:,.0f} tokens/s"
            bar.update(task, completed=event.step, facts=facts)
            report = event.report or report
    return report


def _held_out_line(metrics: dict[str, float]) -> str:
    return (f"held out: loss {metrics['loss']:.3f}, top-1 {metrics['top1']:.1%}, top-3 {metrics['top3']:.1%}, "
            f"acceptance {metrics['expected_acceptance']:.1%}, "
            f"CTAR {' '.join(format(metrics[f'ctar_{width}'], '.2f') for width in range(1, 7))}")  # fmt: skip


def _print_summary(report: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics, trained = report["metrics"], report["adapter"]
    table = Table(title=f"adapter at exit layer {trained['exit_layer']}, held-out split", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    shares = {"top-1 accuracy": "top1", "top-3 accuracy": "top3", "expected acceptance": "expected_acceptance",
              "CTAR@1": "ctar_1", "CTAR@3": "ctar_3", "CTAR@6": "ctar_6"}  # fmt: skip
    for label, name in shares.items():
        table.add_row(label, f"{metrics[name]:.1%}")
    table.add_row("loss (nats)", f"{metrics['loss']:.3f}")
    table.add_row("expected tokens per step", f"{metrics['expected_tokens_per_step']:.2f}")
    table.add_row("recommended gamma, eta", f"{trained['gamma']}, {trained['eta']}")
    table.add_row("parameters", f"{report['num_parameters']:,}")
    table.add_row("tokens seen", f"{report['num_tokens_seen']:,}")
    table.add_row("time", f"{report['wall_time_s']:.0f} s")
    console = Console()
    console.print(table)
    console.print(f"written to {output}", soft_wrap=True, markup=False, highlight=False)

"""`kangaroo check`: is drafted decoding plain decoding to the bit?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.drafter_options import Adapter, Eta, Gamma
from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, Weights, WeightsOption, number
from kangaroo.types import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console

    from kangaroo.bench.check import PromptResult
    from kangaroo.model.tokenizer import Tokenizer

check_app = typer.Typer()

REFERENCE_NOTE = (
    "On the reference kernels a pass over several tokens rounds differently from a pass over one: logits may differ in "
    "their last bits, and texts at a near-tie. The native kernels are exact."
)

Prompts = Annotated[
    Path | None,
    typer.Option(
        help="A .txt of prompts separated by blank lines, or a .jsonl with a prompt, text or turns (the first counts) "
        "on every line; gzipped or not.",
        show_default="a dozen beginnings of Python code",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Check only the first so many prompts.", show_default="all")]


@check_app.command()
def check(
    model: Annotated[str, ModelOption],
    adapter: Adapter = None,
    prompts: Prompts = None,
    gamma: Gamma = None,
    eta: Eta = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate for every prompt.")] = 128,
    limit: Limit = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which texts to draw at a temperature above 0.")] = 0,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Compare Kangaroo with plain decoding, one token per pass: are all tokens and all logits identical?

    Logits are compared to the bit at every position, up to the first token that differs.
    Exit status 0 only if everything is identical, else 1.
    """
    from rich.console import Console

    from kangaroo.bench.check import Checker, total
    from kangaroo.bench.prompts import BUILT_IN, read_prompts
    from kangaroo.bench.record import stamp
    from kangaroo.drafters.settings import KangarooSettings
    from kangaroo.kernels import describe_backend
    from kangaroo.llm import build_drafter
    from kangaroo.model.checkpoint import load_model

    params = SamplingParams(max_new_tokens, temperature, seed)
    wanted = read_prompts(prompts or BUILT_IN, limit=limit)
    loaded = load_model(model, dtype=dtype, weights=weights, device=device)
    drafter = build_drafter(loaded, KangarooSettings(adapter=adapter, gamma=gamma, eta=eta))
    backend = describe_backend(loaded.target.device.type)
    checks = Checker(loaded, drafter).check_all(wanted, params)
    console = Console(quiet=json_output, highlight=False, markup=False, soft_wrap=True)
    storage = weights or dtype or "float32"
    console.print(f"{model} in {storage}, {backend} kernels: {drafter.name} against plain decoding")
    results = list(_follow(checks, num_prompts=len(wanted)))
    for one in results:
        for line in _describe(one, loaded.tokenizer):
            console.print(f"prompt {one.name}: {line}")
    totals, identical = total(results), all(one.identical for one in results)
    if json_output:
        settings = {"model": model, "drafter": drafter.name, "adapter": adapter, "gamma": gamma, "eta": eta,
                    "prompts": None if prompts is None else str(prompts), "limit": limit,
                    "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "dtype": dtype,
                    "weights": weights, "device": device}  # fmt: skip
        listed = [one.to_dict() for one in results]
        print(json.dumps({"settings": settings, "stamp": stamp(loaded.target.device.type), "backend": backend,
                          "identical": identical, "totals": totals, "prompts": listed}), flush=True)  # fmt: skip
    _print_totals(console, totals)
    console.print(_verdict(totals, identical=identical, exact=not backend.startswith("reference")))
    if not identical:
        raise typer.Exit(1)


def _follow(results: Iterator[PromptResult], *, num_prompts: int) -> Iterator[PromptResult]:
    """Draw a progress bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(results, total=num_prompts)


def _describe(result: PromptResult, tokenizer: Tokenizer) -> Iterator[str]:
    """A line for each way in which a prompt's two runs differ; positions count new tokens from 0."""
    if (found := result.divergence) is not None:
        plain, drafted = (_show(token, tokenizer) for token in found.candidates)
        kind = "a near-tie in floating point" if found.near_tie else "more than rounding explains"
        yield (f"tokens differ from new token {found.position}: plain {plain}, drafted {drafted}; the target's two "
               f"best are {found.margin:.3g} apart: {kind}")  # fmt: skip
    if (logits := result.logits_difference) is not None:
        tokens = "" if found is not None else "tokens identical, "
        yield (f"{tokens}logits differ at {logits.num_positions} of {result.num_compared} positions, first at new "
               f"token {logits.position}, by at most {number(logits.largest, '{:.3g}')}")  # fmt: skip


def _show(token: int | None, tokenizer: Tokenizer) -> str:
    return "ended" if token is None else f"{tokenizer.decode([token])!r} ({token})"


def _print_totals(console: Console, totals: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    accepted = totals["accepted_of_draft"]
    rows = {
        "prompts": totals["num_prompts"],
        "tokens identical": f"{totals['num_tokens_identical']} of {totals['num_prompts']} prompts",
        "logits identical": f"{totals['num_logits_identical']} of {totals['num_prompts']} prompts",
        "": f"{totals['num_positions_identical']} of {totals['num_positions']} positions",
        "new tokens": totals["num_new_tokens"],
        "steps": totals["num_steps"],
        "tokens per step": number(totals["tokens_per_step"], "{:.2f}"),
        "acceptance rate": number(totals["acceptance_rate"], "{:.1%}"),
        "steps that accepted all of their draft": accepted["all"],
        "a part of it": accepted["part"],
        "nothing": accepted["none"],
        "had no draft": accepted["no_draft"],
    }
    for label, value in rows.items():
        table.add_row(label, str(value))
    console.print(table)


def _verdict(totals: dict[str, Any], *, identical: bool, exact: bool) -> str:
    note = "" if exact else f" {REFERENCE_NOTE}"
    if identical:
        return f"identical: yes, every token and every logit.{note}"
    num_differing = totals["num_prompts"] - totals["num_tokens_identical"]
    if not num_differing:
        return f"identical: no; every token is, but logits are not.{note}"
    return f"identical: no; texts that differ: {num_differing}, at a near-tie: {totals['num_near_ties']}.{note}"

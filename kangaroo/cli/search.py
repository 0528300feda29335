"""`kangaroo search`: find what a drafter needs to know about a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, Weights, WeightsOption
from kangaroo.search.plan import ObjectiveName, SamplerName, SearchPlan

if TYPE_CHECKING:
    from kangaroo.search.layers import Trial

search_app = typer.Typer(help="Find what a drafter needs to know about a model.", no_args_is_help=True)

Data = Annotated[
    Path,
    typer.Option(
        help="Prompts: a .txt separated by blank lines, or a .jsonl with a prompt, text or turns (the first counts) on "
        "every line; gzipped or not."
    ),
]
Objective = Annotated[
    ObjectiveName,
    typer.Option(
        help="What to make large: the speedup by counted steps and measured costs, which other programs on the machine "
        "hardly disturb, or the tokens a second of a run, as in the paper."
    ),
]
Sampler = Annotated[
    SamplerName,
    typer.Option(
        help="Where candidates come from: Optuna's TPE or Gaussian process, chance, or dropping one more sublayer at a "
        "time, the best of all that are left."
    ),
]
Output = Annotated[Path, typer.Option(help="Folder for skip_layers.json, the report, the plot and the study.")]


@search_app.callback()
def search() -> None:
    """Find what a drafter needs to know about a model."""


@search_app.command()
def layers(
    model: Annotated[str, ModelOption],
    data: Data,
    output: Output = Path("layer-search"),
    trials: Annotated[int, typer.Option(min=1, help="Candidates to judge, those before --resume included.")] = 200,
    objective: Objective = "expected_speedup",
    sampler: Sampler = "tpe",
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens the model continues every prompt by.")] = 96,
    gamma: Annotated[int, typer.Option(help="The longest drafts to look at.")] = 8,
    validate: Annotated[int, typer.Option(min=1, help="How many of the best candidates to run; the fastest wins.")] = 5,
    seed: Annotated[int, typer.Option(help="Which candidates are drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search in --output.")] = False,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Search for the attention and MLP sublayers that Draft & Verify had best skip while drafting.

    The target continues the prompts once; every candidate is judged by how often it guesses those tokens. The result is
    a skip_layers.json for --drafter layer_skip, of the candidate that was fastest when it ran.
    """
    from rich.console import Console

    from kangaroo.bench.prompts import read_prompts
    from kangaroo.drafters.companion import fingerprint
    from kangaroo.model.checkpoint import load_model
    from kangaroo.search.layers import digest, finished_trials, pick_best, run_search
    from kangaroo.search.objectives import validate as validate_candidates
    from kangaroo.search.report import import_figure, make_report, write_results
    from kangaroo.search.study import open_study, prepare_objective, prepare_texts

    # Said now and not behind all the trials.
    import_figure()
    prompts = read_prompts(data, limit=limit)
    with Console(stderr=True).status("loading the model"):
        loaded = load_model(model, dtype=dtype, weights=weights, device=device)
    prompt_ids = [loaded.tokenizer.encode(prompt.text) for prompt in prompts]
    plan = SearchPlan(
        model=model,
        fingerprint=fingerprint(loaded.target),
        num_layers=loaded.target.num_layers,
        storage=weights or dtype or "float32",
        prompts=digest(prompt_ids),
        max_new_tokens=max_new_tokens,
        objective=objective,
        sampler=sampler,
        gamma=gamma,
        seed=seed,
    )
    study = open_study(output, plan, resume=resume)
    with Console(stderr=True).status("continuing the prompts"):
        texts = prepare_texts(study, loaded, prompts=prompt_ids, max_new_tokens=max_new_tokens)
        judge = prepare_objective(study, loaded, texts=texts, plan=plan)
    _follow(run_search(study, judge, plan=plan, num_trials=trials), num_done=len(finished_trials(study)), total=trials)
    done = finished_trials(study)
    with Console(stderr=True).status("running the best"):
        best = [(one.skips, one.score) for one in pick_best(done, validate)]
        found = validate_candidates(loaded.target, best, texts=texts)
    costs, device_type = study.user_attrs.get("costs"), loaded.target.device.type
    report = make_report(plan, done, validated=found, costs=costs, device=device_type)
    write_results(output, report, trials=done, skips=found[0].skips)
    if json_output:
        print(json.dumps(report))
    else:
        _print_summary(report, output)


def _follow(found: Iterator[Trial], *, num_done: int, total: int) -> None:
    """Draw a progress bar on stderr until the search ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
    console = Console(stderr=True)
    best = float("-inf")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("searching", total=total, completed=num_done, facts="")
        for trial in found:
            best = max(best, trial.score.value)
            bar.update(task, advance=1, facts=f"best {best:.3f}")


def _print_summary(report: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    num_sublayers = 2 * report["plan"]["num_layers"]
    table = Table("skipped", report["plan"]["objective"].replace("_", " "), "gamma", "eta", "ran at", "tokens per step",
                  "acceptance", title=f"the best of {report['num_trials']} candidates")  # fmt: skip
    for one in report["validated"]:
        score, num_skipped = one["score"], sum(map(len, one["skips"].values()))
        eta = "adaptive" if score["eta"] is None else f"{score['eta']:g}"
        table.add_row(f"{num_skipped} of {num_sublayers}", f"{score['value']:.3f}", str(score["gamma"]), eta,
                      f"{one['speedup']:.2f}x", f"{one['tokens_per_step']:.2f}",
                      f"{one['acceptance_rate']:.1%}")  # fmt: skip
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    if report["validated"][0]["speedup"] <= 1:
        console.print("none is faster than plain decoding here")
    console.print(f"written to {output}")

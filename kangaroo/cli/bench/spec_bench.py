"""`kangaroo bench spec-bench`: Spec-Bench's questions, protocol, answer files and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kangaroo.cli.bench import asking
from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, Weights, WeightsOption
from kangaroo.types import SamplingParams

spec_bench_app = typer.Typer()

Questions = Annotated[
    Path,
    typer.Option(
        help="Spec-Bench's question.jsonl, or other JSON lines with question_id, category and turns; gzipped or not."
    ),
]
Categories = Annotated[
    str | None,
    typer.Option(help="Ask only these, by commas: categories of the file, or mt_bench for its eight categories.",
                 show_default="all"),
]  # fmt: skip


@spec_bench_app.command()
def spec_bench(
    model: Annotated[str, ModelOption],
    questions: Questions,
    drafters: asking.Drafters,
    output: asking.Output,
    runs: asking.Runs = 3,
    max_new_tokens: asking.MaxNewTokens = 1024,
    categories: Categories = None,
    limit: asking.Limit = None,
    template: asking.Template = None,
    temperature: asking.Temperature = 0.0,
    seed: asking.Seed = 0,
    adapter: asking.Adapter = None,
    gamma: asking.Gamma = None,
    eta: asking.Eta = None,
    num_siblings: asking.NumSiblings = None,
    max_nodes: asking.MaxNodes = None,
    heads: asking.Heads = None,
    skip_layers: asking.SkipLayers = None,
    datastore: asking.Datastore = None,
    draft_model: asking.DraftModel = None,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Put Spec-Bench's questions to drafters, one at a time and by turns, and report how much faster they answer.

    A second turn's prompt holds the drafter's own first answer. The answer files are in Spec-Bench's format. A question
    that cannot be answered is told in failures.jsonl; the exit status is 1 where more than 1% cannot.
    --json prints the content of report.json.
    """
    from kangaroo.bench.questions import read_questions

    only = () if categories is None else [name.strip() for name in categories.split(",")]
    asked = read_questions(questions, category="other", only=only, limit=limit)
    flags = asking.Flags(
        model=model,
        drafters=drafters,
        settings={"adapter": adapter, "gamma": gamma, "eta": eta, "num_siblings": num_siblings, "max_nodes": max_nodes,
                  "heads": heads, "skip_layers": skip_layers, "datastore": datastore, "draft_model": draft_model},
        output=output,
        runs=runs,
        template=template,
        params=SamplingParams(max_new_tokens, temperature, seed),
        dtype=dtype,
        weights=weights,
        device=device,
        json_output=json_output,
    )  # fmt: skip
    asking.run_bench("spec-bench", asked, flags=flags)

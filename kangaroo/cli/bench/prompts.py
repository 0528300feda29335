"""`kangaroo bench code` and `kangaroo bench summarize`: the two tasks of Draft & Verify, or any other prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kangaroo.cli.bench import asking
from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, Weights, WeightsOption
from kangaroo.types import SamplingParams

prompts_app = typer.Typer()

CATEGORIES = {"code": "code", "summarize": "summarization"}
HELP = (
    "{}\n\nEvery drafter continues every prompt, one at a time and by turns, and the report tells how much faster it "
    "does. A prompt that cannot be continued is told in failures.jsonl; the exit status is 1 where more than 1% "
    "cannot. --json prints the content of report.json."
)

Data = Annotated[
    Path,
    typer.Option(
        help="JSON lines with a prompt, text, question or turns, like HumanEval.jsonl.gz, or a .txt of prompts "
        "separated by blank lines; gzipped or not."
    ),
]
Template = Annotated[
    asking.TemplateName,
    typer.Option(
        help="How a prompt is put: as Vicuna, ChatML, Llama 3 or Alpaca were trained, by the checkpoint's own chat "
        "template, or the text alone."
    ),
]


@prompts_app.command("summarize", help=HELP.format("Summarize texts with several drafters; the prompts ask for it."))
@prompts_app.command("code", help=HELP.format("Continue code, such as HumanEval's, with several drafters."))
def ask_prompts(
    ctx: typer.Context,
    model: Annotated[str, ModelOption],
    data: Data,
    drafters: asking.Drafters,
    output: asking.Output,
    runs: asking.Runs = 3,
    max_new_tokens: asking.MaxNewTokens = 512,
    limit: asking.Limit = None,
    template: Template = "none",
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
    """Put the prompts of a file to drafters, as the verb that was called."""
    from kangaroo.bench.questions import read_questions

    verb = str(ctx.info_name)
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
    asking.run_bench(verb, read_questions(data, category=CATEGORIES[verb], limit=limit), flags=flags)

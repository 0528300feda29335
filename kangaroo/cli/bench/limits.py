"""`kangaroo bench limits`: what this machine allows, what is reached, and where the rest goes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.drafter_options import Adapter, Eta, Gamma
from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, Weights, WeightsOption

if TYPE_CHECKING:
    from rich.console import Console

limits_app = typer.Typer()

Data = Annotated[
    Path | None,
    typer.Option(
        help="Prompts: a .txt separated by blank lines, or a .jsonl with a prompt, text or turns (the first counts) on "
        "every line; gzipped or not.",
        show_default="a dozen beginnings of Python code",
    ),
]


@limits_app.command()
def limits(
    model: Annotated[str, ModelOption],
    adapter: Adapter = None,
    data: Data = None,
    gamma: Gamma = None,
    eta: Eta = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens the model continues every prompt by.")] = 96,
    limit: Annotated[int, typer.Option(min=1, help="Use only so many of the prompts, evenly spread.")] = 24,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Compare plain and Kangaroo's decoding with what the machine's memory allows, batches of one.

    Plain decoding is bound by reading the weights and the text's keys and values for every token, drafting by tokens
    per step / (1 + levels drafted per step x a level's share of a plain step), to which a tree adds the nodes beside.
    """
    from rich.console import Console

    from kangaroo.bench.limits import find_limits
    from kangaroo.bench.prompts import BUILT_IN, read_prompts, spread_prompts
    from kangaroo.bench.record import shorten_path, stamp
    from kangaroo.bench.texts import decode_texts
    from kangaroo.bench.tune import LEAST_ETA, NUM_SIBLINGS
    from kangaroo.drafters.settings import KangarooSettings
    from kangaroo.llm import build_drafter, resolve_settings
    from kangaroo.model.checkpoint import load_model

    prompts = spread_prompts(read_prompts(data or BUILT_IN), limit)
    with Console(stderr=True).status("loading the model") as status:
        loaded = load_model(model, dtype=dtype, weights=weights, device=device)
        settings = resolve_settings(loaded, KangarooSettings(adapter=adapter, gamma=gamma, eta=eta))
        assert isinstance(settings, KangarooSettings), "settings keep their kind"
        chains = replace(settings, gamma=6, eta=LEAST_ETA, num_siblings=1, max_nodes=64)
        every = (settings, chains, replace(chains, num_siblings=NUM_SIBLINGS))
        used, chain, tree = (build_drafter(loaded, one) for one in every)
        status.update("continuing the prompts")
        encoded = [loaded.tokenizer.encode(prompt.text) for prompt in prompts]
        texts = decode_texts(loaded.target, encoded, eos_ids=loaded.eos_ids, max_new_tokens=max_new_tokens)
        status.update("measuring")
        found = find_limits(loaded.target, (used, chain, tree), texts=texts)
    described = {
        "model": shorten_path(model),
        "data": shorten_path(str(data or BUILT_IN)),
        **asdict(settings),
        "adapter": shorten_path(str(settings.adapter or loaded.adapter_folder)),
        "dtype": weights or dtype or "float32",
        "device": device,
        "max_new_tokens": max_new_tokens,
        "limit": limit,
    }
    result = {"settings": described, "stamp": stamp(loaded.target.device.type), "num_texts": len(texts), **found}
    if json_output:
        print(json.dumps(result))
    else:
        _print_summary(Console(highlight=False, soft_wrap=True), result)


def _print_summary(console: Console, result: dict[str, Any]) -> None:
    plain, drafted = result["plain"], result["drafted"]
    num_bytes = plain["weight_bytes"] + plain["cache_bytes"]
    settings = result["settings"]
    console.print(f"[bold]{settings['model']}[/bold] in {settings['dtype']} on {result['stamp']['cpu']}, "
                  f"{result['stamp']['kernel_backend']} kernels")  # fmt: skip
    console.print(f"memory reads {result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s; a plain token reads "
                  f"{num_bytes / 1e6:.1f} MB: {plain['weight_bytes'] / 1e6:.1f} MB of weights and "
                  f"{plain['cache_bytes'] / 1e6:.2f} MB of keys and values behind {result['num_context_tokens']} "
                  "tokens")  # fmt: skip
    console.print(f"\n[bold]plain[/bold]: {plain['tokens_per_s']:.0f} of {plain['ideal_tokens_per_s']:.0f} tokens/s, "
                  f"{plain['share']:.0%} of the limit")  # fmt: skip
    if plain["share"] > 1:
        console.print("more than memory allows: a part of the weights stays in the processor's caches")
    _print_parts(console, plain)
    num_beside = drafted["drafted_per_step"] - drafted["levels_per_step"]
    beside = f" + {num_beside:.2f} beside x {drafted['node_share']:.3f}" if num_beside > 0 else ""
    console.print(f"\n[bold]Kangaroo[/bold]: {drafted['speedup']:.2f}x of {drafted['ideal_speedup']:.2f}x, "
                  f"{drafted['share']:.0%} of the limit: {drafted['tokens_per_step']:.2f} tokens per step / (1 + "
                  f"{drafted['levels_per_step']:.2f} drafted x {drafted['token_share']:.3f}{beside})")  # fmt: skip
    _print_parts(console, drafted)


def _print_parts(console: Console, facts: dict[str, Any]) -> None:
    from rich.bar import Bar
    from rich.table import Table

    table = Table("a step", "us", "share", "", title=None)
    for name, part_s in facts["parts_s"].items():
        share = part_s / facts["step_s"]
        table.add_row(name, f"{1e6 * part_s:.0f}", f"{share:.0%}", Bar(1.0, 0.0, max(0.0, share), width=30))
    table.add_section()
    table.add_row("all", f"{1e6 * facts['step_s']:.0f}", "100%", "")
    console.print(table)

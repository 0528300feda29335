"""`kangaroo tune`: find the drafts that serve this machine best, and keep them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, Weights, WeightsOption, usage_error

if TYPE_CHECKING:
    from kangaroo.bench.tune import Prediction
    from kangaroo.model.transformer import Transformer

tune_app = typer.Typer()

Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", help="Adapter folder; repeatable.", show_default="the folder 'adapter' of the model"),
]
Data = Annotated[
    Path,
    typer.Option(
        help="Prompts like those to come: a .txt separated by blank lines, or a .jsonl with a prompt, text or turns "
        "(the first counts) on every line; gzipped or not."
    ),
]
BatchSizes = Annotated[str, typer.Option(help="Batch sizes to tune for, separated by commas.")]


@tune_app.command()
def tune(
    model: Annotated[str, ModelOption],
    data: Data,
    adapter: Adapters = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens the model continues every prompt by.")] = 96,
    batch_sizes: BatchSizes = "1,2,4,8",
    limit: Annotated[int, typer.Option(min=1, help="Use only so many of the prompts, evenly spread.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="How often the best settings are run.")] = 3,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Find the draft length, threshold and tree that make Kangaroo fastest on this machine.

    Measures what steps cost, lets the model continue the prompts, judges every adapter's guesses there in one pass, and
    predicts the speedup of every setting from both. The best three of each batch size are run beside plain decoding.
    The fastest of each is kept for its adapter on this machine, where generate and bench take it from, for batches
    of its size and larger ones, unless flags say otherwise. Run it on a machine that does nothing else.
    """
    from rich.console import Console

    from kangaroo.bench.prompts import read_prompts, spread_prompts
    from kangaroo.bench.record import name_apart, shorten_path, stamp
    from kangaroo.bench.texts import decode_texts
    from kangaroo.bench.tune import Tuner
    from kangaroo.bench.tune import tune as find_best
    from kangaroo.model.checkpoint import load_model
    from kangaroo.tuning import make_folder

    sizes = _parse_sizes(batch_sizes)
    make_folder()
    prompts = spread_prompts(read_prompts(data), limit)
    with Console(stderr=True).status("loading the model") as status:
        loaded = load_model(model, dtype=dtype, weights=weights, device=device)
        folders = [folder.expanduser() for folder in adapter or [loaded.adapter_folder]]
        status.update("continuing the prompts")
        encoded = [loaded.tokenizer.encode(prompt.text) for prompt in prompts]
        texts = decode_texts(loaded.target, encoded, eos_ids=loaded.eos_ids, max_new_tokens=max_new_tokens)
        status.update("judging guesses")
        tuner = Tuner(loaded.target, texts, adapters=folders)
        predictions, ran = find_best(tuner, batch_sizes=sizes, num_rounds=rounds, report=status.update)
    facts = stamp(loaded.target.device.type)
    path = _keep(ran, loaded.target, folders=folders, stamp=facts)
    settings = {
        "model": shorten_path(model),
        "data": shorten_path(str(data)),
        "adapters": name_apart(folders),
        "batch_sizes": sizes,
        "dtype": weights or dtype or "float32",
        "device": device,
        "max_new_tokens": max_new_tokens,
        "limit": limit,
        "rounds": rounds,
    }
    result = {
        "settings": settings,
        "stamp": facts,
        "num_texts": len(texts),
        "costs": [{size: one.to_dict() for size, one in costs.items()} for costs in tuner.costs],
        "validated": [one.to_dict() for one in ran],
        "predictions": [one.to_dict() for one in predictions],
    }
    if json_output:
        print(json.dumps(result))
    else:
        _print_summary(result, path)


def _parse_sizes(text: str) -> list[int]:
    sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise usage_error("--batch-sizes", f"must be different whole numbers of at least 1 like 1,2,4,8, got {text!r}")
    return sorted(sizes)


def _keep(ran: Sequence[Prediction], target: Transformer, *, folders: Sequence[Path], stamp: dict[str, Any]) -> Path:
    """Write what ran fastest with each adapter that ran; returns the tuning file."""
    from kangaroo.tuning import tuning_file, tuning_key, write_tuned

    for place, folder in enumerate(folders):
        # The first of a batch size to have run is its fastest.
        fastest = {one.setting.batch_size: one for one in reversed(ran) if one.setting.place == place}
        if fastest:
            found = [one.to_tuned() for _, one in sorted(fastest.items())]
            write_tuned(tuning_key(target, folder), found, stamp=stamp)
    return tuning_file()


def _print_summary(result: dict[str, Any], tuning_file: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    adapters = result["settings"]["adapters"]
    many = len(adapters) > 1
    header = ["batch", *(["adapter"] if many else []), "gamma", "eta", "draft", "tokens/step", "predicted", "measured"]
    table = Table(*header, "off by", title="the best settings as they ran beside plain decoding")
    sizes: list[int] = []
    for one in result["validated"]:
        is_best = one["batch_size"] not in sizes
        sizes.append(one["batch_size"])
        draft = "chain" if one["num_siblings"] == 1 else f"tree of {one['max_nodes']}"
        name = [adapters[one["place"]]] if many else []
        cells = [str(one["batch_size"]), *name, str(one["gamma"]), f"{one['eta']:g}", draft,
                 f"{one['measured_tokens_per_step']:.2f}", f"{one['speedup']:.2f}x", f"{one['measured']:.2f}x",
                 f"{one['error']:+.0%}"]  # fmt: skip
        table.add_row(*cells, style="bold green" if is_best and one["measured"] > 1 else None)
    console.print(table)
    best = {size: max(one["measured"] for one in result["validated"] if one["batch_size"] == size) for size in sizes}
    for size in (size for size, measured in best.items() if measured <= 1):
        console.print(f"at batch size {size} none is faster than plain decoding here")
    console.print(f"kept in {tuning_file}: generate and bench use it for this adapter on this machine")

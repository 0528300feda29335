"""An ablation of Kangaroo's adapter (arXiv 2404.18911): attention, an MLP, a decoder layer, a head of its own.

    python benchmarks/adapter_kinds.py --prompts HumanEval.jsonl.gz --adapter attention=DIR --adapter mlp=DIR ...

Every DIR holds what one `kangaroo train adapter --adapter-kind` left; all should have seen the same steps of the same
data. Every adapter drafts with three settings; all take turns prompt by prompt in one process, after a warm-up.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kangaroo.bench.comparison import interleave
from kangaroo.bench.contenders import Contender, KangarooContender, Run
from kangaroo.bench.prompts import read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.types import Completion

DEPTHS = (1, 2, 3, 4)
# Whole drafts show what an adapter predicts and what a drafted token costs; the others are how one would decode.
WHOLE, SAME, OWN = "gamma 6, eta 0", "gamma 6, eta 0.15", "recommended"


def read_json(folder: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    return content


def build_contenders(model: LoadedModel, folders: dict[str, str]) -> list[Contender]:
    """Plain decoding, and every adapter with every setting."""
    contenders: list[Contender] = [KangarooContender("plain", LLM(model, build_drafter(model, "plain")))]
    for name, folder in folders.items():
        every = {WHOLE: KangarooSettings(adapter=folder, gamma=6, eta=0.0),
                 SAME: KangarooSettings(adapter=folder, gamma=6, eta=0.15),
                 OWN: KangarooSettings(adapter=folder)}  # fmt: skip
        for setting, settings in every.items():
            contenders.append(KangarooContender(f"{name}: {setting}", LLM(model, build_drafter(model, settings))))
    return contenders


def completions(runs: Sequence[Run]) -> list[Completion]:
    return [run.completion for run in runs if run.completion]


def describe(mine: list[Completion], plain: list[Completion]) -> dict[str, object]:
    """What one adapter brings with one setting; times are of decoding alone, since all read prompts alike."""
    lengths = [length for one in mine for length in one.accepted_lengths]
    num_steps, num_drafted = len(lengths), sum(one.num_drafted for one in mine)
    plain_step_s = sum(one.decode_time_s for one in plain) / sum(one.num_steps for one in plain)
    speeds = [a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, plain, strict=True)
              if a.tokens_per_s and b.tokens_per_s]  # fmt: skip
    return {
        "tokens_per_step": sum(lengths) / num_steps,
        "drafted_per_step": num_drafted / num_steps,
        "ctar": {depth: sum(length > depth for length in lengths) / num_steps for depth in DEPTHS},
        "drafted_token_cost": sum(one.draft_time_s for one in mine) / num_drafted / plain_step_s,
        "speedup": statistics.median(speeds),
        "num_equal": sum(a.token_ids == b.token_ids for a, b in zip(mine, plain, strict=True)),
        "num_texts": len(mine),
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = ["adapter", "parameters", "top-1, held out", *(f"CTAR@{depth}" for depth in DEPTHS),
              "a drafted token costs", *(f"{fact}, {setting}" for setting in (SAME, OWN)
                                         for fact in ("tokens a step", "speedup")), "equal"]  # fmt: skip
    cells = []
    for row in rows:
        whole, *others = (row[setting] for setting in (WHOLE, SAME, OWN))
        texts = [whole, *others]
        cells.append([
            row["adapter"], f"{row['num_parameters']:,}", f"{row['metrics']['top1']:.3f}",
            *(f"{share:.2f}" for share in whole["ctar"].values()), f"{whole['drafted_token_cost']:.3f}",
            *(cell for one in others for cell in (f"{one['tokens_per_step']:.2f}", f"{one['speedup']:.2f}x")),
            f"{sum(one['num_equal'] for one in texts)}/{sum(one['num_texts'] for one in texts)}",
        ])  # fmt: skip
    return markdown_table(header, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--adapter", action="append", required=True, help="NAME=DIR of a trained adapter")
    parser.add_argument("--num-prompts", type=int, default=41)
    parser.add_argument("--num-rounds", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/adapter_kinds"))
    args = parser.parse_args()
    folders = dict(pair.split("=", 1) for pair in args.adapter)
    model, every = load_model(args.model), read_prompts(args.prompts)
    chosen = every[:: max(1, len(every) // args.num_prompts)][: args.num_prompts]
    prompts = [tuple(model.tokenizer.encode(one.text)) for one in chosen]
    runs = interleave(build_contenders(model, folders), prompts, num_rounds=args.num_rounds,
                      max_new_tokens=args.max_new_tokens)  # fmt: skip
    rows = []
    for name, folder in folders.items():
        report, config = read_json(folder, "report.json"), read_json(folder, "config.json")
        rows.append({
            "adapter": name, "config": config, "plan": report["plan"], "num_parameters": report["num_parameters"],
            "metrics": report["metrics"], "training_time_s": report["wall_time_s"],
            **{setting: describe(completions(runs[f"{name}: {setting}"]), completions(runs["plain"]))
               for setting in (WHOLE, SAME, OWN)},
        })  # fmt: skip
    facts = stamp()
    recommended = ", ".join(f"{row['adapter']} gamma {row['config']['gamma']} eta {row['config']['eta']}"
                            for row in rows)  # fmt: skip
    trained = ", ".join(f"{row['adapter']} {row['plan']['num_steps']} steps" for row in rows)
    text = "\n\n".join([
        "# Kinds of adapter", stamp_text(facts),
        f"Greedy, float32, batch size 1, {len(prompts)} prompts, {args.max_new_tokens} tokens, {args.num_rounds} "
        f"rounds. Trained: {trained}; top-1 is the agreement with the target on held-out training text. CTAR and cost "
        f"are of drafts of {WHOLE}: CTAR@w is the share of steps that accept w guesses or more; the cost is the time "
        "spent drafting, a drafted token, over a plain step. Speedups are medians over texts of decoding without the "
        f"prompt, over plain decoding; equal: texts that are plain decoding's, of all settings. Recommended by the "
        f"training reports: {recommended}.",
        table(rows),
    ])  # fmt: skip
    write_result(args.output, {"stamp": facts, "rows": rows}, text=text)
    print(text)


if __name__ == "__main__":
    main()

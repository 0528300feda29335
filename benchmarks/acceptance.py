"""The three rules of acceptance at several temperatures: how much of a draft each accepts, and what a choice costs.

    python benchmarks/acceptance.py --prompts HumanEval.jsonl.gz

Every rule decodes the same prompts with several seeds; acceptance is that of the first token of a draft and of all
drafted tokens. The texts of rejection and block verification differ from plain decoding's, though not in distribution.
Beside it the time of one choose(), the target's choice when sampling, at the vocabulary of a large model.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Literal

import torch

from kangaroo.bench.prompts import read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import load_model
from kangaroo.sampling import Prefix, choose
from kangaroo.types import Completion, SamplingParams

TEMPERATURES = (0.3, 0.7, 1.0)
RULES: tuple[Literal["coupling", "rejection", "block"], ...] = ("coupling", "rejection", "block")

# Of choose(): the vocabulary of Qwen2.5, and logits about as peaked as those of a model that hesitates.
VOCAB_SIZE, LOGITS_STD, NUM_ROWS, NUM_CHOICES = 151_936, 3.0, 16, 400
CHOICES = {
    "temperature 1": SamplingParams(temperature=1.0, seed=0),
    "top_p 0.9": SamplingParams(temperature=1.0, seed=0, top_p=0.9),
    "top_k 50": SamplingParams(temperature=1.0, seed=0, top_k=50),
}


def time_choices(params: SamplingParams) -> float:
    """Median microseconds of one choose(), each after another row and at another position."""
    rows = LOGITS_STD * torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    tokens, times_us = [0], []
    prefix = Prefix(tokens, stop_ids=frozenset())
    for index in range(NUM_CHOICES):
        started_ns = time.perf_counter_ns()
        token = choose(rows[index % NUM_ROWS], params, prefix=prefix)
        times_us.append((time.perf_counter_ns() - started_ns) / 1000)
        tokens.append(token)
    return statistics.median(times_us)


def summarize(completions: list[Completion], plain: list[Completion]) -> dict[str, object]:
    """Acceptance and speed of one rule's texts."""
    drafted, accepted = sum(one.num_drafted for one in completions), sum(one.num_accepted for one in completions)
    lengths = [length for one in completions for length in one.accepted_lengths]
    ratios = [
        one.tokens_per_s / other.tokens_per_s
        for one, other in zip(completions, plain, strict=True)
        if one.tokens_per_s and other.tokens_per_s
    ]
    return {
        "acceptance_rate": accepted / drafted,
        "first_accepted": sum(length > 1 for length in lengths) / len(lengths),
        "tokens_per_step": sum(lengths) / len(lengths),
        "speedup": statistics.median(ratios),
        "num_equal": sum(a.token_ids == b.token_ids for a, b in zip(completions, plain, strict=True)),
        "num_texts": len(completions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=41)
    parser.add_argument("--num-seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/acceptance"))
    args = parser.parse_args()
    model = load_model("demo")
    every = read_prompts(args.prompts)
    prompts = [tuple(model.tokenizer.encode(one.text)) for one in every[:: max(1, len(every) // args.num_prompts)]]
    plain_llm = LLM(model, build_drafter(model, "plain"))
    llm = LLM(model, build_drafter(model, KangarooSettings(gamma=4, eta=0.0)))
    rows: list[dict[str, object]] = []
    for temperature in TEMPERATURES:
        texts: dict[str, list[Completion]] = {name: [] for name in ("plain", *RULES)}
        for seed in range(args.num_seeds):
            for prompt in prompts:
                texts["plain"].append(plain_llm.generate(prompt, SamplingParams(128, temperature, seed)))
                first = len(texts["plain"]) % len(RULES)
                for rule in (*RULES[first:], *RULES[:first]):
                    params = SamplingParams(128, temperature, seed, acceptance=rule)
                    texts[rule].append(llm.generate(prompt, params))
        rows += [{"temperature": temperature, "rule": rule} | summarize(texts[rule], texts["plain"]) for rule in RULES]
    choices_us = {name: time_choices(params) for name, params in CHOICES.items()}
    facts = stamp()
    cells = [[row["temperature"], row["rule"], f"{row['first_accepted']:.3f}", f"{row['acceptance_rate']:.3f}",
              f"{row['tokens_per_step']:.2f}", f"{row['speedup']:.2f}", f"{row['num_equal']}/{row['num_texts']}"]
             for row in rows]  # fmt: skip
    text = "\n\n".join([
        "# Rules of acceptance", stamp_text(facts),
        f"The bundled model and adapter, float32, {len(prompts)} prompts, {args.num_seeds} seeds, 128 tokens, "
        "chains of 4.",
        markdown_table(["temperature", "rule", "first guess accepted", "guesses accepted", "tokens a step",
                        "speedup over plain", "texts equal plain's"], cells),
        f"One choose() of {VOCAB_SIZE:,} normal logits of standard deviation {LOGITS_STD:g}, at temperature 1, median "
        f"of {NUM_CHOICES}:",
        markdown_table(["params", "microseconds"], [[name, f"{time_us:.0f}"] for name, time_us in choices_us.items()]),
    ])  # fmt: skip
    write_result(args.output, {"stamp": facts, "rows": rows, "choose_us": choices_us}, text=text)
    print(text)


if __name__ == "__main__":
    main()

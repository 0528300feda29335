"""Batches: tokens a second and latency of plain decoding, Kangaroo and transformers' padded batches.

    python benchmarks/batching.py --prompts HumanEval.jsonl.gz

For every batch size all contenders decode the same prompts together, in turns and in one process; ratios are of runs
of one turn, with a bootstrap interval over turns.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kangaroo.bench.contenders import TransformersContender
from kangaroo.bench.prompts import read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.types import SamplingParams

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class BatchRun:
    """What one batch took; gaps: seconds from one emission of a text to its next, latencies: shared by its tokens."""

    wall_time_s: float
    texts: list[tuple[int, ...]]
    latencies_s: tuple[float, ...] = ()
    gaps_s: tuple[float, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.texts)) / self.wall_time_s


def run_engine(llm: LLM, prompts: Prompts, params: SamplingParams) -> BatchRun:
    """Decode all prompts together, watching when tokens come."""
    started_s = time.perf_counter()
    begun = [llm.submit(prompt, params)[0] for prompt in prompts]
    seen, shown_s = dict.fromkeys(begun, 0), dict.fromkeys(begun, 0.0)
    latencies: list[float] = []
    gaps: list[float] = []
    while any(one.finish_reason is None for one in begun):
        changed = llm.engine.step()
        now_s = time.perf_counter()
        for one in changed:
            num_fresh = len(one.new_tokens) - seen[one]
            # The first token waits for its prompt, which is no latency of decoding.
            if seen[one]:
                latencies += [(now_s - shown_s[one]) / num_fresh] * num_fresh
                gaps.append(now_s - shown_s[one])
            seen[one], shown_s[one] = len(one.new_tokens), now_s
    wall_time_s = time.perf_counter() - started_s
    return BatchRun(wall_time_s, [tuple(one.new_tokens) for one in begun], tuple(latencies), tuple(gaps))


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of the means of resampled ratios."""
    generator = random.Random(0)
    means = sorted(statistics.mean(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return means[49], means[-50]


def percentile(values: Sequence[float], share: float) -> float | None:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None


def measure(model: LoadedModel, prompts: Prompts, *, batch_size: int, num_rounds: int,
            max_new_tokens: int) -> list[dict[str, object]]:  # fmt: skip
    """One row a contender at this batch size."""
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    limits = Limits(max_batch_size=batch_size)
    llms = {
        "plain": LLM(model, build_drafter(model, "plain"), limits=limits),
        "kangaroo": LLM(model, build_drafter(model, "kangaroo"), limits=limits, pace=Pace()),
        "kangaroo, always drafting": LLM(model, build_drafter(model, "kangaroo"), limits=limits),
    }
    peer = TransformersContender(model.folder, eos_ids=frozenset())

    def run_peer(batch: Prompts) -> BatchRun:
        started_s = time.perf_counter()
        texts = peer.generate_batch(batch, max_new_tokens=max_new_tokens)
        return BatchRun(time.perf_counter() - started_s, texts)

    run_by: dict[str, Callable[[Prompts], BatchRun]] = {"transformers": run_peer}
    for name, llm in llms.items():
        run_by[name] = lambda batch, llm=llm: run_engine(llm, batch, params)  # type: ignore[misc]
    runs: dict[str, list[BatchRun]] = {name: [] for name in run_by}
    for run in run_by.values():
        run(prompts[:batch_size])
    for round_id in range(num_rounds):
        batch = [prompts[(round_id * batch_size + index) % len(prompts)] for index in range(batch_size)]
        order = list(run_by)
        random.Random(round_id).shuffle(order)
        for name in order:
            runs[name].append(run_by[name](batch))
    rows = []
    for name, mine in runs.items():
        ratios = [one.tokens_per_s / other.tokens_per_s for one, other in zip(mine, runs["plain"], strict=True)]
        latencies = [value for one in mine for value in one.latencies_s]
        pace = llms[name].engine.pace if name in llms else None
        rows.append({
            "batch_size": batch_size,
            "contender": name,
            "tokens_per_s": statistics.median(one.tokens_per_s for one in mine),
            "ratio_to_plain": statistics.mean(ratios),
            "interval": interval(ratios),
            "latency_p50_s": percentile(latencies, 0.5),
            "latency_p99_s": percentile(latencies, 0.99),
            "gap_p99_s": percentile([value for one in mine for value in one.gaps_s], 0.99),
            "share_drafting": pace.num_drafting / pace.num_steps if pace else None,
            "num_texts": sum(len(one.texts) for one in mine),
            "num_equal": sum(a == b for one, other in zip(mine, runs["plain"], strict=True)
                             for a, b in zip(one.texts, other.texts, strict=True)),
        })  # fmt: skip
    return rows


def describe(row: dict[str, object]) -> list[object]:
    low, high = row["interval"]  # type: ignore[misc]
    milliseconds = [None if row[name] is None else f"{1000 * row[name]:.2f}"  # type: ignore[operator]
                    for name in ("latency_p50_s", "latency_p99_s", "gap_p99_s")]  # fmt: skip
    share = row["share_drafting"]
    return [row["batch_size"], row["contender"], f"{row['tokens_per_s']:.0f}", f"{row['ratio_to_plain']:.2f}",
            f"{low:.2f} to {high:.2f}", *("" if one is None else one for one in milliseconds),
            "" if share is None else f"{share:.0%}", f"{row['num_equal']}/{row['num_texts']}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num-rounds", type=int, default=9)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/batching"))
    args = parser.parse_args()
    model = load_model("demo", dtype=args.dtype)
    prompts = [tuple(model.tokenizer.encode(prompt.text)) for prompt in read_prompts(args.prompts)]
    random.Random(0).shuffle(prompts)
    rows: list[dict[str, object]] = []
    for batch_size in BATCH_SIZES:
        rows += measure(model, prompts, batch_size=batch_size, num_rounds=args.num_rounds,
                        max_new_tokens=args.max_new_tokens)  # fmt: skip
        print(markdown_table(["", *[""] * 9], [describe(row) for row in rows[-4:]]), flush=True)
    facts = stamp()
    header = ["batch", "contender", "tokens/s", "ratio to plain", "95% interval", "p50 ms a token", "p99 ms a token",
              "p99 ms between emissions",
              "steps that drafted", "texts equal plain's"]  # fmt: skip
    text = "\n\n".join([
        "# Batches", stamp_text(facts),
        f"The bundled model, greedy, {args.max_new_tokens} tokens a text, {args.num_rounds} rounds; tokens a second "
        "span prefill and decoding; ratios are means over rounds, with a bootstrap interval. Latency is the time "
        "between two emissions of a text, shared by the tokens of the second; beside it, the time not shared.",
        markdown_table(header, [describe(row) for row in rows]),
        "`kangaroo` adapts the depth of its drafts to what steps of the batch size cost (engine/pace.py); transformers "
        "pads prompts on the left and does not promise plain's texts.",
    ])  # fmt: skip
    write_result(args.output, {"stamp": facts, "rows": rows}, text=text)
    print(text)


if __name__ == "__main__":
    main()

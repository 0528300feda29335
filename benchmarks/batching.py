"""Batches: tokens a second and latency of plain decoding, Kangaroo and transformers' padded batches.

    python benchmarks/batching.py --prompts HumanEval.jsonl.gz

For every batch size the engines decode the same queue of prompts in slices of a few milliseconds, taking turns, so that
what disturbs the machine disturbs all alike; each one's time is the sum of its slices. A queue holds several batches:
where a text ends another takes its place. transformers has a round to itself, of one batch.
Ratios are of one round, with a bootstrap interval over rounds.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from kangaroo.bench.contenders import TokenClock, TransformersContender
from kangaroo.bench.prompts import read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.types import SamplingParams

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# How long an engine runs before it is another's turn, and rounds of transformers, the one that warms up included.
SLICE_S, NUM_PEER_ROUNDS = 0.02, 4
# Texts of a round, in batches. Speculation ends the texts of a batch one by one, and without others to take their place
# the last of them, those hardest to guess, would be decoded alone.
QUEUE_BATCHES = 3
# Small batches have more rounds, so that each batch size decodes at least so many texts.
MIN_TEXTS = 48
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


@dataclass
class Watch:
    """An engine decoding a batch of its own, and when its tokens came, in seconds of its own slices."""

    llm: LLM
    begun: list[Decoding] = field(default_factory=list)
    clock_s: float = 0.0
    shown: dict[Decoding, tuple[int, float]] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return all(one.finish_reason is not None for one in self.begun)

    def submit(self, prompts: Prompts, params: SamplingParams) -> None:
        started_s = time.perf_counter()
        self.begun = [self.llm.submit(prompt, params)[0] for prompt in prompts]
        self.clock_s += time.perf_counter() - started_s

    def run_slice(self) -> None:
        """Steps until SLICE_S have passed."""
        stop_s = self.clock_s + SLICE_S
        while self.clock_s < stop_s and not self.is_done:
            started_s = time.perf_counter()
            changed = self.llm.engine.step()
            self.clock_s += time.perf_counter() - started_s
            for one in changed:
                self._note(one)

    def _note(self, one: Decoding) -> None:
        num_seen, shown_s = self.shown.get(one, (0, 0.0))
        num_fresh = len(one.new_tokens) - num_seen
        # The first token waits for its prompt, which is no latency of decoding.
        if num_seen and num_fresh:
            self.latencies_s += [(self.clock_s - shown_s) / num_fresh] * num_fresh
            self.gaps_s.append(self.clock_s - shown_s)
        self.shown[one] = len(one.new_tokens), self.clock_s

    @property
    def run(self) -> BatchRun:
        texts = [tuple(one.new_tokens) for one in self.begun]
        return BatchRun(self.clock_s, texts, tuple(self.latencies_s), tuple(self.gaps_s))


def run_engines(
    llms: dict[str, LLM], prompts: Prompts, params: SamplingParams, *, round_id: int
) -> dict[str, BatchRun]:
    """Every engine decodes all prompts together, slice by slice in turns."""
    watches = {name: Watch(llm) for name, llm in llms.items()}
    order = random.Random(round_id).sample(list(watches), len(watches))
    for name in order:
        watches[name].submit(prompts, params)
    while not all(watch.is_done for watch in watches.values()):
        for name in order:
            watches[name].run_slice()
    return {name: watch.run for name, watch in watches.items()}


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of the means of resampled ratios."""
    generator = random.Random(0)
    means = sorted(statistics.mean(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return means[49], means[-50]


def percentile(values: Sequence[float], share: float) -> float | None:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None


def run_peer(peer: TransformersContender, prompts: Prompts, *, max_new_tokens: int) -> BatchRun:
    """One padded batch; no text ends before the others, so that every step brings each of them a token."""
    clock, started_s = TokenClock(), time.perf_counter()
    texts = peer.generate_batch(prompts, max_new_tokens=max_new_tokens, clock=clock)
    wall_time_s = time.perf_counter() - started_s
    # Behind the prompts and the first tokens, which wait for them.
    gaps_s = tuple(after - before for before, after in pairwise(clock.times_s[1:]))
    return BatchRun(wall_time_s, texts, gaps_s, gaps_s)


def measure(model: LoadedModel, peer: TransformersContender, *, prompts: Prompts, batch_size: int, num_rounds: int,
            max_new_tokens: int) -> list[dict[str, object]]:  # fmt: skip
    """One row a contender at this batch size."""
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    limits = Limits(max_batch_size=batch_size)
    llms = {
        "plain": LLM(model, build_drafter(model, "plain"), limits=limits),
        "kangaroo": LLM(model, build_drafter(model, "kangaroo"), limits=limits, pace=Pace()),
        "kangaroo, always drafting": LLM(model, build_drafter(model, "kangaroo"), limits=limits),
    }
    runs: dict[str, list[BatchRun]] = {name: [] for name in llms} | {"transformers": []}
    # The first round warms up, and lets the pace learn.
    for round_id in range(num_rounds + 1):
        num_texts = QUEUE_BATCHES * batch_size
        queue = [prompts[(round_id * num_texts + index) % len(prompts)] for index in range(num_texts)]
        for name, run in run_engines(llms, queue, params, round_id=round_id).items():
            runs[name] += [run] if round_id else []
        if round_id < NUM_PEER_ROUNDS:
            runs["transformers"].append(run_peer(peer, queue[:batch_size], max_new_tokens=max_new_tokens))
    runs["transformers"] = runs["transformers"][1:]
    rows = []
    for name, mine in runs.items():
        ratios = [one.tokens_per_s / other.tokens_per_s for one, other in zip(mine, runs["plain"], strict=False)]
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
            "num_equal": sum(a == b for one, other in zip(mine, runs["plain"], strict=False)
                             for a, b in zip(one.texts, other.texts, strict=name in llms)),
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
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--num-rounds", type=int, default=9)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/batching"))
    args = parser.parse_args()
    model = load_model("demo", dtype=args.dtype)
    prompts = [tuple(model.tokenizer.encode(prompt.text)) for prompt in read_prompts(args.prompts)]
    random.Random(0).shuffle(prompts)
    rows: list[dict[str, object]] = []
    peer = TransformersContender(model.folder, eos_ids=frozenset())
    for batch_size in args.batch_sizes:
        num_rounds = max(args.num_rounds, MIN_TEXTS // (QUEUE_BATCHES * batch_size))
        rows += measure(model, peer, prompts=prompts, batch_size=batch_size, num_rounds=num_rounds,
                        max_new_tokens=args.max_new_tokens)  # fmt: skip
        print(markdown_table(["", *[""] * 9], [describe(row) for row in rows[-4:]]), flush=True)
    facts = stamp()
    header = ["batch", "contender", "tokens/s", "ratio to plain", "95% interval", "p50 ms a token", "p99 ms a token",
              "p99 ms between emissions",
              "steps that drafted", "texts equal plain's"]  # fmt: skip
    text = "\n\n".join([
        "# Batches", stamp_text(facts),
        f"The bundled model, greedy, {args.max_new_tokens} tokens a text, at least {args.num_rounds} rounds of "
        f"{QUEUE_BATCHES} texts for each place in the batch, and {MIN_TEXTS} texts; tokens a second span prefill and "
        "decoding; ratios are means over rounds, with a bootstrap interval. The engines take turns every few "
        "milliseconds; a warm-up round, in which the pace learns, is left out. Latency is the time between two "
        "emissions of a text, shared by the tokens of the second, and the prompts that are read meanwhile are in it; "
        f"beside it, the time not shared. transformers has {NUM_PEER_ROUNDS - 1} rounds of one batch each, so that "
        "it reads no prompts between its tokens.",
        markdown_table(header, [describe(row) for row in rows]),
        "`kangaroo` adapts the depth of its drafts to what steps of the batch size cost (engine/pace.py); transformers "
        "pads prompts on the left and does not promise plain's texts.",
    ])  # fmt: skip
    write_result(args.output, {"stamp": facts, "rows": rows}, text=text)
    print(text)


if __name__ == "__main__":
    main()

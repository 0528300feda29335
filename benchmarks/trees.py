"""Trees against chains: tokens a step and wall-clock time at one, two, three and six siblings.

    python benchmarks/trees.py --prompts HumanEval.jsonl.gz

Contenders are interleaved prompt by prompt in one process, after a warm-up; times span prefill and decoding.
"""

import argparse
import statistics
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from kangaroo.bench.comparison import compare, interleave
from kangaroo.bench.contenders import KangarooContender
from kangaroo.bench.prompts import read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.drafters.base import MAX_NODES, Prices, Sequence
from kangaroo.drafters.settings import KangarooSettings, MedusaSettings
from kangaroo.engine.pace import Pace
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.types import Draft, Outcome, SamplingParams

NUM_SIBLINGS = (1, 2, 3, 6)
ETAS = (0.3, 0.1)
MEDUSA_SIBLINGS = (1, 3)


class Priced(Pace):
    """Drafts always, at a price of nodes that was measured before."""

    def __init__(self, price: float) -> None:
        super().__init__()
        self.prices = Prices(branch=price, chain=price)

    def limit(self, sequences: SequenceOf[Sequence]) -> int:
        """As deep as the drafter will."""
        return MAX_NODES

    def observe(self, draft: Draft, outcome: Outcome, *, draft_time_s: float, verify_time_s: float) -> None:
        """Nothing more to learn."""


def measure_price(model: LoadedModel, prompts: list[tuple[int, ...]]) -> float:
    """The price that a pace arrives at over these prompts."""
    pace = Pace()
    llm = LLM(model, build_drafter(model, KangarooSettings(num_siblings=2, eta=0.1)), pace=pace)
    prices = []
    for prompt in prompts:
        llm.generate(prompt, SamplingParams(max_new_tokens=128))
        prices.append(pace.prices.branch)
    return statistics.median(prices)


def name_of(settings: KangarooSettings | MedusaSettings) -> str:
    """Drafter, siblings and eta, separated by spaces."""
    return f"{settings.name} {settings.num_siblings} {settings.eta}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=41)
    parser.add_argument("--num-rounds", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/trees"))
    args = parser.parse_args()
    model = load_model("demo", dtype=args.dtype)
    every = read_prompts(args.prompts)
    prompts = [tuple(model.tokenizer.encode(one.text)) for one in every[:: max(1, len(every) // args.num_prompts)]]
    price = measure_price(model, prompts[:12])
    drafters: list[KangarooSettings | MedusaSettings] = [
        *(KangarooSettings(eta=eta, num_siblings=num_siblings) for eta in ETAS for num_siblings in NUM_SIBLINGS),
        *(MedusaSettings(num_siblings=num_siblings) for num_siblings in MEDUSA_SIBLINGS),
    ]
    contenders = [KangarooContender("plain", LLM(model, build_drafter(model, "plain")))]
    for settings in drafters:
        llm = LLM(model, build_drafter(model, settings), pace=Priced(price))
        contenders.append(KangarooContender(name_of(settings), llm))
    runs = interleave(contenders, prompts, num_rounds=args.num_rounds, max_new_tokens=128)
    rows = compare(runs, "plain")
    chain = {row["contender"]: row for row in rows}["kangaroo 1 0.3"]
    cells: list[list[object]] = []
    for row in rows[1:]:
        drafter, num_siblings, eta = str(row["contender"]).split()
        completions = [run.completion for run in runs[str(row["contender"])] if run.completion]
        drafted = sum(one.num_drafted for one in completions) / sum(one.num_steps for one in completions)
        row |= {"drafter": drafter, "num_siblings": int(num_siblings), "eta": float(eta), "nodes_per_step": drafted}
        cells.append([drafter, num_siblings, eta, f"{drafted:.1f}", f"{row['tokens_per_step']:.2f}",
                      f"{row['tokens_per_step'] / chain['tokens_per_step'] - 1:+.0%}",  # type: ignore[operator]
                      f"{row['ratio']:.2f}", f"{row['num_equal']}/{row['num_texts']}"])  # fmt: skip
    facts = stamp()
    text = "\n\n".join([
        "# Trees against chains", stamp_text(facts),
        f"The bundled model, its adapter and Medusa heads, greedy, {args.dtype}, {len(prompts)} prompts, 128 "
        "tokens, drafting in every step. A node joins a tree where its chance of being accepted exceeds "
        f"{price:.3f}, what one more row was measured to cost in plain steps (engine/pace.py).",
        markdown_table(["drafter", "siblings", "eta", "nodes drafted a step", "tokens a step",
                        "to Kangaroo's chain at eta 0.3", "speedup over plain", "texts equal plain's"], cells),
    ])  # fmt: skip
    write_result(args.output, {"stamp": facts, "rows": rows}, text=text)
    print(text)


if __name__ == "__main__":
    main()

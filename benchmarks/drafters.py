"""Every drafter on the same prompts: what it costs, what is accepted, and how much faster the text comes.

    python benchmarks/drafters.py --code HumanEval.jsonl.gz --maths gsm8k_test.jsonl --copying question.jsonl
        [--datastore DIR] [--reference FILE ...]

All drafters take turns prompt by prompt in one process, after a warm-up, each with its own defaults and without
adapting to what its drafts bring (engine/pace.py). Copying: the summaries and questions over given documents of
Spec-Bench. Mixed: all prompts again, of the three kinds in turn.
"""

import argparse
import json
import statistics
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from kangaroo.bench.comparison import compare, interleave
from kangaroo.bench.contenders import KangarooContender
from kangaroo.bench.prompts import Prompt, read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.drafters.gate import GatedDrafter
from kangaroo.drafters.settings import AutoSettings, PromptLookupSettings, RetrievalSettings
from kangaroo.llm import LLM, build_drafter
from kangaroo.model.cache import depths_of
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.types import Completion, Draft, Outcome

COPYING = ("summarization", "rag")
DEPTHS = (1, 2, 3, 4, 6)
# What was trained, by its folder beside the model, and the additional parameters that the abstract of arXiv 2404.18911
# names for Kangaroo and for Medusa-1.
TRAINED = {"kangaroo": "adapter", "medusa": "medusa"}
PAPER_PARAMETERS = {"kangaroo": 67e6, "medusa": 591e6}
# The longest prompts are cut: the bundled model's context is 4,096 tokens.
MAX_PROMPT_TOKENS = 1024


class CountedDrafter:
    """A drafter whose levels are counted, text by text: one number for each, the warm-up's first."""

    def __init__(self, drafter: Drafter) -> None:
        self.name = drafter.name
        self.num_levels: list[int] = []
        self._drafter = drafter

    @property
    def taps(self) -> tuple[int, ...]:
        """The drafter's, as they are now."""
        return self._drafter.taps

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        """Pass on, and begin to count anew."""
        self.num_levels.append(0)
        self._drafter.begin(sequences, num_slots=num_slots)

    def draft(self, batch: Batch) -> Draft:
        """Pass on, and count the draft's levels."""
        draft = self._drafter.draft(batch)
        self.num_levels[-1] += max(depths_of(draft.parents[0]))
        return draft

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        """Pass on."""
        self._drafter.accept(sequences, outcome)

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        """Pass on."""
        self._drafter.end(sequences)


def build_all(model: LoadedModel, datastore: str | None, references: tuple[str, ...]) -> dict[str, Drafter]:
    """Every drafter the bundled model can have."""
    names = ["plain", "kangaroo", "layer_skip", "medusa", "draft_model", "prompt_lookup"]
    drafters: dict[str, Drafter] = {name: build_drafter(model, name) for name in names}
    drafters["auto"] = build_drafter(model, AutoSettings(references=references))
    drafters["kangaroo behind a gate of 0.3"] = GatedDrafter(
        model.target, build_drafter(model, "kangaroo"), threshold=0.3
    )
    if references:
        drafters["prompt_lookup with references"] = build_drafter(model, PromptLookupSettings(references=references))
    if datastore is not None:
        drafters["retrieval"] = build_drafter(model, RetrievalSettings(datastore=datastore))
        settings = AutoSettings(datastore=datastore, references=references)
        drafters["auto with retrieval"] = build_drafter(model, settings)
    return drafters


def num_parameters(model: LoadedModel, name: str) -> int:
    """Weights a drafter adds to the target's."""
    from safetensors import safe_open

    files = {"kangaroo": model.folder / "adapter" / "adapter.safetensors",
             "medusa": model.folder / "medusa" / "heads.safetensors",
             "draft_model": model.folder / "draft_model" / "model.safetensors"}  # fmt: skip
    total = 0
    for path in [path for owner, path in files.items() if owner in name or "auto" in name]:
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(key).numel() for key in file.keys())
    return total


def describe(texts: list[Completion], num_levels: int, plain_step_s: float) -> dict[str, object]:
    """What a drafter's texts tell, for which it drafted so many levels."""
    accepted = [length - 1 for one in texts for length in one.accepted_lengths]
    num_steps, num_drafted = len(accepted), sum(one.num_drafted for one in texts)
    share = sum(one.draft_time_s for one in texts) / num_levels / plain_step_s if num_levels else 0.0
    tokens_per_step = sum(one.num_new_tokens - 1 for one in texts) / num_steps
    levels = num_levels / num_steps
    return {
        "acceptance_rate": sum(accepted) / num_drafted if num_drafted else None,
        "ctar": {depth: sum(one >= depth for one in accepted) / num_steps for depth in DEPTHS},
        "levels_per_step": levels,
        "draft_level_share": share,
        "ideal": tokens_per_step / (1 + levels * share),
    }


def measure(model: LoadedModel, prompts: list[tuple[int, ...]], args: argparse.Namespace) -> list[dict[str, object]]:
    """One row a drafter on these prompts."""
    counted = {
        name: CountedDrafter(drafter)
        for name, drafter in build_all(model, args.datastore, tuple(args.reference)).items()
    }
    contenders = [KangarooContender(name, LLM(model, drafter)) for name, drafter in counted.items()]
    runs = interleave(contenders, prompts, num_rounds=1, max_new_tokens=args.max_new_tokens)
    plain = [run.completion for run in runs["plain"] if run.completion]
    plain_step_s = statistics.median(one.decode_time_s / max(one.num_steps, 1) for one in plain)
    rows = []
    for row in compare(runs, "plain"):
        name = str(row["contender"])
        mine = [run.completion for run in runs[name] if run.completion]
        # Decoding alone: prompts are read alike by all.
        speeds = [a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, plain, strict=True)
                  if a.tokens_per_s and b.tokens_per_s]  # fmt: skip
        row["speedup"], row["overall_speedup"] = statistics.median(speeds), rate(mine) / rate(plain)
        row["num_parameters"] = num_parameters(model, name)
        _, *num_levels = counted[name].num_levels
        assert len(num_levels) == len(mine)
        rows.append(row | describe(mine, sum(num_levels), plain_step_s))
    return rows


def rate(texts: list[Completion]) -> float:
    """Decoded tokens a second of all texts together."""
    return sum(one.num_new_tokens - 1 for one in texts) / sum(one.decode_time_s for one in texts)


def encode(model: LoadedModel, prompts: list[Prompt], limit: int) -> list[tuple[int, ...]]:
    """Evenly spaced prompts as token ids."""
    chosen = prompts[:: max(1, len(prompts) // limit)][:limit]
    return [tuple(model.tokenizer.encode(prompt.text)[-MAX_PROMPT_TOKENS:]) for prompt in chosen]


def table(rows: list[dict[str, object]]) -> str:
    header = ["drafter", "extra parameters", "tokens a step", *(f"CTAR@{depth}" for depth in DEPTHS), "accepted",
              "levels a step", "a level costs", "ideal", "speedup", "overall", "equal"]  # fmt: skip
    cells = []
    for row in rows:
        rate, ctar = row["acceptance_rate"], row["ctar"]
        assert isinstance(ctar, dict)
        cells.append([row["contender"], f"{row['num_parameters']:,}", f"{row['tokens_per_step']:.2f}",
                      *(f"{ctar[depth]:.2f}" for depth in DEPTHS), "" if rate is None else f"{rate:.0%}",
                      f"{row['levels_per_step']:.2f}", f"{row['draft_level_share']:.3f}", f"{row['ideal']:.2f}x",
                      f"{row['speedup']:.2f}x", f"{row['overall_speedup']:.2f}x",
                      f"{row['num_equal']}/{row['num_texts']}"])  # fmt: skip
    return markdown_table(header, cells)


def compare_trained(model: LoadedModel, rows: list[dict[str, object]]) -> list[dict[str, Any]]:
    """What Kangaroo's adapter and Medusa's heads took to train, and what they brought by these rows."""
    by_name = {row["contender"]: row for row in rows}
    compared = []
    for name, folder in TRAINED.items():
        report = json.loads((model.folder / folder / "report.json").read_text(encoding="utf-8"))
        facts = {key: report[key] for key in ("num_parameters", "num_tokens_seen", "wall_time_s", "num_threads")}
        brought = {key: by_name[name][key] for key in ("tokens_per_step", "overall_speedup")}
        compared.append({"drafter": name} | facts | brought)
    return compared


def compared_text(compared: list[dict[str, Any]]) -> str:
    """The section on Kangaroo and Medusa, the paper's figures beside ours."""
    sizes = {one["drafter"]: one["num_parameters"] for one in compared}
    cells = []
    for one in compared:
        name = one["drafter"]
        cells.append([name, f"{sizes[name]:,}", f"{PAPER_PARAMETERS[name] / 1e6:.0f}M", f"{one['num_tokens_seen']:,}",
                      f"{one['wall_time_s'] / 60:.0f}", one["num_threads"], f"{one['tokens_per_step']:.2f}",
                      f"{one['overall_speedup']:.2f}x"])  # fmt: skip
    return "\n\n".join([
        "## Kangaroo against Medusa",
        "What was trained for the bundled model, by its training reports, and what it brought on the mixed prompts. "
        f"Kangaroo's extra parameters against Medusa's: {sizes['kangaroo'] / sizes['medusa'] - 1:+.1%} here, "
        f"{PAPER_PARAMETERS['kangaroo'] / PAPER_PARAMETERS['medusa'] - 1:+.1%} in the paper's abstract "
        "(arXiv 2404.18911).",
        markdown_table(["drafter", "extra parameters", "the paper's", "training tokens", "training minutes",
                        "training threads", "tokens a step", "overall"], cells),
    ])  # fmt: skip


def plot(tables: dict[str, list[dict[str, object]]], path: Path) -> None:
    """Measured and ideal speedup of every drafter on every kind of prompt."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(5 * len(tables), 4), sharey=True)
    for axis, (kind, rows) in zip(axes, tables.items(), strict=True):
        names = [str(row["contender"]) for row in rows]
        places = range(len(names))
        axis.barh(places, [row["ideal"] for row in rows], color="#cfd8dc", label="ideal")
        axis.barh(places, [row["speedup"] for row in rows], color="#1f6f54", height=0.5, label="measured")
        axis.set_yticks(list(places), names)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(kind)
        axis.set_xlabel("speedup over plain decoding")
    axes[0].legend(loc="lower right")
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--code", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--maths", type=Path, required=True, help="GSM8K, JSON lines with a question")
    parser.add_argument("--copying", type=Path, required=True, help="Spec-Bench's question.jsonl")
    parser.add_argument("--datastore", help="a folder made by `kangaroo datastore build`")
    parser.add_argument("--reference", action="append", default=[], help="a text for prompt lookup to look in (LLMA)")
    parser.add_argument("--num-prompts", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/drafters"))
    args = parser.parse_args()
    model = load_model("demo")
    copying = [one for one in read_prompts(args.copying) if one.fields.get("category") in COPYING]
    kinds = {"code": read_prompts(args.code), "maths": read_prompts(args.maths), "copying": copying}
    encoded = {kind: encode(model, prompts, args.num_prompts) for kind, prompts in kinds.items()}
    encoded["mixed"] = [prompt for several in zip(*encoded.values(), strict=True) for prompt in several]
    tables = {kind: measure(model, prompts, args) for kind, prompts in encoded.items()}
    compared = compare_trained(model, tables["mixed"])
    facts = stamp()
    text = "\n\n".join([
        "# Drafters", stamp_text(facts),
        f"The bundled model, greedy, float32, batch size 1, {args.num_prompts} prompts of each kind, "
        f"{args.max_new_tokens} tokens. A level is one more token of depth; its cost is the drafter's time a level "
        "over a plain step. Ideal: tokens a step / (1 + levels a step x cost of a level), as if verification cost what "
        "a plain step does. Speedups are of decoding without the prompt: the median of the texts, and overall, by the "
        "sums of tokens and times. Mixed are all prompts again, of the three kinds in turn.",
        *(f"## {kind.capitalize()}\n\n{table(rows)}" for kind, rows in tables.items()),
        compared_text(compared),
        f"![Speedups]({args.output.name}.png)",
    ])  # fmt: skip
    write_result(args.output, {"stamp": facts, "tables": tables, "kangaroo_against_medusa": compared}, text=text)
    plot(tables, args.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()

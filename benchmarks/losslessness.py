"""Is Kangaroo plain decoding to the bit, on every HumanEval prompt and in every dtype, and what does a step bring?

    python benchmarks/losslessness.py --prompts HumanEval.jsonl.gz

Token ids and the logits of every position are compared with those of plain decoding, one token per pass. So that a
looping model cannot flatter the result, it also gives the share of repeated 8-grams in the output and tokens per step
teacher-forced on the canonical solutions, text the model did not choose. Fails where no step accepted nothing, a part
or all of its draft, so that each is known to have been tried, and on native kernels where anything differs.
"""

import argparse
import sys
from pathlib import Path

import torch

from kangaroo.bench.agreement import count_steps, judge_adapter, repeated_share
from kangaroo.bench.check import Checker
from kangaroo.bench.divergence import shared_length
from kangaroo.bench.losslessness import Problem, list_differing, summarize
from kangaroo.bench.prompts import Prompt, read_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.bench.texts import Text
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.settings import KangarooSettings
from kangaroo.kernels import REFERENCE
from kangaroo.llm import build_drafter
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.types import SamplingParams

DTYPES, WEIGHTS = ("float32", "bfloat16", "float16"), ("int8",)
HEADER = ["storage", "draft", "tokens equal", "logits equal", "positions equal", "tokens per step", "acceptance rate",
          "steps accepting all / part / none", "repeated 8-grams", "teacher-forced tokens per step"]  # fmt: skip
NOTE = (
    "Greedy, {} tokens a prompt. `tokens equal`: prompts whose token ids are plain decoding's; `logits equal`: those "
    "whose logits are too, bit for bit at every position; `positions equal`: the same by position. Teacher-forced: "
    "gamma 6 on the canonical solutions, positions judged with the true prefix."
)


def measure(model: LoadedModel, prompts: list[Prompt], *, settings: KangarooSettings,
            max_new_tokens: int) -> list[Problem]:  # fmt: skip
    """Every problem's check, repetition, teacher-forced counts."""
    adapter = Adapter.load(Path(settings.adapter or model.adapter_folder), model.target)
    results = Checker(model, build_drafter(model, settings)).check_all(prompts, SamplingParams(max_new_tokens))
    measured = []
    for prompt, result in zip(prompts, results, strict=True):
        text = model.tokenizer.encode(prompt.text + prompt.fields["canonical_solution"])
        # A token may span the end of the prompt.
        num_prompt = shared_length(model.tokenizer.encode(prompt.text), text)
        judged = judge_adapter(model.target, adapter, text=Text(tuple(text), num_prompt))
        forced = count_steps([judged], gamma=6, eta=0.0)
        measured.append(Problem(result, repeated_share(result.plain.token_ids), forced.num_tokens, forced.num_steps))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--adapter")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only these; repeatable")
    parser.add_argument("--weights", action="append", choices=WEIGHTS, help="only these; repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-prompts", type=int, default=None, help="only the first few")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/losslessness"))
    args = parser.parse_args()
    prompts = read_prompts(args.prompts, limit=args.num_prompts)
    facts = stamp()
    result: dict[str, object] = {"stamp": facts}
    table, differing, untried, unequal = [], [], [], []
    for storage in [*(args.dtype or []), *(args.weights or [])] or [*DTYPES, *WEIGHTS]:
        kept_in = {"weights": storage} if storage in WEIGHTS else {"dtype": storage}
        model = load_model(args.model, **kept_in)
        for draft, eta in {"gamma 6, eta 0": 0.0, "gamma 6, the adapter's own eta": None}.items():
            settings = KangarooSettings(adapter=args.adapter, gamma=6, eta=eta)
            with torch.inference_mode():
                measured = measure(model, prompts, settings=settings, max_new_tokens=args.max_new_tokens)
            label, summary = f"{storage}, {draft}", summarize(measured)
            result[label] = {"summary": summary, "problems": [one.to_dict() for one in measured]}
            rates = [summary[name] for name in ("tokens_per_step", "acceptance_rate", "repeated_8_grams",
                                                "teacher_forced_tokens_per_step")]  # fmt: skip
            shown = ["-" if rate is None else f"{rate:.3f}" for rate in rates]
            counts = [summary["accepted_of_draft"][name] for name in ("all", "part", "none")]
            equal = [f"{summary[f'num_{what}_identical']}/{len(measured)}" for what in ("tokens", "logits")]
            positions = f"{summary['num_positions_identical']}/{summary['num_positions']}"
            table.append([storage, draft, *equal, positions, *shown[:2], " / ".join(map(str, counts)), *shown[2:]])
            differing += [f"### {label}", "\n".join(list_differing(measured)) or "None."]
            untried += [label] * (0 in counts)
            unequal += [label] * any(not one.result.identical for one in measured)
            print(" | ".join(map(str, table[-1])), file=sys.stderr, flush=True)
    sections = ["# Losslessness on HumanEval", stamp_text(facts), NOTE.format(args.max_new_tokens),
                markdown_table(HEADER, table), "## Texts that differ", *differing]  # fmt: skip
    text = "\n\n".join(sections)
    write_result(args.output, result, text=text)
    print(text)
    if untried:
        sys.exit(f"no step accepted nothing, a part or all of its draft: {'; '.join(untried)}")
    if unequal and facts["kernel_backend"] != REFERENCE:
        sys.exit(f"tokens or logits are not plain decoding's: {'; '.join(unequal)}")


if __name__ == "__main__":
    main()

"""Is Kangaroo's text plain decoding's, on every HumanEval prompt, and how much does each step bring?

    python benchmarks/losslessness.py --prompts HumanEval.jsonl.gz

So that a looping model cannot flatter the result, it also gives the share of repeated 8-grams in the output and
tokens per step teacher-forced on the canonical solutions, text the model did not choose.
"""

import argparse
import gzip
import json
from dataclasses import asdict
from pathlib import Path

import torch

from kangaroo.bench.agreement import count_forced_steps, repeated_share
from kangaroo.bench.divergence import find_divergence, shared_length
from kangaroo.bench.losslessness import Problem, list_differing, summarize
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.kangaroo import KangarooSettings
from kangaroo.llm import LLM, LoadedModel, build_drafter, load_model
from kangaroo.types import SamplingParams


def measure(model: LoadedModel, problems: list[dict[str, str]], *, settings: KangarooSettings,
            max_new_tokens: int) -> list[Problem]:  # fmt: skip
    """Every problem's divergence, counts, repetition, teacher-forced counts."""
    plain = LLM(model, build_drafter(model, "plain"))
    kangaroo = LLM(model, build_drafter(model, settings))
    adapter = Adapter.load(Path(settings.adapter or model.adapter_folder), model.target)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    measured = []
    for problem in problems:
        prompt = tuple(model.tokenizer.encode(problem["prompt"]))
        ours, expected = kangaroo.generate(prompt, params), plain.generate(prompt, params)
        text = model.tokenizer.encode(problem["prompt"] + problem["canonical_solution"])
        # A token may span the end of the prompt.
        num_prompt = shared_length(prompt, text)
        forced = count_forced_steps(model.target, adapter, token_ids=text, num_prompt=num_prompt, gamma=6)
        measured.append(
            Problem(
                task_id=problem["task_id"],
                num_new_tokens=ours.num_new_tokens,
                num_steps=ours.num_steps,
                num_drafted=ours.num_drafted,
                num_accepted=ours.num_accepted,
                repeated_8_grams=repeated_share(expected.token_ids),
                num_forced_tokens=forced[0],
                num_forced_steps=forced[1],
                divergence=find_divergence(model.target, prompt, first=expected.token_ids, second=ours.token_ids),
            )
        )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--adapter")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-prompts", type=int, default=None, help="only the first few")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/losslessness"))
    args = parser.parse_args()
    model = load_model(args.model)
    with gzip.open(args.prompts, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file][: args.num_prompts]
    result: dict[str, object] = {"stamp": stamp()}
    table, differing = [], []
    with torch.inference_mode():
        for eta in (0.0, None):
            settings = KangarooSettings(adapter=args.adapter, gamma=6, eta=eta)
            measured = measure(model, problems, settings=settings, max_new_tokens=args.max_new_tokens)
            label = "gamma 6, eta 0" if eta == 0 else "gamma 6, the adapter's own eta"
            summary = summarize(measured)
            result[label] = {"summary": summary, "problems": [asdict(one) for one in measured]}
            rates = ("-" if value is None else f"{value:.3f}" for value in list(summary.values())[2:])
            table.append([label, f"{summary['num_equal']}/{len(measured)}", *rates])
            differing += [f"### {label}", "\n".join(list_differing(measured)) or "None."]
    header = [
        "draft",
        "equal",
        "tokens per step",
        "acceptance rate",
        "repeated 8-grams",
        "teacher-forced tokens per step",
    ]
    facts = result["stamp"]
    assert isinstance(facts, dict)
    text = "\n\n".join([
        "# Losslessness on HumanEval", stamp_text(facts),
        f"Greedy, float32, {args.max_new_tokens} tokens a prompt. `equal`: token ids are plain decoding's. "
        "Teacher-forced: gamma 6 on the canonical solutions, "
        "positions judged with the true prefix.", markdown_table(header, table),
        "## Texts that differ", *differing,
    ])  # fmt: skip
    write_result(args.output, result, text=text)
    print(text)


if __name__ == "__main__":
    main()

"""Write the model card of the demo model from the records its making left.

    python recipes/card.py --corpus build/demo/corpus --state build/demo/target --model build/demo/model \
        --adapter build/demo/adapter --medusa build/demo/medusa --draft-model build/demo/draft_model \
        --skips build/demo/skips [--problems HumanEval.jsonl.gz] --output kangaroo/assets/demo/README.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

from evaluate import measure

from kangaroo.bench.environment import environment
from kangaroo.model.checkpoint import load_model

NUM_LISTED = 24


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def describe_model(config: dict[str, Any], *, num_parameters: int) -> str:
    return (
        f"A deep and thin Llama: {config['num_hidden_layers']} layers, D {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, MLP {config['intermediate_size']}, vocabulary "
        f"{config['vocab_size']:,} (byte-level BPE), tied head, context {config['max_position_embeddings']:,}, "
        f"{num_parameters / 1e6:.1f}M parameters in bfloat16. It continues Python. It exists to show and test "
        "Kangaroo offline; it is far too small to be of other use, and it repeats itself on long texts."
    )


def describe_data(corpus: dict[str, Any]) -> str:
    largest = sorted(corpus["distributions"], key=lambda one: -one["bytes"])
    rows = [f"| {one['name']} {one['version']} | {one['licence']} | {one['files']} | {one['bytes'] / 1e6:.2f} |"
            for one in largest[:NUM_LISTED]]  # fmt: skip
    removed = corpus["removed"].get("shares_text_with_benchmark")
    kept_out = (
        "The HumanEval problems were not kept out."
        if removed is None
        else f"{removed} files that share text with a HumanEval problem or solution were removed."
    )
    return "\n".join([
        f"{corpus['files']:,} files, {corpus['utf8_bytes'] / 1e6:.0f} MB of Python source: the standard library and "
        f"the packages with permissive licences that were installed ({len(corpus['distributions'])} sources; all of "
        "them in corpus.json). Licence headers, generated code and data tables are left out, duplicates and "
        f"near-duplicates removed. {kept_out} Split by file: {corpus['heldout']['files']} files are held out. "
        f"{corpus['heldout_bytes_per_token']:.2f} bytes a token.", "",
        "| source | licence | files | MB |", "| --- | --- | --- | --- |", *rows,
    ])  # fmt: skip


def describe_training(progress: dict[str, Any]) -> str:
    plan, last = progress["plan"], progress["history"][-1]
    facts = environment()
    curve = [f"| {one['num_tokens'] / 1e6:.2f}M | {one['elapsed_s'] / 60:.0f} | {one['held_out_nats_per_byte']:.3f} |"
             for one in progress["history"]]  # fmt: skip
    return "\n".join([
        f"{last['num_tokens'] / 1e6:.2f}M tokens in {last['step']:,} steps and {last['elapsed_s'] / 60:.0f} minutes on "
        f"{facts['cpu_cores']} cores ({facts['cpu']}, torch {facts['torch']}), under one epoch. Sequences of 1,024 "
        "tokens, of 4,096 for the last 8% of the time; matrices by Muon "
        f"({plan['muon_lr']}), the rest by AdamW ({plan['adam_lr']}); constant rate, then linear decay over the second "
        "half; products in bfloat16, weights in float32. No auxiliary early-exit loss.", "",
        "| tokens | minutes | held-out loss, nats per byte |", "| --- | --- | --- |", *curve,
    ])  # fmt: skip


def describe_guesses(metrics: dict[str, Any]) -> str:
    consistent = " / ".join(f"{metrics[f'ctar_{width}']:.3f}" for width in (1, 3, 6))
    return (
        f"top-1 {metrics['top1']:.3f}, top-3 {metrics['top3']:.3f}, expected acceptance "
        f"{metrics['expected_acceptance']:.3f}, CTAR@1/3/6 {consistent}"
    )


def describe_adapter(report: dict[str, Any]) -> str:
    plan = report["plan"]
    return (
        f"Exit layer {plan['exit_layer']}, {report['num_parameters']:,} parameters, trained on the target's own greedy "
        f"continuations of {report['num_documents']:,} pieces of the train split (recipes/continuations.py): "
        f"{report['num_tokens_seen'] / 1e6:.2f}M tokens in {report['wall_time_s'] / 60:.0f} minutes. On held-out "
        f"texts of that kind, teacher-forced: {describe_guesses(report['metrics'])}. The report is adapter/report.json."
    )


def describe_medusa(report: dict[str, Any]) -> str:
    plan, metrics = report["plan"], report["metrics"]
    top1, consistent = (
        " / ".join(f"{metrics[f'{name}_{number}']:.3f}" for number in range(1, plan["num_heads"] + 1))
        for name in ("top1", "ctar")
    )
    return (
        f"{plan['num_heads']} heads on the last states, {report['num_parameters']:,} parameters, trained on the same "
        f"text: {report['num_tokens_seen'] / 1e6:.2f}M tokens in {report['wall_time_s'] / 60:.0f} minutes. On the same "
        f"held-out texts, teacher-forced: top-1 of each head {top1}, CTAR {consistent}. The report is "
        "medusa/report.json."
    )


def describe_draft_model(report: dict[str, Any]) -> str:
    layers = " and ".join(str(layer) for layer in report["draft_model"]["layers"])
    return (
        f"A copy of the target's layers {layers} under its own embedding, head and norms, the layers trained further "
        f"on the target's distributions over the same text by Muon ({report['plan']['learning_rate']}): "
        f"{report['num_tokens_seen'] / 1e6:.2f}M tokens in {report['wall_time_s'] / 60:.0f} minutes "
        f"(recipes/draft_model.py). On the same held-out texts, teacher-forced: {describe_guesses(report['metrics'])}. "
        "The report is draft_model/report.json."
    )


def describe_skips(report: dict[str, Any]) -> str:
    best, plan = report["validated"][0], report["plan"]
    num_skipped = sum(map(len, best["skips"].values()))
    return (
        f"skip_layers.json names {num_skipped} of {2 * plan['num_layers']} sublayers that Draft & Verify leaves out "
        f"while drafting, found by `kangaroo search layers --sampler {plan['sampler']}` in {report['num_trials']} "
        f"trials on eight prompts: {best['tokens_per_step']:.2f} tokens a step and {best['speedup']:.2f}x the speed of "
        "plain decoding there."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--medusa", type=Path, required=True)
    parser.add_argument("--draft-model", type=Path, required=True)
    parser.add_argument("--skips", type=Path, required=True)
    parser.add_argument("--problems", type=Path, help="HumanEval.jsonl.gz, to measure the loss on")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = load_model(str(args.model))
    progress = read_json(args.state / "progress.json")
    num_parameters = sum(tensor.numel() for _, tensor in model.target.parameters())
    losses = [f"Held-out loss {progress['history'][-1]['held_out_nats_per_byte']:.3f} nats per byte."]
    if args.problems:
        loss = measure(model, args.problems, num_problems=60, num_tokens=900)
        losses.append(f"On HumanEval, the first 60 problems, prompt and canonical solution, first 900 tokens each: "
                      f"{loss:.3f} nats per byte.")  # fmt: skip
    sections = [
        "# The bundled demo model",
        describe_model(read_json(args.model / "config.json"), num_parameters=num_parameters), " ".join(losses),
        "`recipes/demo.sh` made it, and `recipes/card.py` wrote this page from the records of that run. The weights "
        "are under the project's Apache-2.0 licence.",
        "## Data", describe_data(read_json(args.corpus / "corpus.json")),
        "## Training", describe_training(progress),
        "## Adapter", describe_adapter(read_json(args.adapter / "report.json")),
        "## Medusa heads", describe_medusa(read_json(args.medusa / "report.json")),
        "## Draft model", describe_draft_model(read_json(args.draft_model / "report.json")),
        "## Skip list", describe_skips(read_json(args.skips / "report.json")),
    ]  # fmt: skip
    args.output.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

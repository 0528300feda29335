"""Predicted against measured speedup of the settings that `kangaroo tune` runs.

    python benchmarks/tuning.py --prompts HumanEval.jsonl.gz

Costs and guesses are measured first; the best settings of each batch size then take turns with plain decoding.
"""

import argparse
from pathlib import Path

from kangaroo.bench.prompts import read_prompts, spread_prompts
from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result
from kangaroo.bench.texts import decode_texts
from kangaroo.bench.tune import Prediction, Tuner, tune
from kangaroo.model.checkpoint import load_model


def describe(one: Prediction) -> list[object]:
    """A row of the table."""
    assert one.measured is not None
    assert one.error is not None
    setting = one.setting
    draft = "chain" if setting.branching.num_siblings == 1 else f"tree of {setting.branching.max_nodes}"
    return [setting.batch_size, setting.gamma, f"{setting.eta:g}", draft, f"{one.tokens_per_step:.2f}",
            f"{one.measured_tokens_per_step:.2f}", f"{one.speedup:.2f}", f"{one.measured:.2f}",
            f"{one.error:+.1%}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/tuning"))
    args = parser.parse_args()
    model = load_model("demo", dtype=args.dtype)
    prompts = [model.tokenizer.encode(one.text) for one in spread_prompts(read_prompts(args.prompts), args.num_prompts)]
    texts = decode_texts(model.target, prompts, eos_ids=model.eos_ids, max_new_tokens=args.max_new_tokens)
    tuner = Tuner(model.target, texts, adapters=[model.adapter_folder])
    predictions, ran = tune(tuner, batch_sizes=args.batch_sizes, num_rounds=args.num_rounds, report=print)
    facts, errors = stamp(), [abs(one.error) for one in ran if one.error is not None]
    result = {"stamp": facts, "dtype": args.dtype, "max_new_tokens": args.max_new_tokens, "num_texts": len(texts),
              "num_rounds": args.num_rounds, "num_predictions": len(predictions), "largest_error": max(errors),
              "costs": [{size: one.to_dict() for size, one in costs.items()} for costs in tuner.costs],
              "validated": [one.to_dict() for one in ran]}  # fmt: skip
    text = "\n\n".join([
        "# Predicted and measured speedups", stamp_text(facts),
        f"The bundled model and adapter, greedy, {args.dtype}, {len(texts)} texts of {args.max_new_tokens} new tokens; "
        f"{len(predictions)} settings were predicted, the best three of each batch size ran in {args.num_rounds} "
        "rounds beside plain decoding, whose median is shown. Speedups are over plain decoding at the same batch size.",
        markdown_table(["batch", "gamma", "eta", "draft", "tokens/step predicted", "measured", "speedup predicted",
                        "measured", "off by"], [describe(one) for one in ran]),
        f"The largest error is {max(errors):.1%}.",
    ])  # fmt: skip
    write_result(args.output, result, text=text)
    print(text)


if __name__ == "__main__":
    main()

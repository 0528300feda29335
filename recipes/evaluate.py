"""Loss of a model in nats per UTF-8 byte on a file of HumanEval problems: prompt and canonical solution.

python recipes/evaluate.py --model demo --problems HumanEval.jsonl.gz [--num-problems 60] [--num-tokens 900]
"""

import argparse
import gzip
import json
from pathlib import Path

import torch

from kangaroo.bench.divergence import run_full_pass
from kangaroo.kernels import REFERENCE
from kangaroo.model.checkpoint import LoadedModel, load_model


def nats_per_byte(model: LoadedModel, texts: list[str], *, num_tokens: int) -> float:
    """Summed cross-entropy over the first num_tokens of every text, over the bytes those tokens spell."""
    total_nats, total_bytes = 0.0, 0
    for text in texts:
        tokens = model.tokenizer.encode(text)[:num_tokens]
        with torch.inference_mode():
            states, _ = run_full_pass(model.target, tokens[:-1])
            logits = model.target.logits(states)
        # A checkpoint without a leading BOS cannot be asked for its first token, whose bytes then do not count.
        labels = torch.tensor(tokens[1:], device=logits.device)
        total_nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        total_bytes += len(model.tokenizer.decode(tokens[1:]).encode())
    return total_nats / total_bytes


def measure(model: LoadedModel, problems: Path, *, num_problems: int, num_tokens: int) -> float:
    """nats_per_byte of the first problems of a HumanEval file, prompt and canonical solution."""
    with gzip.open(problems, "rt", encoding="utf-8") as file:
        chosen = [json.loads(line) for line in file][:num_problems]
    texts = [problem["prompt"] + problem["canonical_solution"] for problem in chosen]
    return nats_per_byte(model, texts, num_tokens=num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--problems", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--num-problems", type=int, default=60)
    parser.add_argument("--num-tokens", type=int, default=900)
    args = parser.parse_args()
    model = load_model(args.model, backend=REFERENCE)
    loss = measure(model, args.problems, num_problems=args.num_problems, num_tokens=args.num_tokens)
    print(f"{loss:.4f} nats per byte over {args.num_problems} problems, first {args.num_tokens} tokens of each")


if __name__ == "__main__":
    main()

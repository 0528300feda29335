"""Loss of a model in nats per UTF-8 byte on a file of HumanEval problems: prompt and canonical solution.

python recipes/evaluate.py --model demo --problems HumanEval.jsonl.gz [--num-problems 60] [--num-tokens 900]
"""

import argparse
import gzip
import json
from pathlib import Path

import torch

from kangaroo.llm import LoadedModel, load_model
from kangaroo.model.transformer import FullSequencePass


def nats_per_byte(model: LoadedModel, texts: list[str], *, num_tokens: int) -> float:
    """Summed cross-entropy over the first num_tokens of every text, over the bytes those tokens spell."""
    total_nats, total_bytes = 0.0, 0
    for text in texts:
        tokens = torch.tensor(model.tokenizer.encode(text)[:num_tokens])
        attention = FullSequencePass(model.target.config, len(tokens) - 1, device=model.target.device)
        with torch.inference_mode():
            entering = model.target.embed(tokens[None, :-1])
            hidden, _ = model.target.forward(entering, (0, model.target.num_layers), attention=attention)
            logits = model.target.logits(hidden[0])
        # A checkpoint without a leading BOS cannot be asked for its first token, whose bytes then do not count.
        total_nats += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
        total_bytes += len(model.tokenizer.decode(tokens[1:].tolist()).encode())
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
    loss = measure(load_model(args.model), args.problems, num_problems=args.num_problems, num_tokens=args.num_tokens)
    print(f"{loss:.4f} nats per byte over {args.num_problems} problems, first {args.num_tokens} tokens of each")


if __name__ == "__main__":
    main()

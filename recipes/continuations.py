"""Let the target continue pieces of its training corpus greedily: text of its own to train an adapter on.

While decoding, an adapter meets the target's own text, which is more regular than any corpus::

    python recipes/continuations.py --model build/demo/model --corpus build/demo/corpus --output own.jsonl

Written: one JSON object a line with ``text``, a piece of the train split and its continuation.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kangaroo.model.cache import CachedPass, Segment
from kangaroo.model.checkpoint import load_model
from kangaroo.model.transformer import Transformer

BOS_ID = 0


def pieces(tokens: np.ndarray, *, num_tokens: int, count: int, seed: int) -> Iterator[list[int]]:
    """Random pieces of a corpus, each behind a beginning-of-text token."""
    random = np.random.default_rng(seed)
    for start in random.integers(0, len(tokens) - num_tokens, size=count):
        yield [BOS_ID, *tokens[start : start + num_tokens - 1].tolist()]


@torch.inference_mode()
def continue_all(target: Transformer, prompts: Tensor, *, num_new: int) -> Tensor:
    """Greedy continuations [B, num_new] of prompts [B, T], all of them in every pass."""
    num_sequences, length = prompts.shape
    cache, span = target.new_cache(num_sequences, length + num_new), (0, target.num_layers)
    made, tokens, start = [], prompts, 0
    for _ in range(num_new):
        segments = [Segment(row, start, tokens.shape[1]) for row in range(num_sequences)]
        hidden, _ = target.forward(target.embed(tokens.flatten()), span, attention=CachedPass(cache, segments))
        last = hidden.view(num_sequences, tokens.shape[1], -1)[:, -1].contiguous()
        start += tokens.shape[1]
        tokens = target.argmax(last)[:, None]
        made.append(tokens)
    return torch.cat(made, dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="what recipes/corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-texts", type=int, default=6144)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_model(args.model)
    tokens = np.fromfile(args.corpus / "train.bin", dtype="<u2")
    prompts = list(pieces(tokens, num_tokens=args.prompt_tokens, count=args.num_texts, seed=args.seed))
    with args.output.open("w", encoding="utf-8") as file:
        for first in range(0, len(prompts), args.batch_size):
            batch = torch.tensor(prompts[first : first + args.batch_size])
            new = continue_all(model.target, batch, num_new=args.new_tokens)
            for prompt, continuation in zip(batch.tolist(), new.tolist(), strict=True):
                text = model.tokenizer.decode([*prompt[1:], *continuation])
                file.write(json.dumps({"text": text}) + "\n")
            print(f"{first + len(batch)} of {len(prompts)} texts", flush=True)


if __name__ == "__main__":
    main()

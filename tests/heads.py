"""Medusa heads that learned a tiny target's own texts, so that some of their guesses are right."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kangaroo.drafters.medusa_heads import MedusaHeads
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.types import SamplingParams
from tests.lossless import decode


def learn_heads(
    target: Transformer, num_heads: int, *, prompts: Sequence[tuple[int, ...]], num_steps: int
) -> MedusaHeads:
    """Heads that know some of the target's greedy texts behind these prompts by heart, the more the more steps."""
    heads = MedusaHeads.initialize(target, num_heads)
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for one, prompt in zip(decode(target, PlainDrafter(), SamplingParams(20), prompts=prompts), prompts, strict=True):
        text = torch.tensor([*prompt, *one.new_tokens])
        attention = FullSequencePass(target.config, len(text), device=text.device)
        hidden, _ = target.forward(target.embed(text[None]), (0, target.num_layers), attention=attention)
        labels.append(text[len(prompt) + 1 :].unfold(0, num_heads, 1))
        rows.append(heads.normalize(hidden[0, len(prompt) - 1 :][: len(labels[-1])]))
    known, wanted = torch.cat(rows), torch.cat(labels)
    weights = [tensor.requires_grad_() for tensor in heads.tensors.values()]
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(num_steps):
        losses = [
            torch.nn.functional.cross_entropy(heads.logits(known, 1 + index), wanted[:, index])
            for index in range(num_heads)
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for tensor in weights:
        tensor.requires_grad_(False)
    return heads

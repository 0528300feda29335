"""How well a drafter predicts its target on known text, and the draft settings that suggests.

Everything here is teacher-forced: the draft sees the true prefix at every position. Shapes: W windows of text,
T positions each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MAX_WINDOW = 6  # the longest consistent window reported, and the longest draft considered
ETAS = tuple(step / 20 for step in range(20))


@dataclass(frozen=True)
class Positions:
    """Per-position facts, all [W, T]; only positions where mask is True count.

    loss: soft cross-entropy in nats; agrees: the draft's top-1 is the target's; in_top3: the target's top-1 is
    among the draft's three best; overlap: sum of min(p, q); confidence: the draft's top-1 probability.
    """

    loss: Tensor
    agrees: Tensor
    in_top3: Tensor
    overlap: Tensor
    confidence: Tensor
    mask: Tensor

    @classmethod
    def compare(cls, draft_logits: Tensor, target_logits: Tensor, *, mask: Tensor) -> "Positions":
        """The facts [...] of logits [..., V] in float32; mask is [...]."""
        log_draft = torch.log_softmax(draft_logits, dim=-1)
        draft, target = log_draft.exp(), torch.softmax(target_logits, dim=-1)
        choice = target_logits.argmax(dim=-1)
        best = draft_logits.topk(min(3, draft_logits.shape[-1]), dim=-1).indices
        return cls(
            loss=-(target * log_draft).sum(dim=-1),
            agrees=draft_logits.argmax(dim=-1) == choice,
            in_top3=(best == choice[..., None]).any(dim=-1),
            overlap=torch.minimum(draft, target).sum(dim=-1),
            confidence=draft.amax(dim=-1),
            mask=mask,
        )

    @classmethod
    def join(cls, parts: Sequence["Positions"], *, shape: tuple[int, int]) -> "Positions":
        """Lay parts of any shape end to end as [W, T] on the CPU."""
        return cls(**{
            field.name: torch.cat([getattr(part, field.name).flatten() for part in parts]).cpu().view(shape)
            for field in fields(cls)
        })  # fmt: skip

    def summary(self) -> dict[str, float]:
        """Means over the counted positions, and the consistent token acceptance rate (CTAR) of windows 1..6.

        ctar_w is the share of w consecutive counted positions that all agree (Kangaroo, section 3.1).
        expected_tokens_per_step is 1 + the sum of ctar_w: what a draft of 6 tokens would bring.
        """
        result = {
            "loss": _mean(self.loss, self.mask),
            "top1": _mean(self.agrees, self.mask),
            "top3": _mean(self.in_top3, self.mask),
            "expected_acceptance": _mean(self.overlap, self.mask),
        }
        rates = {f"ctar_{width}": self._consistent_rate(width) for width in range(1, MAX_WINDOW + 1)}
        return result | rates | {"expected_tokens_per_step": 1 + sum(rates.values())}

    def _consistent_rate(self, width: int) -> float:
        if self.mask.shape[1] < width:
            return 0.0
        agrees, counted = (flags.unfold(1, width, 1).all(dim=-1) for flags in (self.agrees, self.mask))
        return _mean(agrees, counted)

    def recommend(self, draft_cost: float) -> tuple[int, float]:
        """The draft length gamma and threshold eta with the best expected tokens per unit of time.

        draft_cost: time of drafting one token, in plain decoding steps. A draft ends after gamma tokens or with the
        first token whose confidence is below eta; that token is still verified (Kangaroo, section 3.2).
        """
        width = min(MAX_WINDOW, self.mask.shape[1])
        counted = self.mask.unfold(1, width, 1).all(dim=-1)
        agrees, confidence = (facts.unfold(1, width, 1)[counted] for facts in (self.agrees, self.confidence))
        if not len(agrees):
            return MAX_WINDOW, 0.0
        accepted = agrees.int().cumprod(dim=1)
        best = (0.0, MAX_WINDOW, 0.0)
        for eta in ETAS:
            drafted = (confidence >= eta).int().cumprod(dim=1).roll(1, dims=1)
            drafted[:, 0] = 1
            tokens = 1 + (drafted * accepted).float().mean(dim=0).cumsum(dim=0)
            rates = tokens / (1 + draft_cost * drafted.float().mean(dim=0).cumsum(dim=0))
            best = max(best, (float(rates.max()), int(rates.argmax()) + 1, eta), key=lambda option: option[0])
        return best[1], best[2]


def summarize_heads(heads: Sequence[Positions], *, decay: float) -> dict[str, float]:
    """Means of heads that guess one token further ahead each, from the same states.

    loss is the sum of decay ** k times the head's own; ctar_k the share of states from which the heads up to the k-th
    all agree with the target; expected_tokens_per_step is 1 + the sum of these: what a chain of their guesses would
    bring.
    """
    result: dict[str, float] = {"loss": 0.0}
    agrees, counted = torch.ones_like(heads[0].agrees), torch.ones_like(heads[0].mask)
    for number, head in enumerate(heads, start=1):
        agrees, counted = agrees & head.agrees, counted & head.mask
        result["loss"] += decay**number * _mean(head.loss, head.mask)
        result |= {
            f"top1_{number}": _mean(head.agrees, head.mask),
            f"top3_{number}": _mean(head.in_top3, head.mask),
            f"expected_acceptance_{number}": _mean(head.overlap, head.mask),
            f"ctar_{number}": _mean(agrees, counted),
        }
    rates = [result[f"ctar_{number}"] for number in range(1, len(heads) + 1)]
    return result | {"expected_tokens_per_step": 1 + sum(rates)}


def _mean(values: Tensor, counted: Tensor) -> float:
    return float(values[counted].double().mean()) if bool(counted.any()) else 0.0

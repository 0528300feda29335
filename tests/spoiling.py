"""Kernels that round differently, as those of other systems do, for the tests that must notice."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kangaroo.kernels import cpu

Spoil = Callable[[Tensor], Tensor]


def spoil_wide_passes(monkeypatch: pytest.MonkeyPatch, spoil: Spoil, *, owner: type | None = None) -> None:
    """Change what leaves every pass over more than one row, of the native kernels or of the reference decoder."""
    name = "run" if owner is None else "forward"
    owner = owner or cpu.Stack
    original = getattr(owner, name)

    def perturbed(self: object, hidden: Tensor, span: tuple[int, int], **settings: Any) -> Any:
        out, taps = original(self, hidden, span, **settings)
        return (spoil(out), taps) if len(out) > 1 else (out, taps)

    def decide(self: object, entering: Any, span: tuple[int, int], *, ends: Any, taps: Any, **settings: Any) -> Any:
        embedding, scale, head = ends
        hidden = cpu.gather(embedding, entering) * scale if isinstance(entering, list) else entering
        out, tapped = perturbed(self, hidden, span, taps=taps, **settings)
        tapped |= {span[1]: out} if span[1] in taps else {}
        ids = torch.empty(len(out), dtype=torch.int64)
        cpu._native.run_head((*head[:4], (0, ids.data_ptr(), 0)), (out.data_ptr(), len(out)))
        return ids.tolist(), tapped

    def draft(self: cpu.DraftPlan, *places: Any, taps: Any, **settings: Any) -> Any:
        num_layers = self._ends[1]
        asked = None if taps is None else (*taps, num_layers)
        nodes, states, verified = draft_alone(self, *places, taps=asked, **settings)
        if verified is None or len(verified[0]) == 1:
            return nodes, states, verified
        _, time_s, tapped = verified
        out = tapped[num_layers] = spoil(tapped[num_layers])
        head, norm = self._heads[1]
        return nodes, states, (head.argmax(out, norm).tolist(), time_s, tapped)

    draft_alone = cpu.DraftPlan.draft
    monkeypatch.setattr(owner, name, perturbed)
    if owner is cpu.Stack:
        monkeypatch.setattr(owner, "decide", decide)
        monkeypatch.setattr(cpu.DraftPlan, "draft", draft)


def one_ulp(states: Tensor) -> Tensor:
    return torch.nextafter(states, torch.full_like(states, math.inf))

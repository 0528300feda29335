"""What a search for sublayers to skip is: a plain record, without loading anything heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kangaroo.errors import SettingsError

ObjectiveName = Literal["tokens_per_second", "expected_speedup"]
SamplerName = Literal["tpe", "gp", "random", "greedy"]


@dataclass(frozen=True)
class SearchPlan:
    """What has to be the same for a search to be resumed.

    fingerprint: of the model's weights; prompts: a digest of their token ids; storage: what weights are kept in;
    gamma: the longest drafts looked at. Raises SettingsError for values outside their range.
    """

    model: str
    fingerprint: str
    num_layers: int
    storage: str
    prompts: str
    max_new_tokens: int
    objective: ObjectiveName
    sampler: SamplerName
    gamma: int
    seed: int

    def __post_init__(self) -> None:
        if self.gamma < 1:
            raise SettingsError(f"gamma must be at least 1, got {self.gamma}")
        if self.max_new_tokens < 2:
            raise SettingsError(f"max_new_tokens must be at least 2, got {self.max_new_tokens}: "
                                "the first token is never drafted")  # fmt: skip

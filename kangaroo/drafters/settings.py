"""What a user may say about each drafter: plain records, by name, without loading anything heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from kangaroo.errors import SettingsError


class Settings(Protocol):
    """Settings of the drafter that lives in the module of this name."""

    name: ClassVar[str]


@dataclass(frozen=True)
class PlainSettings:
    """Plain decoding has nothing to set."""

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class KangarooSettings:
    """How Kangaroo drafts; None takes what the adapter recommends, else the paper's gamma 6 and eta 0.6.

    adapter: a folder, None for "adapter" beside the model. exit_layer: only a check against the adapter's.
    num_siblings: guesses for the token behind one node, 1 for chains; max_nodes: nodes of a draft, its root included.
    """

    name: ClassVar[str] = "kangaroo"
    adapter: str | None = None
    exit_layer: int | None = None
    gamma: int | None = None
    eta: float | None = None
    num_siblings: int = 1
    max_nodes: int = 64


SETTINGS: dict[str, type[Settings]] = {one.name: one for one in (PlainSettings, KangarooSettings)}


def find_settings(name: str) -> type[Settings]:
    """The settings class of a drafter; raises SettingsError for an unknown name."""
    if name not in SETTINGS:
        raise SettingsError(f"drafter must be one of {', '.join(SETTINGS)}, got {name!r}")
    return SETTINGS[name]

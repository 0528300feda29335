"""Which attention and MLP sublayers a pass leaves out, and the skip_layers.json that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kangaroo.errors import OutputError, SkipLayersError

SKIP_FILE = "skip_layers.json"


@dataclass(frozen=True)
class SkippedSublayers:
    """The layers whose attention, and those whose MLP, is skipped; layers count from 0."""

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    @property
    def num_skipped(self) -> int:
        """Sublayers skipped, of two a layer."""
        return len(self.attention) + len(self.mlp)

    def check(self, num_layers: int, *, where: str) -> None:
        """Raise SkipLayersError for a layer that a model of so many has not, or where nothing is left to run."""
        unknown = sorted(one for one in self.attention | self.mlp if not 0 <= one < num_layers)
        if unknown:
            raise SkipLayersError(f"{where}: layers must be in 0..{num_layers - 1}, got {unknown[0]}; "
                                  "take the skip list of this model or search for one")  # fmt: skip
        if self.num_skipped == 2 * num_layers:
            raise SkipLayersError(f"{where}: skips all {self.num_skipped} sublayers; leave at least one to draft with")

    def to_dict(self) -> dict[str, list[int]]:
        """The lists of skip_layers.json."""
        return {"attention": sorted(self.attention), "mlp": sorted(self.mlp)}


NO_SKIPS = SkippedSublayers()


def read_skip_layers(path: Path, names: tuple[str, ...]) -> SkippedSublayers:
    """The skip list of the first of these model names that a file has, or its only one, whatever its name.

    The format is that of Draft & Verify's repository: {model name: {"attention": [...], "mlp": [...]}}.
    Raises SkipLayersError for a file that is missing, malformed, or has lists of several other models only.
    """
    known = _read(path)
    name = next((name for name in names if name in known), None)
    if name is None and len(known) != 1:
        raise SkipLayersError(f"{path} has skip lists for {', '.join(known) or 'no model'}, none for {names[0]}; "
                              "name the model as there or search for its own")  # fmt: skip
    entry = known[next(iter(known)) if name is None else name]
    kinds = ("attention", "mlp")
    if not isinstance(entry, dict) or not all(_is_ids(entry.get(kind)) for kind in kinds):
        raise SkipLayersError(f'{path}: an entry must be {{"attention": [layers], "mlp": [layers]}}, got {entry!r:.60}')
    return SkippedSublayers(*(frozenset(entry[kind]) for kind in kinds))


def write_skip_layers(path: Path, skips: Mapping[str, SkippedSublayers]) -> None:
    """Write skip lists by model name, as read_skip_layers() reads them; raises OutputError where that fails."""
    entries = [f"  {json.dumps(name)}: {json.dumps(one.to_dict())}" for name, one in skips.items()]
    try:
        path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; give another place") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SkipLayersError(f"cannot read the skip list {path}: {error.strerror or error}; "
                              "make one with `kangaroo search layers`") from error  # fmt: skip
    except ValueError as error:
        raise SkipLayersError(f"{path} is no JSON: {error}; give a skip list like skip_layers.json") from error
    if not isinstance(content, dict):
        raise SkipLayersError(f"{path} must hold an object of skip lists by model name, got {content!r:.60}")
    return content


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int for one in value)

"""Which Python files a corpus may take: the standard library and permissively licensed distributions."""

import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.message import Message
from importlib.metadata import Distribution, distributions
from pathlib import Path

STDLIB = "CPython standard library"

PERMISSIVE_IDS = {
    "0bsd", "apache-2.0", "blueoak-1.0.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
    "cnri-python", "hpnd", "isc", "mit", "mit-0", "mit-cmu", "psf-2.0", "python-2.0", "unlicense", "zlib",
}  # fmt: skip
# Anchored at the start, where a classifier or field names its licence; the words of a longer text prove nothing.
PERMISSIVE_NAME = re.compile(
    r"(the )?(new |modified |simplified |(zero|[023])[- ]clause )?"
    r"(mit|0?bsd|apache|psf|python software foundation|isc|zlib|unlicense|cc0|boost)\b",
    re.I,
)
RESTRICTIVE = re.compile(r"GPL|GNU|MPL|Mozilla|proprietary|commercial|EUPL|CDDL|Eclipse|SSPL", re.I)


@dataclass(frozen=True)
class Source:
    """One file to consider: who ships it, its path inside that distribution, and where it lies."""

    distribution: str
    path: str
    location: str


@dataclass
class Inventory:
    """What is there to take; licences: version and licence by distribution; refused: the licence in the way."""

    sources: list[Source] = field(default_factory=list)
    licences: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def is_permissive_expression(expression: str) -> bool:
    """Whether an SPDX expression can be met with permissive licences alone; a nested one only if all of it is."""
    expression = re.sub(r"\s+WITH\s+[^\s()]+", "", expression, flags=re.I)  # an exception only ever grants more
    choices = [expression] if "(" in expression else re.split(r"\s+OR\s+", expression, flags=re.I)
    parts = [re.split(r"\s+(?:AND|OR)\s+", choice, flags=re.I) for choice in choices]
    return any(all(name.strip("() ").lower() in PERMISSIVE_IDS for name in names) for names in parts)


def licence_of(metadata: Message) -> tuple[str, bool]:
    """The licence that a distribution's metadata states and whether it is permissive; unknown counts as not."""
    expression = metadata.get("License-Expression")
    if expression:
        return expression, is_permissive_expression(expression)
    classifiers = [c.split(" :: ") for c in metadata.get_all("Classifier", [])]
    names = [c[-1] for c in classifiers if c[0] == "License" and c[-1] != "OSI Approved"]
    if not names:
        names = [metadata.get("License", "").strip().split("\n")[0][:100] or "unknown"]
    permissive = all(PERMISSIVE_NAME.match(name) and not RESTRICTIVE.search(name) for name in names)
    return "; ".join(names), permissive


def stdlib_sources() -> Iterator[Source]:
    """The standard library files of the running interpreter."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if not relative.startswith(("site-packages/", "dist-packages/", "ensurepip/_bundled/")):
            yield Source(STDLIB, relative, str(path))


def distribution_sources(distribution: Distribution, name: str) -> Iterator[Source]:
    """The Python files a distribution recorded when it was installed."""
    for file in sorted(distribution.files or [], key=str):
        if file.suffix == ".py" and file.parts[0] != ".." and not file.is_absolute():
            yield Source(name, file.as_posix(), str(file.locate()))


def take_inventory(directories: Sequence[str]) -> Inventory:
    """List the standard library and every permissively licensed distribution in the directories."""
    inventory = Inventory(sources=list(stdlib_sources()))
    inventory.licences[STDLIB] = {"version": platform.python_version(), "licence": "PSF-2.0"}
    found = [
        (i, re.sub(r"[-_.]+", "-", distribution.metadata.get("Name", "")).lower(), distribution)
        for i, directory in enumerate(directories)
        for distribution in distributions(path=[directory])
    ]
    # The first directory wins: a second version of a distribution would mostly repeat the first.
    for _, name, distribution in sorted(found, key=lambda entry: entry[:2]):
        if not name or name in inventory.licences or name in inventory.refused:
            continue
        licence, permissive = licence_of(distribution.metadata)
        if not permissive:
            inventory.refused[name] = licence
            continue
        inventory.licences[name] = {"version": distribution.version, "licence": licence}
        inventory.sources.extend(distribution_sources(distribution, name))
    return inventory

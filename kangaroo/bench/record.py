"""How a result is kept: one JSON file and one Markdown file, stamped with command, commit, versions, hardware."""

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kangaroo.bench.environment import environment
from kangaroo.errors import OutputError

HUB_ID = re.compile(r"[\w.-]*\w/[\w.-]+")


def shorten_path(text: str) -> str:
    """Of a path its last part, since results must not name folders of a machine; a hub id as it is."""
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(os.path.abspath(path)).name
    return text if HUB_ID.fullmatch(text) else Path(text).name


def name_apart(folders: Sequence[Path]) -> list[str]:
    """The folders by their last parts, no more of them than tell them apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    return next(
        names
        for count in range(1, max(map(len, parts)) + 1)
        if len(set(names := ["/".join(one[-count:]) for one in parts])) == len(set(parts))
    )


def stamp(device: str = "cpu") -> dict[str, object]:
    """The environment and the command of this process, run on cpu or cuda; of every path only the last part is kept."""
    words = ["=".join(shorten_path(part) for part in word.split("=")) for word in sys.argv[1:]]
    script = Path(sys.argv[0])
    program = "kangaroo" if script.name == "kangaroo" else f"python {'/'.join(script.parts[-2:])}"
    command = " ".join([program, *words])
    return {"command": command, "date": time.strftime("%Y-%m-%d"), **environment(device)}


def stamp_text(facts: dict[str, object]) -> str:
    """The stamp as Markdown."""
    return f"Command: `{facts['command']}`\n\n{stamp_facts(facts)}"


def stamp_facts(facts: dict[str, object]) -> str:
    """The stamp's environment as a sentence."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("kangaroo", "python", "torch", "transformers"))
    hardware = f"{facts['cpu']}, {facts['cpu_cores']} cores, {facts['threads']} threads"
    parts = [f"{facts['date']}, commit {facts['commit']}", hardware, versions, f"{facts['kernel_backend']} kernels"]
    if devices := facts["cuda_devices"]:
        assert isinstance(devices, list)
        parts.insert(2, ", ".join(devices))
    return f"{'; '.join(parts)}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats get three significant digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), ["---"] * len(header), *cells])


def write_result(stem: Path, result: dict[str, object], *, text: str) -> None:
    """Write stem.json and stem.md; raises OutputError where that fails."""
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        stem.with_name(f"{stem.name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {stem}.json and .md: {error.strerror or error}; give another place") from error

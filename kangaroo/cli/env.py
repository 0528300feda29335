"""`kangaroo env`: what a measurement or a bug report depends on."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kangaroo.cli.shared import JsonOption

env_app = typer.Typer()


@env_app.command()
def env(json_output: Annotated[bool, JsonOption] = False) -> None:
    """Print versions, processor, devices, the kernel backend, and how many adapters were tuned on this processor."""
    from kangaroo.bench.environment import environment
    from kangaroo.tuning import count_tuned, tuning_file

    facts = environment() | {"tuning_file": str(tuning_file()), "tuned_adapters": count_tuned()}
    if json_output:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name}: {'none' if shown in (None, '') else shown}")

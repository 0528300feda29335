"""The command line; `main` is the `kangaroo` program."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line on argv (sys.argv unless given) and exit with its status."""
    from kangaroo.cli.app import run

    sys.exit(run(argv))

"""The flags that choose a drafter and set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.shared import DrafterName, usage_error

if TYPE_CHECKING:
    from kangaroo.drafters.settings import KangarooSettings


def _kangaroo_option(text: str, *, default: str) -> Any:
    return typer.Option(help=text, show_default=default, rich_help_panel="Kangaroo drafter")


Drafter = Annotated[
    DrafterName | None,
    typer.Option(
        help="How to decode; the text is the model's own either way.",
        show_default="kangaroo if an adapter lies beside the model or a Kangaroo flag is given, else plain",
    ),
]
Adapter = Annotated[str | None, _kangaroo_option("Adapter folder.", default="the folder 'adapter' of the model")]
ExitLayer = Annotated[
    int | None,
    _kangaroo_option("Only a check: fails unless the adapter was trained at this layer.", default="the adapter's"),
]
Gamma = Annotated[
    int | None,
    _kangaroo_option(
        "Most tokens drafted per step, at least 1.", default="the adapter's recommendation, else the paper's 6"
    ),
]
Eta = Annotated[
    float | None,
    _kangaroo_option(
        "Stop drafting after a token of less confidence, in [0, 1]; 0 always drafts gamma tokens.",
        default="the adapter's recommendation, else the paper's 0.6",
    ),
]
NumSiblings = Annotated[
    int | None, _kangaroo_option("Guesses for the token behind one guess; above 1 drafts are trees.", default="1")
]
MaxNodes = Annotated[int | None, _kangaroo_option("Most tokens a draft holds, its root included.", default="64")]


def drafter_settings(drafter: str | None, kangaroo: Mapping[str, object]) -> str | KangarooSettings | None:
    """What LLM.from_pretrained takes as its drafter: a Kangaroo flag asks for Kangaroo.

    Raises a usage error for one beside --drafter plain.
    """
    given: dict[str, Any] = {name: value for name, value in kangaroo.items() if value is not None}
    if not given:
        return drafter
    if drafter == "plain":
        flag = f"--{next(iter(given)).replace('_', '-')}"
        raise usage_error(flag, "it does nothing with --drafter plain; leave out one of the two")
    from kangaroo.drafters.settings import KangarooSettings

    return KangarooSettings(**given)

"""What several verbs need: choices, usage errors, and following a stream to its end."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from kangaroo.types import Completion, Token

Dtype = Literal["float32", "bfloat16", "float16"]
DrafterName = Literal["plain", "kangaroo", "layer_skip", "medusa", "prompt_lookup", "draft_model", "retrieval", "auto"]
ModelOption = typer.Option(help="Model folder, hub id like org/name, or 'demo' for the bundled model.")
Weights = Literal["int8"]
WeightsOption = typer.Option(
    help="Keep the weights in int8 with a scale per output, instead of a --dtype; the text is the int8 model's own.",
    show_default="as --dtype says",
)
DtypeOption = typer.Option(help="Storage of the weights.", show_default="float32")
JsonOption = typer.Option("--json", help="Print one JSON object instead, and nothing else on stdout.")


def usage_error(flag: str, message: str) -> typer.BadParameter:
    """A command line that makes no sense because of this flag: exit status 2."""
    return typer.BadParameter(message, param_hint=flag)


def follow(tokens: Generator[Token, None, Completion], show: Callable[[Token], None]) -> Completion:
    """Show every token of LLM.stream() as it comes; returns its Completion."""
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            completion: Completion = end.value
            return completion
        show(token)


def number(value: float | None, template: str = "{:.1f}") -> str:
    """A measured value in words for people, n/a where there is none."""
    return "n/a" if value is None else template.format(value)

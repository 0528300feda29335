"""`kangaroo demo`: one prompt, decoded plainly and then with Kangaroo."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kangaroo.cli.shared import Dtype, DtypeOption, JsonOption, ModelOption, Weights, WeightsOption, follow, number
from kangaroo.errors import PromptError
from kangaroo.types import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kangaroo.bench.divergence import Divergence
    from kangaroo.llm import LLM
    from kangaroo.model.checkpoint import LoadedModel
    from kangaroo.types import Completion, Token

demo_app = typer.Typer()

PROMPT = '''def fibonacci(n):
    """Return the first n Fibonacci numbers as a list."""
'''
# NO_COLOR takes the colours away but leaves bold, which still tells the two apart.
STYLES = {"draft": "green", "bonus": "bold yellow"}
WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded by both drafters."""

    plain: Completion
    kangaroo: Completion
    divergence: Divergence | None

    @property
    def identical(self) -> bool:
        return self.plain.token_ids == self.kangaroo.token_ids

    @property
    def speedup(self) -> float | None:
        """Tokens per second with Kangaroo over plain; None where one was too short to time."""
        slow, fast = self.plain.tokens_per_s, self.kangaroo.tokens_per_s
        return fast / slow if slow and fast else None

    def to_dict(self) -> dict[str, object]:
        """The fields of --json."""
        return {
            "plain": self.plain.to_dict(),
            "kangaroo": self.kangaroo.to_dict(),
            "speedup": self.speedup,
            "identical": self.identical,
            "divergence": None if self.divergence is None else vars(self.divergence),
        }


@demo_app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="The text to continue.", show_default="a Python function")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    model: Annotated[str, ModelOption] = "demo",
    adapter: Annotated[
        str | None, typer.Option(help="Adapter folder.", show_default="the folder 'adapter' of the model")
    ] = None,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Decode one prompt greedily, plainly and then with Kangaroo, and compare speed and text.

    Colours tell accepted drafts from the target's own picks. Exit status 1 if the two texts differ.
    """
    from rich.console import Console

    from kangaroo.model.checkpoint import load_model

    if not prompt:
        raise PromptError("the prompt is empty; give at least one character")
    params = SamplingParams(max_new_tokens)
    plain, kangaroo = _pair(load_model(model, dtype=dtype, weights=weights), adapter=adapter)
    console = Console(quiet=json_output, highlight=False, markup=False)
    for llm in (plain, kangaroo):
        llm.generate(prompt, SamplingParams(min(WARM_UP_TOKENS, max_new_tokens)))
    slow = _show(console, plain, prompt=prompt, params=params, title="plain decoding")
    fast = _show(console, kangaroo, prompt=prompt, params=params, title="Kangaroo")
    result = Comparison(slow, fast, divergence=_find_divergence(plain, prompt, texts=(slow, fast)))
    if json_output:
        print(json.dumps(result.to_dict()), flush=True)
    else:
        _print_result(console, result)
    if not result.identical:
        raise typer.Exit(1)


def _pair(loaded: LoadedModel, *, adapter: str | None) -> tuple[LLM, LLM]:
    """The same loaded model behind both drafters."""
    from kangaroo.drafters.settings import KangarooSettings
    from kangaroo.llm import LLM, build_drafter

    drafters = build_drafter(loaded, "plain"), build_drafter(loaded, KangarooSettings(adapter=adapter))
    return LLM(loaded, drafters[0]), LLM(loaded, drafters[1])


def _show(console: Console, llm: LLM, *, prompt: str, params: SamplingParams, title: str) -> Completion:
    """Stream one text under its title."""

    def show(token: Token) -> None:
        console.out(token.text, end="", style=STYLES[token.origin], highlight=False)

    console.print(title, style="bold underline")
    console.out(prompt, end="", style="dim", highlight=False)
    completion = follow(llm.stream(prompt, params), show)
    console.print("\n")
    return completion


def _find_divergence(llm: LLM, prompt: str, *, texts: tuple[Completion, Completion]) -> Divergence | None:
    from kangaroo.bench.divergence import find_divergence

    prompt_ids = llm.model.tokenizer.encode(prompt)
    return find_divergence(llm.model.target, prompt_ids, first=texts[0].token_ids, second=texts[1].token_ids)


def _print_result(console: Console, result: Comparison) -> None:
    if console.is_terminal:
        console.print("accepted draft", style=STYLES["draft"], end="  ")
        console.print("bonus: the target's own pick", style=STYLES["bonus"])
    console.print(_table(result))
    console.print(f"speedup: {number(result.speedup, '{:.2f}x')}")
    console.print(f"identical texts: {'yes' if result.identical else 'no'}")
    if (found := result.divergence) is not None:
        kind = "a near-tie in floating point" if found.near_tie else "more than rounding explains"
        console.print(f"the texts differ from new token {found.position} (counted from 0), where the target's two best "
                      f"logits are {found.margin:.3g} apart: {kind}", soft_wrap=True)  # fmt: skip


def _table(result: Comparison) -> Table:
    from rich.table import Table

    table = Table("", "plain", "Kangaroo")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {"tokens/s": ("tokens_per_s", "{:.1f}"), "tokens per step": ("tokens_per_step", "{:.2f}"),
            "acceptance rate": ("acceptance_rate", "{:.1%}"), "new tokens": ("num_new_tokens", "{}"),
            "prefill": ("prefill_time_s", "{:.3f} s"), "decode": ("decode_time_s", "{:.3f} s")}  # fmt: skip
    for label, (name, template) in rows.items():
        table.add_row(label, *(number(getattr(one, name), template) for one in (result.plain, result.kangaroo)))
    return table

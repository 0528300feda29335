"""`kangaroo generate`: continue a prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kangaroo.cli.shared import (
    DrafterName,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    Weights,
    WeightsOption,
    follow,
    number,
    usage_error,
)
from kangaroo.errors import PromptError
from kangaroo.types import SamplingParams

if TYPE_CHECKING:
    from kangaroo.drafters.settings import KangarooSettings
    from kangaroo.llm import LLM
    from kangaroo.types import Completion

generate_app = typer.Typer()


def _kangaroo_option(text: str, *, default: str) -> Any:
    return typer.Option(help=text, show_default=default, rich_help_panel="Kangaroo drafter")


PromptFile = Annotated[
    str | None, typer.Option(help="File with the text to continue, in UTF-8 and taken as it is; - reads stdin.")
]
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
MaxContext = Annotated[
    int | None,
    typer.Option(help="Most tokens prompt and new text may hold together.", show_default="the model's context length"),
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token, which else stops the text.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Take the prompt as a user's message under the model's chat template.")
]


@generate_app.command()
def generate(
    model: Annotated[str, ModelOption],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: PromptFile = None,
    drafter: Drafter = None,
    adapter: Adapter = None,
    exit_layer: ExitLayer = None,
    gamma: Gamma = None,
    eta: Eta = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    max_context: MaxContext = None,
    ignore_eos: IgnoreEos = False,
    chat: Chat = False,
    system: Annotated[str | None, typer.Option(help="System message before the user's; with --chat only.")] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which text to draw at a temperature above 0; greedy has one only.")] = 0,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    json_output: Annotated[bool, JsonOption] = False,
) -> None:
    """Continue a prompt. The new text streams to stdout, a one-line summary goes to stderr.

    End-of-text tokens are all that generation_config.json decides; sampling is set by flags alone.
    """
    kangaroo = {"adapter": adapter, "exit_layer": exit_layer, "gamma": gamma, "eta": eta}
    if drafter == "plain":
        _refuse_unused(kangaroo)
    if system is not None and not chat:
        raise usage_error("--system", "it does nothing without --chat; add that or leave it out")
    text = _read_prompt(prompt, prompt_file)
    params = SamplingParams(max_new_tokens, temperature, seed, ignore_eos)

    from kangaroo.engine.scheduler import Limits
    from kangaroo.llm import LLM

    limits = Limits(max_context=max_context)
    llm = LLM.from_pretrained(
        model, _settings(drafter, kangaroo), dtype=dtype, weights=weights, device=device, limits=limits
    )
    token_ids = _encode(llm, text, chat=chat, system=system)
    if json_output:
        print(json.dumps(llm.generate(token_ids, params).to_dict()), flush=True)
        return
    completion = follow(llm.stream(token_ids, params), lambda token: print(token.text, end="", flush=True))
    print(flush=True)
    print(_summary(completion), file=sys.stderr)


def _refuse_unused(kangaroo: Mapping[str, object]) -> None:
    for name, value in kangaroo.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise usage_error(flag, "it does nothing with --drafter plain; leave out one of the two")


def _settings(drafter: str | None, kangaroo: Mapping[str, object]) -> str | KangarooSettings | None:
    """What LLM.from_pretrained takes as its drafter: a Kangaroo flag asks for Kangaroo."""
    if all(value is None for value in kangaroo.values()):
        return drafter
    from kangaroo.drafters.settings import KangarooSettings

    return KangarooSettings(**kangaroo)  # type: ignore[arg-type]


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt of the one flag that gives it."""
    if (prompt is None) == (prompt_file is None):
        message = "give only one of the two" if prompt is not None else "give one of the two"
        raise usage_error("--prompt / --prompt-file", message)
    text = prompt if prompt_file is None else _read_text(prompt_file)
    if not text:
        raise PromptError("the prompt is empty; give at least one character")
    return text


def _read_text(name: str) -> str:
    where = "stdin" if name == "-" else name
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise PromptError(f"cannot read the prompt from {where}: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        at = f"byte {error.start} ({content[error.start]:#04x})"
        raise PromptError(f"the prompt from {where} must be UTF-8, got {at}; convert the file") from error


def _encode(llm: LLM, text: str, *, chat: bool, system: str | None) -> list[int]:
    tokenizer = llm.model.tokenizer
    if not chat:
        return tokenizer.encode(text)
    messages = [] if system is None else [{"role": "system", "content": system}]
    return tokenizer.encode_chat([*messages, {"role": "user", "content": text}])


def _summary(completion: Completion) -> str:
    facts = [
        f"{completion.num_new_tokens} tokens ({completion.finish_reason})",
        f"{number(completion.tokens_per_s)} tokens/s",
        f"{number(completion.tokens_per_step, '{:.2f}')} tokens per step",
        f"drafter {completion.drafter}",
    ]
    return ", ".join(facts)

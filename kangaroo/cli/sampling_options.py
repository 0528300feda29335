"""The flags of SamplingParams, by the same names; what a flag does not say is left to SamplingParams itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from kangaroo.cli.shared import usage_error
from kangaroo.types import SamplingParams

DEFAULTS = SamplingParams()


def _option(name: str, text: str, *flags: str, panel: str, default: str | None = None) -> Any:
    """The flag of a field, which is None unless given."""
    shown = str(getattr(DEFAULTS, name)) if default is None else default
    return typer.Option(*flags, help=text, show_default=shown, rich_help_panel=panel)


SAMPLING, ENDING = "Sampling", "End of the text"
Recommended = Annotated[
    Literal["none", "checkpoint"],
    typer.Option(
        "--sampling-defaults",
        help="What holds for temperature, top-k, top-p, min-p and repetition penalty where no flag says: the defaults "
        "below, or what the checkpoint's generation_config.json recommends.",
        rich_help_panel=SAMPLING,
    ),
]
Temperature = Annotated[
    float | None, _option("temperature", "How freely to draw; 0 takes the likeliest token.", panel=SAMPLING)
]
TopK = Annotated[int | None, _option("top_k", "Draw from so many likeliest tokens; 0 for all.", panel=SAMPLING)]
TopP = Annotated[
    float | None, _option("top_p", "Draw from the likeliest tokens that hold this probability.", panel=SAMPLING)
]
MinP = Annotated[
    float | None,
    _option("min_p", "Draw from tokens with at least this share of the likeliest one's probability.", panel=SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    _option("repetition_penalty", "Above 1 makes tokens of prompt and text less likely.", panel=SAMPLING),
]
PresencePenalty = Annotated[
    float | None, _option("presence_penalty", "Taken off the logit of every token in the new text.", panel=SAMPLING)
]
FrequencyPenalty = Annotated[
    float | None,
    _option("frequency_penalty", "Taken off for each time a token is in the new text.", panel=SAMPLING),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=BIAS",
        help="Added to the logit of a token id; -inf forbids it. Repeatable.",
        show_default="none",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    _option(
        "seed",
        "Which text to draw; a greedy text is the same under all. The -n texts and the lines of --prompts derive "
        "theirs from it.",
        panel=SAMPLING,
        default="drawn; the JSON tells it",
    ),
]
NumTexts = Annotated[
    int | None, _option("n", "Texts for every prompt; several come when all are done.", "-n", panel=SAMPLING)
]
Acceptance = Annotated[
    Literal["coupling", "rejection", "block"] | None,
    _option(
        "acceptance",
        "How drafts are verified at a temperature above 0: coupling writes plain decoding's very text, the others "
        "another draw from the same distribution.",
        panel=SAMPLING,
    ),
]
Logprobs = Annotated[
    int | None,
    _option(
        "logprobs",
        "Report log-probabilities of every token and of so many likeliest ones, at most 20; in JSON only.",
        panel=SAMPLING,
        default="none",
    ),
]
LogprobsOf = Annotated[
    Literal["raw", "processed"] | None,
    _option("logprobs_of", "Whether they are before or after temperature, penalties and the like.", panel=SAMPLING),
]
MaxNewTokens = Annotated[int | None, _option("max_new_tokens", "Most tokens to generate.", panel=ENDING)]
MinNewTokens = Annotated[
    int | None, _option("min_new_tokens", "Tokens before which no stop or end-of-text token may come.", panel=ENDING)
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="End before this text. Repeatable.", metavar="TEXT", show_default="none", rich_help_panel=ENDING),
]
StopTokenIds = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token-id",
        metavar="ID",
        help="End at this token. Repeatable.",
        show_default="none",
        rich_help_panel=ENDING,
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos", help="Go on after an end-of-text token, which else stops the text.", rich_help_panel=ENDING
    ),
]


# Settings that greedy decoding does not read.
ONLY_SAMPLED = {"top_k", "top_p", "min_p", "acceptance"}


def given_sampling(flags: Mapping[str, Any], *, logit_bias: Sequence[str] | None) -> dict[str, Any]:
    """The fields that flags say; raises a usage error for flags that make no sense, SettingsError for bad values."""
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    if "logprobs_of" in given and "logprobs" not in given:
        raise usage_error("--logprobs-of", "it does nothing without --logprobs; add that or leave it out")
    if logit_bias:
        given["logit_bias"] = dict(map(_read_bias, logit_bias))
    SamplingParams(**given)
    return given


def _read_bias(word: str) -> tuple[int, float]:
    token, _, bias = word.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise usage_error("--logit-bias", f"must be ID=BIAS like 42=-1.5, got {word!r}") from None

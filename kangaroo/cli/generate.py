"""`kangaroo generate`: continue a prompt, or a file of them."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kangaroo.cli import drafter_options as drafting
from kangaroo.cli import sampling_options as sampling
from kangaroo.cli.batch import Batch, Results
from kangaroo.cli.prompt_lines import describe, read_lines, read_progress
from kangaroo.cli.shared import (
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
    from kangaroo.llm import LLM
    from kangaroo.types import Completion

generate_app = typer.Typer()

FILES = "Files of prompts"
PromptFile = Annotated[
    str | None, typer.Option(help="File with the text to continue, in UTF-8 and taken as it is; - reads stdin.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help='File of JSON lines: each with a "prompt", or "messages" of a chat; perhaps with an "id", and "params" '
        'of its own by the names of the flags, as {"prompt": "def ", "params": {"top_k": 5}}.',
        rich_help_panel=FILES,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        help="File for a JSON line per line of --prompts, in its order: line (its number), id, and the fields of "
        "--json, or the error of a line that was skipped. If it is there already, the run goes on behind it.",
        rich_help_panel=FILES,
    ),
]
BatchSize = Annotated[int, typer.Option(help="Most texts decoded together, of --prompts or -n.", rich_help_panel=FILES)]
MaxContext = Annotated[
    int | None,
    typer.Option(help="Most tokens prompt and new text may hold together.", show_default="the model's context length"),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Take a prompt as a user's message under the model's chat template.")
]


@generate_app.command()
def generate(
    model: Annotated[str, ModelOption],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: PromptFile = None,
    max_context: MaxContext = None,
    chat: Chat = False,
    system: Annotated[str | None, typer.Option(help="System message before the user's; with --chat only.")] = None,
    dtype: Annotated[Dtype | None, DtypeOption] = None,
    weights: Annotated[Weights | None, WeightsOption] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a numbered device like cuda:0.")] = "cpu",
    json_output: Annotated[bool, JsonOption] = False,
    prompts: Prompts = None,
    output: Output = None,
    batch_size: BatchSize = 8,
    sampling_defaults: sampling.Recommended = "none",
    temperature: sampling.Temperature = None,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    presence_penalty: sampling.PresencePenalty = None,
    frequency_penalty: sampling.FrequencyPenalty = None,
    logit_bias: sampling.LogitBias = None,
    seed: sampling.Seed = None,
    n: sampling.NumTexts = None,
    acceptance: sampling.Acceptance = None,
    logprobs: sampling.Logprobs = None,
    logprobs_of: sampling.LogprobsOf = None,
    max_new_tokens: sampling.MaxNewTokens = None,
    min_new_tokens: sampling.MinNewTokens = None,
    stop: sampling.Stop = None,
    stop_token_ids: sampling.StopTokenIds = None,
    ignore_eos: sampling.IgnoreEos = False,
    drafter: drafting.Drafter = None,
    adapter: drafting.Adapter = None,
    exit_layer: drafting.ExitLayer = None,
    gamma: drafting.Gamma = None,
    eta: drafting.Eta = None,
    alpha: drafting.Alpha = None,
    beta1: drafting.Beta1 = None,
    beta2: drafting.Beta2 = None,
    epsilon: drafting.Epsilon = None,
    initial_threshold: drafting.InitialThreshold = None,
    num_siblings: drafting.NumSiblings = None,
    max_nodes: drafting.MaxNodes = None,
    gate: drafting.Gate = None,
    sources: drafting.Sources = None,
    heads: drafting.Heads = None,
    num_heads: drafting.NumHeads = None,
    skip_layers: drafting.SkipLayers = None,
    draft_model: drafting.DraftModel = None,
    draft_dtype: drafting.DraftDtype = None,
    max_ngram: drafting.MaxNgram = None,
    min_ngram: drafting.MinNgram = None,
    num_tokens: drafting.NumTokens = None,
    references: drafting.References = None,
    datastore: drafting.Datastore = None,
    max_matches: drafting.MaxMatches = None,
) -> None:
    """Continue a prompt, or a file of them.

    The new text of --prompt streams to stdout, a one-line summary goes to stderr. --json prints the fields of the
    text instead, and with -n above 1 an object whose "completions" lists those of every text.

    With --prompts, a line that cannot be decoded is reported on stderr, told in --output and skipped; the exit status
    is then 1. --json prints the counts of the run.
    """
    given = sampling.given_sampling(
        {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "ignore_eos": ignore_eos,
         "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty,
         "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty, "n": n, "stop": stop,
         "stop_token_ids": stop_token_ids, "min_new_tokens": min_new_tokens, "logprobs": logprobs,
         "logprobs_of": logprobs_of, "acceptance": acceptance},
        logit_bias=logit_bias,
    )  # fmt: skip
    flags = {"gamma": gamma, "eta": eta, "alpha": alpha, "beta1": beta1, "beta2": beta2, "epsilon": epsilon,
             "initial_threshold": initial_threshold, "num_siblings": num_siblings, "max_nodes": max_nodes, "gate": gate,
             "sources": sources, "adapter": adapter, "exit_layer": exit_layer, "heads": heads, "num_heads": num_heads,
             "skip_layers": skip_layers, "draft_model": draft_model, "draft_dtype": draft_dtype,
             "max_ngram": max_ngram, "min_ngram": min_ngram, "num_tokens": num_tokens, "references": references,
             "datastore": datastore, "max_matches": max_matches}  # fmt: skip
    settings = drafting.drafter_settings(drafter, flags)
    if system is not None and not chat:
        raise usage_error("--system", "it does nothing without --chat; add that or leave it out")
    if sampling_defaults == "none" and prompts is None and not temperature:
        for name in sampling.ONLY_SAMPLED & given.keys():
            raise usage_error(f"--{name.replace('_', '-')}", "it does nothing at temperature 0; add --temperature")
    if logprobs is not None and not json_output and prompts is None:
        raise usage_error("--logprobs", "they are told in JSON only; add --json")

    text = _read_prompt(prompt, prompt_file, prompts=prompts, output=output)
    if prompts is not None and output is not None:
        # What the texts of the lines depend on. Both files come before the model, which takes its time to load.
        said = {"model": model, "dtype": dtype, "weights": weights, "max_context": max_context, "chat": chat,
                "system": system, "sampling_defaults": sampling_defaults, "params": given}  # fmt: skip
        lines = read_lines(prompts, said)
        results = Results(output, read_progress(output, lines))

    from kangaroo.engine.scheduler import Limits
    from kangaroo.llm import LLM

    num_together = batch_size if prompts is not None else min(batch_size, given.get("n", 1))
    limits = Limits(max_batch_size=num_together, max_context=max_context)
    llm = LLM.from_pretrained(model, settings, dtype=dtype, weights=weights, device=device, limits=limits)
    recommended = llm.model.sampling_defaults() if sampling_defaults == "checkpoint" else {}
    params = SamplingParams(**(recommended | given))
    encode = partial(_encode, llm, chat=chat, system=system)
    if prompts is None:
        _continue(llm, encode(text), params=params, json_output=json_output)
        return
    counts = results.write(Batch(llm, params, encode=encode, num_slots=batch_size), lines)
    if json_output:
        print(json.dumps(vars(counts)), flush=True)
    else:
        print(counts, file=sys.stderr)
    if counts.num_failed:
        raise typer.Exit(1)


def _continue(llm: LLM, token_ids: list[int], *, params: SamplingParams, json_output: bool) -> None:
    """Print the texts of one prompt: the only one as it comes, several when all are done."""
    if json_output or params.n > 1:
        answer = llm.generate(token_ids, params)
        completions = answer if isinstance(answer, list) else [answer]
        print(json.dumps(describe(completions)) if json_output else "\n".join(one.text for one in completions))
    else:
        completions = [follow(llm.stream(token_ids, params), lambda token: print(token.text, end="", flush=True))]
        print()
    sys.stdout.flush()
    if not json_output:
        for completion in completions:
            print(_summary(completion, params), file=sys.stderr)


def _read_prompt(prompt: str | None, prompt_file: str | None, *, prompts: Path | None, output: Path | None) -> str:
    """The prompt of the one flag that gives it; "" where --prompts gives a file of them."""
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts}
    num_given = sum(value is not None for value in sources.values())
    if num_given != 1:
        raise usage_error(" / ".join(sources), "give only one of them" if num_given else "give one of them")
    if (prompts is None) != (output is None):
        raise usage_error("--prompts / --output", "one does nothing without the other; give both or neither")
    if prompts is not None:
        return ""
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


def _summary(completion: Completion, params: SamplingParams) -> str:
    facts = [
        f"{completion.num_new_tokens} tokens ({completion.finish_reason})",
        f"{number(completion.tokens_per_s)} tokens/s",
        f"{number(completion.tokens_per_step, '{:.2f}')} tokens per step",
        *([f"seed {completion.seed}"] if params.temperature > 0 else []),
        f"drafter {completion.drafter}",
    ]
    return ", ".join(facts)

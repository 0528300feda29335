"""The front door: load a model with a drafter, generate, stream."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, overload

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kangaroo.drafters.adapter import ADAPTER, AdapterConfig
from kangaroo.drafters.auto import AutoDrafter
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.gate import GatedDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.settings import AutoSettings, GateSettings, KangarooSettings, Settings, find_settings
from kangaroo.engine.decoding import Decoding
from kangaroo.engine.engine import Engine
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import SettingsError
from kangaroo.model.checkpoint import LoadedModel, load_model
from kangaroo.model.text import TextStream
from kangaroo.sampling import derive_seed, draw_seed
from kangaroo.tuning import apply_tuning
from kangaroo.types import Completion, Request, SamplingParams, Token

# The file beside a model that shows a drafter's companion is there.
COMPANIONS = {
    "retrieval": "datastore/datastore.json",
    "kangaroo": "adapter/config.json",
    "medusa": "medusa/config.json",
    "layer_skip": "skip_layers.json",
    "draft_model": "draft_model/config.json",
}
# Their settings that name another.
COMPANION_SETTINGS = {"retrieval": "datastore", "kangaroo": "adapter", "medusa": "heads", "layer_skip": "skip_layers",
                      "draft_model": "model"}  # fmt: skip
# The drafters that only look things up.
FREE = ("prompt_lookup", "retrieval")
# One prompt as text or token ids, or several.
Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


class LLM:
    """A model ready to generate, with the drafter that makes it fast."""

    def __init__(
        self, model: LoadedModel, drafter: Drafter, *, limits: Limits | None = None, pace: Pace | None = None
    ) -> None:
        """limits: how many requests are decoded together, and how long their texts may be.

        pace: bounds drafts by what they are measured to bring; without one the drafter's own rule alone does. Plain
        decoding has nothing to bound.
        """
        pace = None if isinstance(drafter, PlainDrafter) else pace
        self.model = model
        self.drafter = drafter
        self.engine = Engine(model.target, drafter, limits=limits, pace=pace)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        drafter: str | Settings | None = None,
        *,
        dtype: str | None = None,
        weights: str | None = None,
        device: str = "cpu",
        limits: Limits | None = None,
    ) -> LLM:
        """Load a model and build its drafter, which drafts only where that is measured to pay.

        model, dtype, weights and device are load_model's, drafter is build_drafter's. Kangaroo drafts as it was
        tuned (kangaroo.tuning) for batches of the limits' size, or of 1 without limits, unless its settings say how.
        Raises a KangarooError for bad input.
        """
        loaded = load_model(model, dtype=dtype, weights=weights, device=device)
        batch_size = 1 if limits is None else limits.max_batch_size
        return cls(loaded, build_drafter(loaded, drafter, batch_size=batch_size), limits=limits, pace=Pace())

    @overload
    def generate(self, prompts: str | Sequence[int], params: SamplingParams | None = None) -> Completion: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]] | list[Sequence[int]], params: SamplingParams | None = None
    ) -> list[Completion]: ...

    def generate(self, prompts: Prompts, params: SamplingParams | None = None) -> Completion | list[Completion]:
        """Continue a prompt, given as text or as token ids, until it stops; or several, with a progress bar.

        One prompt gives one completion; a list of prompts, or one with params.n above 1, gives a list: n completions
        of the first prompt, then those of the second. An error in one of several requests ends that one alone: its
        completion says so. Raises PromptError, SettingsError or QueueFullError where a request cannot be taken.
        """
        params = params or SamplingParams()
        if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
            begun = self.submit(prompts, params)  # type: ignore[arg-type]
            completions = self._finish(begun, num_each=params.n)
            return completions[0] if params.n == 1 else completions
        begun = []
        try:
            for prompt in prompts:
                begun += self.submit(prompt, params)  # type: ignore[arg-type]
        except BaseException:
            self._abandon(begun)
            raise
        return self._finish(begun, num_each=params.n, show_progress=True)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Generator[Token, None, Completion]:
        """Continue a prompt token by token; the generator's return value is the Completion.

        The prompt is checked and prefilled by the call itself. Raises SettingsError where params ask for several texts.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise SettingsError(f"n must be 1 to stream one text, got {params.n}; use generate()")
        stream = self._stream(self.engine.submit(*self.prepare(prompt, params)))
        # Up to its first token; from here on closing it frees the slot, whether or not it was read.
        next(stream)
        return stream  # type: ignore[return-value]

    def default_params(self) -> SamplingParams:
        """The sampling settings that the checkpoint recommends; nothing uses them unless it is asked to."""
        return SamplingParams(**self.model.sampling_defaults())

    def prepare(self, prompt: str | Sequence[int], params: SamplingParams) -> tuple[Request, TextStream]:
        """What Engine.submit and AsyncEngine.submit take to continue a prompt: the request, and its text to come."""
        token_ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) and prompt else prompt
        request = Request(tuple(token_ids), params, self.model.eos_ids)  # type: ignore[arg-type]
        return request, TextStream(self.model.tokenizer, params.stop)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams) -> list[Decoding]:
        """Queue params.n texts of a prompt, each with a seed of its own; engine.step() decodes them."""
        seed = draw_seed() if params.seed is None else params.seed
        begun: list[Decoding] = []
        try:
            for index in range(params.n):
                own = replace(params, n=1, seed=derive_seed(seed, index))
                request, text = self.prepare(prompt, own)
                # A text is decoded as it comes only for what may end it.
                begun.append(self.engine.submit(request, text if own.stop else None))
        except BaseException:
            self._abandon(begun)
            raise
        return begun

    def completion(self, decoding: Decoding, *, index: int = 0) -> Completion:
        """The record of a request so far."""
        sequence, tokens = decoding.sequence, decoding.new_tokens
        # What a text stream holds was cut before the stop string.
        text = self.model.tokenizer.decode(tokens) if decoding.text is None else "".join(decoding.pieces)
        wants_logprobs = sequence is not None and decoding.request.params.logprobs is not None
        return Completion(
            text=text,
            token_ids=tuple(tokens),
            num_prompt_tokens=len(decoding.request.prompt_ids),
            finish_reason=decoding.finish_reason or "unfinished",
            prefill_time_s=decoding.prefill_time_s,
            decode_time_s=decoding.decode_time_s,
            num_steps=decoding.num_steps,
            num_drafted=decoding.num_drafted,
            num_accepted=decoding.num_accepted,
            drafter=self.drafter.name,
            model=self.model.name,
            seed=decoding.request.params.seed,
            index=index,
            logprobs=tuple(sequence.logprobs[: len(tokens)]) if sequence is not None and wants_logprobs else None,
            error=None if decoding.error is None else str(decoding.error),
            accepted_lengths=tuple(decoding.accepted_lengths),
            draft_time_s=decoding.draft_time_s,
            verify_time_s=decoding.verify_time_s,
        )

    def _stream(self, decoding: Decoding) -> Generator[Token | None, None, Completion]:
        """None once the prompt is read, then the tokens."""
        num_yielded = 0
        try:
            while not decoding.new_tokens and decoding.finish_reason is None:
                self.engine.step()
            yield None
            while True:
                # While the reader of this stream is elsewhere, other requests' steps go on with it.
                while tokens := decoding.emitted(num_yielded):
                    num_yielded += len(tokens)
                    yield from tokens
                if decoding.finish_reason is not None:
                    _raise_error(decoding)
                    return self.completion(decoding)
                self.engine.step()
        finally:
            self.engine.cancel(decoding)

    def _finish(self, begun: list[Decoding], *, num_each: int, show_progress: bool = False) -> list[Completion]:
        try:
            if show_progress:
                self._run_with_progress(begun)
            for decoding in begun:
                self.engine.run(decoding)
        finally:
            self._abandon(begun)
        if not show_progress:
            for decoding in begun:
                _raise_error(decoding)
        return [self.completion(decoding, index=index % num_each) for index, decoding in enumerate(begun)]

    def _run_with_progress(self, begun: list[Decoding]) -> None:
        columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("texts", total=len(begun))
            waiting = set(begun)
            while waiting:
                self.engine.step()
                ended = {decoding for decoding in waiting if decoding.finish_reason is not None}
                waiting -= ended
                progress.advance(task, len(ended))

    def _abandon(self, begun: Sequence[Decoding]) -> None:
        for decoding in begun:
            self.engine.cancel(decoding)


def _raise_error(decoding: Decoding) -> None:
    if decoding.error is not None:
        raise decoding.error


def build_drafter(model: LoadedModel, drafter: str | Settings | None, *, batch_size: int = 1) -> Drafter:
    """The drafter of this name or these settings for a model; raises SettingsError for an unknown name.

    What is left open is as resolve_settings has it.
    """
    settings = resolve_settings(model, drafter, batch_size=batch_size)
    if isinstance(settings, GateSettings):
        inner = build_drafter(model, settings.drafter, batch_size=batch_size)
        return GatedDrafter(model.target, inner, threshold=settings.threshold)
    if isinstance(settings, AutoSettings):
        free, others = (
            [
                build_drafter(model, settings.settings_of(one), batch_size=batch_size)
                for one in settings.sources
                if (one in FREE) is kind
            ]
            for kind in (True, False)
        )
        return AutoDrafter(free, others)
    built: Drafter = import_module(f"kangaroo.drafters.{settings.name}").build(model, settings)
    return built


def resolve_settings(model: LoadedModel, drafter: str | Settings | None, *, batch_size: int = 1) -> Settings:
    """The settings by which build_drafter drafts, with nothing left open that the model and this machine decide.

    None takes kangaroo where an adapter lies beside the model, else plain. A companion is named, auto's sources are
    listed, and Kangaroo is set as tuned for this batch size, else as its adapter recommends.
    Raises SettingsError for an unknown name, AdapterError for an adapter whose config is damaged.
    """
    if drafter is None:
        drafter = "kangaroo" if "kangaroo" in find_companions(model.folder) else "plain"
    settings: Any = find_settings(drafter)() if isinstance(drafter, str) else drafter
    if isinstance(settings, GateSettings):
        return replace(settings, drafter=resolve_settings(model, settings.drafter, batch_size=batch_size))
    if isinstance(settings, AutoSettings):
        return replace(settings, sources=_sources(model, settings))
    companion = COMPANION_SETTINGS.get(settings.name)
    if companion is not None and getattr(settings, companion) is None:
        path = model.folder / Path(COMPANIONS[settings.name]).parts[0]
        # What is not there stays open: whoever builds the drafter says so, and takes no folder for a hub id.
        if path.exists():
            settings = replace(settings, **{companion: str(path)})
    if isinstance(settings, KangarooSettings):
        settings = apply_tuning(settings, model, batch_size=batch_size)
        folder = Path(settings.adapter or model.adapter_folder).expanduser()
        if folder.is_dir():
            settings = ADAPTER.read_config(folder, AdapterConfig).complete(settings)
    return settings  # type: ignore[no-any-return]


def find_companions(folder: Path) -> list[str]:
    """The drafters whose companions lie beside a model, those first that cost nothing to ask or draft best."""
    return [name for name, file in COMPANIONS.items() if (folder / file).is_file()]


def _sources(model: LoadedModel, settings: AutoSettings) -> tuple[str, ...]:
    if "auto" in settings.sources:
        raise SettingsError("sources must be other drafters than auto itself")
    if settings.sources:
        return tuple(sorted(settings.sources, key=lambda source: source != "prompt_lookup"))
    found = find_companions(model.folder)
    has_datastore = settings.datastore is not None or "retrieval" in found
    return ("prompt_lookup", *(["retrieval"] if has_datastore else []),
            *[name for name in found if name != "retrieval"])  # fmt: skip

"""The target's own continuations of prompts, and what decoding them again takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import NamedTuple, TypeVar

from kangaroo.bench.comparison import take_turns
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.engine.engine import Engine
from kangaroo.engine.pace import Pace
from kangaroo.engine.scheduler import Limits
from kangaroo.errors import SettingsError
from kangaroo.model.transformer import Transformer
from kangaroo.types import Request, SamplingParams

Each = TypeVar("Each")


@dataclass(frozen=True)
class Text:
    """A prompt with the target's greedy continuation."""

    token_ids: tuple[int, ...]
    num_prompt: int

    @property
    def num_guessed(self) -> int:
        """Tokens that a draft may guess: the first new one is the prefill's."""
        return len(self.token_ids) - self.num_prompt - 1


def decode_texts(target: Transformer, prompts: Sequence[Sequence[int]], *, eos_ids: frozenset[int],
                 max_new_tokens: int) -> list[Text]:  # fmt: skip
    """The prompts with the target's greedy continuations, decoded plainly; those too short to guess at are left out.

    Raises SettingsError where that leaves none.
    """
    engine, params = Engine(target, PlainDrafter()), SamplingParams(max_new_tokens)
    texts = []
    for prompt in prompts:
        decoding = engine.submit(Request(tuple(prompt), params, eos_ids))
        engine.run(decoding)
        texts.append(Text((*prompt, *decoding.new_tokens), len(prompt)))
    found = [text for text in texts if text.num_guessed > 0]
    if not found:
        raise SettingsError("the model ends every text at once, so that there is nothing to draft; give other prompts")
    return found


@dataclass(frozen=True)
class Run:
    """What decoding texts took: tokens behind the first of each, and those of them in the time, prompts all read.

    draft_time_s and verify_time_s: summed over texts, as in Completion.
    """

    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int
    num_timed: int
    decode_time_s: float
    draft_time_s: float
    verify_time_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_timed / self.decode_time_s

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / self.num_steps

    @property
    def acceptance_rate(self) -> float:
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0


class Decoder:
    """Decodes texts again to their lengths."""

    def __init__(self, target: Transformer, drafter: Drafter, *, batch_size: int = 1, pace: Pace | None = None) -> None:
        self._engine = Engine(target, drafter, limits=Limits(max_batch_size=batch_size), pace=pace)

    def run(self, texts: Sequence[Text]) -> Run:
        """Decode them together, no more than the batch size."""
        engine, group = self._engine, []
        for text in texts:
            params = SamplingParams(text.num_guessed + 1, ignore_eos=True)
            group.append(engine.submit(Request(text.token_ids[: text.num_prompt], params)))
        while any(one.is_reading for one in group):
            engine.step()
        # Until the last prompt is read some decode beside it, which is not what is to be timed.
        num_before, started_s = sum(len(one.new_tokens) for one in group), time.perf_counter()
        while any(one.finish_reason is None for one in group):
            engine.step()
        decode_time_s = time.perf_counter() - started_s
        return Run(
            num_tokens=sum(len(one.new_tokens) - 1 for one in group),
            num_steps=sum(one.num_steps for one in group),
            num_drafted=sum(one.num_drafted for one in group),
            num_accepted=sum(one.num_accepted for one in group),
            num_timed=sum(len(one.new_tokens) for one in group) - num_before,
            decode_time_s=decode_time_s,
            draft_time_s=sum(one.draft_time_s for one in group),
            verify_time_s=sum(one.verify_time_s for one in group),
        )


class Raced(NamedTuple):
    """A drafter's run over all texts, all rounds together, and its speedup over plain decoding, their median."""

    run: Run
    speedup: float


def race(target: Transformer, drafters: Sequence[Drafter], *, texts: Sequence[Text], batch_size: int = 1,
         paces: Sequence[Pace | None] | None = None, num_rounds: int = 3) -> list[Raced]:  # fmt: skip
    """Decode the texts, batch_size at a time, with every drafter and plainly in turn; plain decoding comes first.

    paces: one for each drafter; without, each measures for itself.
    """
    every: list[tuple[Drafter, Pace | None]] = [(PlainDrafter(), None)]
    every += zip(drafters, paces or [None] * len(drafters), strict=True)
    decoders = [Decoder(target, one, batch_size=batch_size, pace=pace) for one, pace in every]
    groups = split_texts(texts, batch_size)
    for decoder in decoders:
        decoder.run(groups[0])
    rounds = []
    for number in range(num_rounds):
        runs: list[list[Run]] = [[] for _ in every]
        for index, group in enumerate(groups):
            for place in take_turns(range(len(every)), number + index):
                runs[place].append(decoders[place].run(group))
        rounds.append([add_runs(one) for one in runs])
    return [
        Raced(
            add_runs([runs[place] for runs in rounds]),
            median(runs[place].tokens_per_s / runs[0].tokens_per_s for runs in rounds),
        )
        for place in range(len(every))
    ]


def fill_batches(texts: Sequence[Each], batch_size: int) -> list[Each]:
    """Texts, or what belongs to each, repeated from the first on until whole batches are full."""
    return list(islice(cycle(texts), -(-len(texts) // batch_size) * batch_size))


def split_texts(texts: Sequence[Each], batch_size: int) -> list[Sequence[Each]]:
    """Texts, or what belongs to each, in the groups that are decoded together."""
    return [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]


def add_runs(runs: Sequence[Run]) -> Run:
    """What the runs took together."""
    return Run(**{name: sum(getattr(one, name) for one in runs) for name in vars(runs[0])})

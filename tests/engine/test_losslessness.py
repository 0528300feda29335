"""Whatever is drafted, by whom and how long: the text is the one plain decoding emits."""

import functools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kangaroo.drafters.adapter import Adapter
from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.stopping import ConfidenceThreshold, FixedLength, StoppingPolicy
from kangaroo.engine.engine import Decoding, Engine
from kangaroo.kernels import REFERENCE, cpu
from kangaroo.model import packed
from kangaroo.model.transformer import FullSequencePass, Transformer
from kangaroo.sampling import gumbel_noise
from kangaroo.types import Draft, Outcome, Request, SamplingParams
from tests.tiny import tame_transformer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
EXIT_LAYER = 2
NUM_NEW_TOKENS = 22
PROMPT = tuple(torch.randint(0, 258, (9,), generator=torch.Generator().manual_seed(0)).tolist())
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=NUM_NEW_TOKENS),
    "sampled": SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.8, seed=11),
}


@dataclass(frozen=True)
class Backend:
    """The reference kernels, or those of an instruction set with weights in some storage."""

    kernels: str = REFERENCE
    storage: str = "float32"


def native_backends() -> list[Backend]:
    """Every storage on the fastest instruction set, and float32 on the others."""
    *others, fastest = cpu.instruction_sets()
    every = [Backend(fastest, storage) for storage in ("float32", "bfloat16", "float16", "int8")]
    return every + [Backend(name) for name in others]


ON_REFERENCE = Backend()
ON_NATIVE = native_backends()

# Guesses behind the root as (token, parent node), parents first, given the text so far and the true text.
Guess = Callable[[int, SequenceOf[int]], list[tuple[int, int]]]


class ScriptedDrafter:
    """Guesses by a script that knows the true text: right, wrong or both."""

    name = "scripted"
    taps: tuple[int, ...] = ()

    def __init__(self, text: SequenceOf[int], guess: Guess) -> None:
        self._text = text
        self._guess = guess

    def begin(self, sequences: SequenceOf[Sequence], *, num_slots: int) -> None:
        pass

    def draft(self, batch: Batch) -> Draft:
        (sequence,) = batch.sequences
        guesses = self._guess(len(sequence.tokens), self._text)[: sequence.max_draft]
        tokens = [sequence.tokens[-1], *(token for token, _ in guesses)]
        parents = [-1, *(parent for _, parent in guesses)]
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        stacked = torch.tensor([tokens, parents, depths])[:, None]
        return Draft(tokens=stacked[0], parents=stacked[1], depths=stacked[2], num_nodes=(len(tokens),))

    def accept(self, sequences: SequenceOf[Sequence], outcome: Outcome) -> None:
        pass

    def end(self, sequences: SequenceOf[Sequence]) -> None:
        pass


def wrong(token: int) -> int:
    return (token + 1) % 258


def always_right(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    return [(token, depth) for depth, token in enumerate(text[length : length + 4])]


def always_wrong(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    return [(wrong(token), depth) for depth, token in enumerate(text[length : length + 4])]


def right_at_first(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    """Right for the first few tokens of five, as many as the text's length says."""
    num_right = (5, 0, 2, 3, 1)[length % 5]
    return [
        (token if depth < num_right else wrong(token), depth) for depth, token in enumerate(text[length : length + 5])
    ]


def branching(length: int, text: SequenceOf[int]) -> list[tuple[int, int]]:
    """Trees of uneven depth, the true branch in another place each time, or cut short, or missing."""
    one, two, three, *_ = [*text[length : length + 3], 0, 0, 0]
    trees = [
        # Three siblings, the true one in the middle, a false branch as deep as the true one.
        [(wrong(one), 0), (one, 0), (wrong(wrong(one)), 0), (two, 1), (two, 2), (wrong(three), 4), (three, 5)],
        # The true branch last, its nodes scattered; an equal pair of siblings below.
        [(wrong(one), 0), (two, 1), (one, 0), (three, 2), (two, 3), (two, 3), (three, 5), (wrong(three), 5)],
        # The true branch first and shallow, the false one deep.
        [(one, 0), (wrong(one), 0), (two, 2), (three, 3), (wrong(two), 1)],
        # No true branch at all.
        [(wrong(one), 0), (wrong(wrong(one)), 0), (two, 1), (three, 3)],
    ]
    return trees[length % 4]


@dataclass(frozen=True)
class Case:
    """A drafter and, for Kangaroo, its adapter and stopping policy."""

    name: str
    guess: Guess | None = None
    trained: bool = True
    stopping: StoppingPolicy | None = None

    def build(self, target: Transformer, text: SequenceOf[int]) -> Drafter:
        if self.guess is not None:
            return ScriptedDrafter(text, self.guess)
        if self.stopping is not None:
            return KangarooDrafter(target, adapter(target, trained=self.trained), stopping=self.stopping)
        return PlainDrafter()


CASES = [
    Case("plain"),
    Case("always_right", guess=always_right),
    Case("always_wrong", guess=always_wrong),
    Case("right_at_first", guess=right_at_first),
    Case("branching", guess=branching),
    Case("kangaroo-random-fixed3", trained=False, stopping=FixedLength(3)),
    Case("kangaroo-random-eta0.4", trained=False, stopping=ConfidenceThreshold(5, 0.4)),
    Case("kangaroo-fixed1", stopping=FixedLength(1)),
    Case("kangaroo-fixed6", stopping=FixedLength(6)),
    Case("kangaroo-eta0", stopping=ConfidenceThreshold(4, 0.0)),
    Case("kangaroo-eta0.4", stopping=ConfidenceThreshold(6, 0.4)),
    Case("kangaroo-eta1", stopping=ConfidenceThreshold(6, 1.0)),
]


@functools.cache
def tame_target(family: str) -> Transformer:
    return tame_transformer(family, EXIT_LAYER)


@functools.cache
def target_on(backend: Backend, family: str) -> Transformer:
    target = tame_target(family)
    return target if backend == ON_REFERENCE else packed.pack(target, backend.storage)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    """Whatever a test selects holds for it alone."""
    if cpu is None:
        yield
        return
    before = cpu.selected(), cpu.num_threads()
    yield
    cpu.select(before[0], num_threads=before[1])


def adapter(target: Transformer, *, trained: bool) -> Adapter:
    """The early exit itself, which an untrained adapter starts as, or noise; on the target's kernels."""
    made = Adapter.initialize(target, EXIT_LAYER)
    if not trained:
        shape = made.tensors["output"].shape
        made.tensors["output"] = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return made if target.backend == REFERENCE else made.pack(target)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Run:
    """Token ids of the whole text, and for every step how much was drafted and emitted."""

    tokens: tuple[int, ...]
    drafted: tuple[int, ...] = ()
    emitted: tuple[int, ...] = ()


def finish(engine: Engine, decoding: Decoding) -> Run:
    drafted, emitted = [], []
    while decoding.sequence.finish_reason is None:
        before = decoding.num_drafted
        emitted.append(engine.step(decoding))
        drafted.append(decoding.num_drafted - before)
    engine.end(decoding)
    return Run(tuple(decoding.sequence.tokens), tuple(drafted), tuple(emitted))


@functools.cache
def run(family: str, case: Case, mode: str, backend: Backend = ON_REFERENCE) -> Run:
    if backend != ON_REFERENCE:
        cpu.select(backend.kernels, num_threads=1)
    target = target_on(backend, family)
    text = () if case.name == "plain" else run(family, CASES[0], mode, backend).tokens
    engine = Engine(target, case.build(target, text))
    return finish(engine, engine.begin(Request(PROMPT, PARAMS[mode])))


def full_logits(target: Transformer, tokens: SequenceOf[int]) -> Tensor:
    """Logits [T, V] of a text by one pass without a cache."""
    attention = FullSequencePass(target.config, len(tokens), device=target.device)
    hidden, _ = target.forward(target.embed(torch.tensor([tokens])), (0, target.num_layers), attention=attention)
    return target.logits(hidden)[0]


def assert_same_text(target: Transformer, plain: Run, drafted: Run, params: SamplingParams) -> None:
    """Equal token ids, unless the first difference is a near-tie as DESIGN.md defines it."""
    if drafted.tokens == plain.tokens:
        return
    at = next(i for i, (a, b) in enumerate(zip(plain.tokens, drafted.tokens, strict=True)) if a != b)
    logits = full_logits(target, plain.tokens[:at])[-1]
    scores = logits
    if params.temperature:
        noise = gumbel_noise(torch.tensor([at - 1]), len(logits), seed=params.seed)[0]
        scores = logits / params.temperature + noise
    top = scores.topk(2)
    ulp = torch.finfo(torch.float32).eps * top.values.abs().max()
    margin = top.values[0] - top.values[1]
    assert margin < 8 * ulp * target.config.hidden_size**0.5, (
        f"token {at}: {plain.tokens[at]} by plain decoding, {drafted.tokens[at]} by drafting, margin {margin}"
    )


@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_emits_the_text_of_plain_decoding(family: str, case: Case, mode: str) -> None:
    drafted = run(family, case, mode)
    assert_same_text(tame_target(family), run(family, CASES[0], mode), drafted, PARAMS[mode])
    assert sum(drafted.emitted) == NUM_NEW_TOKENS - 1
    assert sum(drafted.drafted) > 0


@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ON_NATIVE, ids=lambda backend: f"{backend.kernels}-{backend.storage}")
def test_drafting_on_native_kernels_emits_the_very_text_of_plain_decoding(
    backend: Backend, family: str, case: Case, mode: str
) -> None:
    drafted = run(family, case, mode, backend)
    assert drafted.tokens == run(family, CASES[0], mode, backend).tokens
    assert sum(drafted.emitted) == NUM_NEW_TOKENS - 1
    assert sum(drafted.drafted) > 0


@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_texts_on_native_kernels_are_the_same_on_every_number_of_threads(case: Case, mode: str) -> None:
    backend = ON_NATIVE[0]
    expected, target = run("gemma2", case, mode, backend), target_on(backend, "gemma2")
    cpu.select(backend.kernels, num_threads=2)
    engine = Engine(target, case.build(target, expected.tokens))
    assert finish(engine, engine.begin(Request(PROMPT, PARAMS[mode]))) == expected


@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_decoding_emits_the_choice_of_a_full_pass_without_cache(family: str, mode: str) -> None:
    tokens, params = run(family, CASES[0], mode).tokens, PARAMS[mode]
    assert tokens[: len(PROMPT)] == PROMPT
    scores = full_logits(tame_target(family), tokens[:-1])[len(PROMPT) - 1 :]
    if params.temperature:
        positions = torch.arange(len(PROMPT) - 1, len(tokens) - 1)
        scores = scores / params.temperature + gumbel_noise(positions, scores.shape[-1], seed=params.seed)
    assert scores.argmax(-1).tolist() == list(tokens[len(PROMPT) :])


def kinds_of_acceptance(runs: list[Run]) -> set[str]:
    steps = [step for one in runs for step in zip(one.drafted, one.emitted, strict=True) if step[0] > 0]
    return {"none" if emitted == 1 else "all" if emitted == drafted + 1 else "part" for drafted, emitted in steps}


@pytest.mark.parametrize("mode", PARAMS)
@pytest.mark.parametrize(
    "backend", [ON_REFERENCE, *ON_NATIVE], ids=lambda backend: f"{backend.kernels}-{backend.storage}"
)
def test_cases_above_accept_nothing_a_part_and_all_of_a_draft(backend: Backend, mode: str) -> None:
    runs = {case.name: [run(family, case, mode, backend) for family in FAMILIES] for case in CASES}
    # A text that repeats one token would prove little.
    assert all(len(set(one.tokens[len(PROMPT) :])) >= 3 for one in runs["plain"])
    by_name = {name: kinds_of_acceptance(all_runs) for name, all_runs in runs.items()}
    assert by_name["plain"] == set()
    assert by_name["always_right"] == {"all"}
    assert by_name["always_wrong"] == {"none"}
    assert by_name["right_at_first"] == {"none", "part", "all"}
    assert {"none", "part"} <= by_name["branching"]
    assert by_name["kangaroo-fixed6"] >= {"none", "part"}
    assert set().union(*(kinds for name, kinds in by_name.items() if name.startswith("kangaroo"))) == {
        "none",
        "part",
        "all",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_target_that_never_accepts_emits_one_token_a_step(family: str) -> None:
    assert set(run(family, CASES[2], "greedy").emitted) == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_drafter_that_is_always_right_saves_four_steps_of_five(family: str) -> None:
    assert run(family, CASES[1], "sampled").emitted == (5, 5, 5, 5, 1)


def test_branches_are_accepted_from_scattered_nodes() -> None:
    emitted = {num_tokens for family in FAMILIES for num_tokens in run(family, CASES[4], "greedy").emitted}
    assert emitted == {1, 2, 3, 4}

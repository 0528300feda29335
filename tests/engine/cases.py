"""The drafters, targets and kernels that losslessness is tested with; a new drafter joins as a line of CASES."""

import functools
import itertools
import math
import random
import tempfile
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kangaroo.drafters.adapter import Adapter, Kind
from kangaroo.drafters.auto import AutoDrafter
from kangaroo.drafters.base import Drafter
from kangaroo.drafters.datastore import Datastore, build_datastore
from kangaroo.drafters.draft_model import DraftModelDrafter
from kangaroo.drafters.earnings import Earnings
from kangaroo.drafters.gate import GatedDrafter
from kangaroo.drafters.kangaroo import KangarooDrafter
from kangaroo.drafters.layer_skip import LayerSkipDrafter
from kangaroo.drafters.medusa import MedusaDrafter
from kangaroo.drafters.medusa_heads import MedusaHeads
from kangaroo.drafters.plain import PlainDrafter
from kangaroo.drafters.prompt_lookup import PromptLookupDrafter
from kangaroo.drafters.retrieval import RetrievalDrafter
from kangaroo.drafters.settings import PromptLookupSettings, RetrievalSettings
from kangaroo.drafters.stopping import (
    AdaptiveSettings,
    AdaptiveThreshold,
    ConfidenceThreshold,
    FixedLength,
    StoppingPolicy,
)
from kangaroo.drafters.tree import CHAIN, Branching
from kangaroo.kernels import REFERENCE, cpu
from kangaroo.model import packed
from kangaroo.model.skips import SkippedSublayers
from kangaroo.model.transformer import Transformer
from tests.engine import scripts
from tests.engine.scripts import Guess, ScriptedDrafter, Texts
from tests.heads import learn_heads
from tests.tiny import VOCAB_SIZE, noisy_adapter, tame_transformer

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
EXIT_LAYER = 2
# Noise that shows in what an adapter says, and leaves it right about as often.
LITTLE = 0.05
# How much of a draft a step may accept.
NONE, PART, ALL = "none", "part", "all"
ANY = frozenset({NONE, PART, ALL})

# Makes a drafter for a target, given the true texts of all requests to come.
Factory = Callable[[Transformer, Texts], Drafter]


@dataclass(frozen=True)
class Case:
    """A drafter.

    accepts: what must be seen to happen to its drafts in every parametrisation. always_drafts: whether it has something
    to say about every text.
    """

    name: str
    build: Factory
    accepts: frozenset[str] = ANY
    always_drafts: bool = True


def follow(guess: Guess) -> Factory:
    """Drafters that guess by a script."""
    return lambda target, texts: ScriptedDrafter(texts, guess)


def kangaroo(
    stopping: StoppingPolicy, branching: Branching = CHAIN, *, kind: Kind = "attention", noise: float = 0.0
) -> Factory:
    """Kangaroo with the early exit itself for an adapter, plus noise."""
    return lambda target, texts: KangarooDrafter(
        target, adapter(target, kind=kind, noise=noise), stopping=stopping, branching=branching
    )


def lookup(settings: PromptLookupSettings) -> Factory:
    return lambda target, texts: PromptLookupDrafter(settings)


def lookup_in_references(settings: PromptLookupSettings) -> Factory:
    """Prompt lookup in the true texts of all requests, too, with an error in every fourth token."""

    def build(target: Transformer, texts: Texts) -> Drafter:
        return PromptLookupDrafter(settings, blemished(texts))

    return build


def blemished(texts: Texts) -> list[list[int]]:
    """The true texts with an error in every fourth token."""
    return [
        [scripts.wrong(token) if at % 4 == 3 else token for at, token in enumerate(text)] for text in texts.values()
    ]


def draft_model(stopping: StoppingPolicy, branching: Branching = CHAIN, *, is_target: bool = False) -> Factory:
    """A draft model that is the target itself, or its first EXIT_LAYER layers."""
    return lambda target, texts: DraftModelDrafter(
        target if is_target else first_layers(target), VOCAB_SIZE, stopping=stopping, branching=branching
    )


def layer_skip(stopping: StoppingPolicy, branching: Branching = CHAIN) -> Factory:
    """The target without two of its tame sublayers, so that guesses are often right."""
    skips = SkippedSublayers(frozenset({2}), frozenset({1, 3}))
    return lambda target, texts: LayerSkipDrafter(target, skips, stopping=stopping, branching=branching)


def medusa(stopping: StoppingPolicy, branching: Branching = CHAIN) -> Factory:
    """Heads that learned greedy texts of their target."""
    return lambda target, texts: MedusaDrafter(target, heads(target), stopping=stopping, branching=branching)


def retrieval(settings: RetrievalSettings) -> Factory:
    """Retrieval from the true texts of all requests, with an error in every fourth token."""

    def build(target: Transformer, texts: Texts) -> Drafter:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "datastore"
            build_datastore([np.array(one) for one in blemished(texts)], folder, vocab_size=VOCAB_SIZE, fingerprint="x")
            return RetrievalDrafter(Datastore.open(folder, vocab_size=VOCAB_SIZE, fingerprint="x"), settings)

    return build


def gated(factory: Factory, threshold: float) -> Factory:
    return lambda target, texts: GatedDrafter(target, factory(target, texts), threshold=threshold)


class EveryOther(Earnings):
    """Has its source asked in every other step, however fast the machine is."""

    def __init__(self, is_due: bool) -> None:
        super().__init__()
        self.is_due = is_due

    def rate(self, costs: tuple[float, float]) -> float:
        self.is_due = not self.is_due
        return math.inf if self.is_due else 0.0

    def share(self) -> Earnings:
        return EveryOther(self.is_due)


def auto(free: SequenceOf[Factory], models: SequenceOf[Factory], takes_part: SequenceOf[bool] = (True,)) -> Factory:
    """takes_part: whether models take part in the texts to come, by turns."""

    def build(target: Transformer, texts: Texts) -> Drafter:
        drafter = AutoDrafter(
            [factory(target, texts) for factory in free], [factory(target, texts) for factory in models]
        )
        drafter._earnings = [EveryOther(index % 2 == 1) for index in range(len(models))]
        drafter._budget.lost_s = -math.inf
        for standing in drafter._standings:
            standing.take_part = functools.partial(next, itertools.cycle(takes_part))
        return drafter

    return build


FOUR_SIBLINGS = PromptLookupSettings(max_ngram=2, num_tokens=20, num_siblings=4)
ADAPTIVE = AdaptiveSettings(epsilon=0.0001, initial_threshold=0.01)
# Goes to and fro between the confidences of short matches.
LIVELY = AdaptiveSettings(alpha=0.5, epsilon=0.5, initial_threshold=0.6)
CASES = [
    Case("plain", lambda target, texts: PlainDrafter(), frozenset()),
    Case("always_right", follow(scripts.always_right), frozenset({ALL})),
    Case("always_wrong", follow(scripts.always_wrong), frozenset({NONE})),
    Case("right_at_first", follow(scripts.right_at_first)),
    Case("branching", follow(scripts.branching)),
    Case("wild", follow(scripts.wild)),
    Case("kangaroo-noisy", kangaroo(FixedLength(3), noise=0.3)),
    Case("kangaroo-noisy-tree", kangaroo(FixedLength(3), Branching(3, 9), noise=0.3)),
    Case("kangaroo-fixed1", kangaroo(FixedLength(1)), frozenset({NONE, ALL})),
    Case("kangaroo-fixed6", kangaroo(FixedLength(6))),
    Case("kangaroo-eta0.1", kangaroo(ConfidenceThreshold(6, 0.1))),
    Case("kangaroo-eta1", kangaroo(ConfidenceThreshold(6, 1.0)), frozenset({NONE, ALL})),
    Case("kangaroo-adaptive", kangaroo(AdaptiveThreshold(6, ADAPTIVE))),
    Case("kangaroo-tree-fixed4", kangaroo(FixedLength(4), Branching(3, 16))),
    Case("kangaroo-tree-eta0.1", kangaroo(ConfidenceThreshold(6, 0.1), Branching(2, 64))),
    Case("kangaroo-mlp", kangaroo(FixedLength(6), kind="mlp", noise=LITTLE)),
    Case("kangaroo-mlp-tree", kangaroo(ConfidenceThreshold(6, 0.1), Branching(2, 64), kind="mlp", noise=LITTLE)),
    Case("kangaroo-layer", kangaroo(ConfidenceThreshold(6, 0.1), kind="layer", noise=LITTLE)),
    Case("kangaroo-layer-tree", kangaroo(FixedLength(4), Branching(3, 16), kind="layer", noise=LITTLE)),
    Case("kangaroo-head", kangaroo(FixedLength(6), kind="head", noise=LITTLE)),
    Case("kangaroo-head-tree", kangaroo(ConfidenceThreshold(6, 0.1), Branching(2, 64), kind="head", noise=LITTLE)),
    # Random texts seldom repeat themselves.
    Case("lookup", lookup_in_references(PromptLookupSettings())),
    Case("lookup-tree", lookup_in_references(FOUR_SIBLINGS)),
    Case("lookup-adaptive", lookup_in_references(PromptLookupSettings(eta=LIVELY))),
    Case("draft_model-itself", draft_model(FixedLength(4), is_target=True), frozenset({ALL})),
    Case("draft_model-eta0.1", draft_model(ConfidenceThreshold(6, 0.1))),
    Case("draft_model-adaptive", draft_model(AdaptiveThreshold(6, ADAPTIVE))),
    Case("draft_model-tree", draft_model(ConfidenceThreshold(6, 0.1), Branching(3, 16))),
    Case("layer_skip", layer_skip(FixedLength(4))),
    Case("layer_skip-eta0.1", layer_skip(ConfidenceThreshold(6, 0.1))),
    Case("layer_skip-tree", layer_skip(FixedLength(4), Branching(3, 16))),
    Case("layer_skip-adaptive", layer_skip(AdaptiveThreshold(6, ADAPTIVE))),
    Case("medusa", medusa(FixedLength(3))),
    Case("medusa-tree", medusa(FixedLength(3), Branching(3, 12))),
    Case("medusa-eta0.1", medusa(ConfidenceThreshold(3, 0.1), Branching(3, 12))),
    Case("medusa-adaptive", medusa(AdaptiveThreshold(3, ADAPTIVE), Branching(3, 12))),
    Case("retrieval", retrieval(RetrievalSettings(min_ngram=1))),
    Case("retrieval-eta0.15", retrieval(RetrievalSettings(min_ngram=1, eta=0.15))),
    Case("gate", gated(kangaroo(FixedLength(4)), 0.1), always_drafts=False),
    Case("gate-tree", gated(kangaroo(FixedLength(4), Branching(3, 16)), 0.1), always_drafts=False),
    Case("gate-lookup", gated(lookup_in_references(PromptLookupSettings()), 0.1), always_drafts=False),
    Case("gate-medusa", gated(medusa(FixedLength(3), Branching(3, 12)), 0.1), always_drafts=False),
    Case("gate-auto", gated(auto([lookup_in_references(FOUR_SIBLINGS)], [kangaroo(FixedLength(4), Branching(3, 16))]),
                            0.1), always_drafts=False),
    Case("auto-kangaroo", auto([lookup_in_references(FOUR_SIBLINGS)], [kangaroo(FixedLength(4), Branching(3, 16))])),
    Case("auto-draft_model", auto([lookup(PromptLookupSettings())], [draft_model(FixedLength(4))])),
    Case("auto-layer_skip", auto([lookup_in_references(PromptLookupSettings())],
                                 [layer_skip(FixedLength(4), Branching(3, 16))])),
    Case("auto-sitting-out", auto([lookup(PromptLookupSettings())], [kangaroo(FixedLength(4))], (True, False))),
    Case("auto-four", auto([lookup_in_references(FOUR_SIBLINGS), retrieval(RetrievalSettings(min_ngram=1))],
                           [kangaroo(ConfidenceThreshold(6, 0.1)), medusa(FixedLength(3), Branching(3, 12))])),
]  # fmt: skip


def find_case(name: str) -> Case:
    (case,) = [one for one in CASES if one.name == name]
    return case


@dataclass(frozen=True)
class Backend:
    """The reference kernels, or those of an instruction set with weights in some storage."""

    kernels: str = REFERENCE
    storage: str = "float32"

    def __str__(self) -> str:
        return f"{self.kernels}-{self.storage}"


def native_backends() -> list[Backend]:
    """Every storage on the fastest instruction set, and float32 on the others."""
    *others, fastest = cpu.instruction_sets()
    every = [Backend(fastest, storage) for storage in ("float32", "bfloat16", "float16", "int8")]
    return every + [Backend(name) for name in others]


ON_REFERENCE = Backend()
ON_NATIVE = native_backends()


@functools.cache
def target_on(backend: Backend, family: str) -> Transformer:
    """The tame model of a family, whose early exit at EXIT_LAYER is right about half the time."""
    target = tame_transformer(family, EXIT_LAYER)
    return target if backend == ON_REFERENCE else packed.pack(target, backend.storage)


def prompt(num_tokens: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(VOCAB_SIZE) for _ in range(num_tokens))


def unpacked(target: Transformer) -> Transformer:
    """A target on the reference kernels."""
    return next(one for one in (target_on(ON_REFERENCE, name) for name in FAMILIES) if one.config == target.config)


@functools.cache
def first_layers(target: Transformer) -> Transformer:
    """The target's first EXIT_LAYER layers under its own head, on its kernels."""
    whole = unpacked(target)
    config = replace(whole.config, num_layers=EXIT_LAYER, windows=whole.config.windows[:EXIT_LAYER])
    made = Transformer(config, whole.layers[:EXIT_LAYER], embedding=whole.embedding, final_norm=whole.final_norm,
                       head=whole.head)  # fmt: skip
    return made if target.backend == REFERENCE else packed.pack(made, target.storage)  # type: ignore[attr-defined]


@functools.cache
def adapter(target: Transformer, *, kind: Kind, noise: float) -> Adapter:
    """The early exit itself, which an untrained adapter starts as, plus noise; on the target's kernels."""
    made = noisy_adapter(unpacked(target), EXIT_LAYER, kind=kind, noise=noise)
    return made if target.backend == REFERENCE else made.pack(target)  # type: ignore[arg-type]


@functools.cache
def heads(target: Transformer) -> MedusaHeads:
    """Learned heads on the target's kernels."""
    if target.backend != REFERENCE:
        return heads(unpacked(target)).pack(target)  # type: ignore[arg-type]
    prompts = [prompt(num_tokens, seed) for num_tokens in range(1, 41) for seed in range(4)]
    return learn_heads(target, 3, prompts=prompts, num_steps=60)

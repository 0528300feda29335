"""Rejection and block verification through the engine: whole texts, and drawn from the target's distribution."""

import itertools
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch

from kangaroo.drafters.base import Batch, Drafter, Sequence
from kangaroo.drafters.stopping import FixedLength
from kangaroo.drafters.tree import Branching
from kangaroo.engine.engine import Engine
from kangaroo.engine.scheduler import Limits
from kangaroo.kernels import cpu
from kangaroo.model.cache import CachedPass, Segment
from kangaroo.sampling import Prefix, distribution
from kangaroo.types import Draft, Request, SamplingParams
from tests.engine.cases import (
    FAMILIES,
    FOUR_SIBLINGS,
    ON_NATIVE,
    auto,
    draft_model,
    find_case,
    kangaroo,
    lookup_in_references,
    target_on,
)
from tests.engine.scenarios import decode_alone, prompt
from tests.engine.scripts import ScriptedDrafter
from tests.native import kernels_restored  # noqa: F401

BACKEND = ON_NATIVE[0]
CHAINS = [
    "plain",
    "right_at_first",
    "kangaroo-noisy",
    "kangaroo-fixed6",
    "kangaroo-tree-fixed4",
    "lookup-tree",
    "draft_model-tree",
    "auto-kangaroo",
]
TREES = ["branching", "wild"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("acceptance", "name"),
    [*itertools.product(["rejection", "block"], CHAINS), *(("rejection", tree) for tree in TREES)],
)
def test_batches_of_every_rule_emit_whole_texts_beside_coupled_ones(acceptance: str, name: str, family: str) -> None:
    requests = [
        Request(
            prompt(4 + 5 * seed, seed),
            SamplingParams(12 + seed, 0.9, seed, top_k=3, logprobs=1,
                           acceptance=acceptance if seed % 3 else "coupling"),
        )
        for seed in range(6)
    ]  # fmt: skip
    texts = {request: decode_alone(BACKEND, family, request) for request in requests}
    cpu.select(BACKEND.kernels, num_threads=1)
    target = target_on(BACKEND, family)
    drafter = find_case(name).build(target, {request: run.tokens for request, run in texts.items()})
    engine = Engine(target, drafter, limits=Limits(4))
    begun = [engine.submit(request) for request in requests]
    for one in begun:
        engine.run(one)
        assert one.error is None
        assert len(one.new_tokens) == one.request.params.max_new_tokens
        assert [entry.token_id for entry in one.sequence.logprobs] == one.new_tokens
        assert sum(one.accepted_lengths) == len(one.new_tokens) - 1
        if one.request.params.acceptance == "coupling" or name == "plain":
            assert one.sequence.tokens == list(texts[one.request].tokens)
    if name != "plain":
        assert sum(one.num_accepted for one in begun if one.request.params.acceptance == acceptance) > 0


NUM_TEXTS, NUM_NEW_TOKENS = 1500, 4
FEW = {"temperature": 1.5, "top_k": 3}


def exact_probabilities(family: str, prompt_ids: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """The probability of every possible text of NUM_NEW_TOKENS, by running each of their beginnings."""
    target, params = target_on(BACKEND, family), SamplingParams(NUM_NEW_TOKENS, seed=0, **FEW)
    texts = {(): 1.0}
    for _ in range(NUM_NEW_TOKENS):
        longer = {}
        for new, probability in texts.items():
            tokens = [*prompt_ids, *new]
            attention = CachedPass(target.new_cache(1, 64), [Segment(0, 0, len(tokens))])
            hidden, _ = target.forward(target.embed(torch.tensor(tokens)), (0, target.num_layers), attention=attention)
            prefix = Prefix(tokens, stop_ids=frozenset())
            chances = distribution(target.logits(hidden[-1:])[0], params, prefix=prefix)
            longer |= {(*new, int(token)): probability * chances[token] for token in chances.nonzero()[0]}
        texts = longer
    return texts


def statistic(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """Pearson's chi-square of the counts, the rare ones pooled, and its value that chance exceeds once in 30,000."""
    total = counts.total()
    common = [text for text, probability in expected.items() if probability * total >= 8]
    rare = 1 - sum(expected[text] for text in common)
    cells = [(counts[text], expected[text] * total) for text in common]
    cells.append((total - sum(count for count, _ in cells), rare * total))
    freedom = len(cells) - 1
    # Wilson and Hilferty 1931.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * (2 / (9 * freedom)) ** 0.5) ** 3
    return sum((count - mean) ** 2 / mean for count, mean in cells), bound


class PossibleDrafter(ScriptedDrafter):
    """Guesses tokens that may come, a few behind every node and from no distribution; texts: all possible ones."""

    def __init__(self, texts: Iterable[tuple[int, ...]], num_children: int) -> None:
        # The tokens that may follow every beginning of a text, the unlikely ones first.
        self._following: dict[tuple[int, ...], list[int]] = {}
        self._num_children = num_children
        for text in texts:
            for at, token in enumerate(text):
                following = self._following.setdefault(text[:at], [])
                if token not in following:
                    following.append(token)

    def _grow(self, sequence: Sequence) -> tuple[list[int], tuple[int, ...]]:
        tokens, parents, paths = [sequence.tokens[-1]], [-1], [tuple(sequence.tokens[-sequence.num_new_tokens :])]
        for node, path in enumerate(paths):
            if len(path) - sequence.num_new_tokens < sequence.max_draft:
                for token in self._following.get(path, [])[: self._num_children]:
                    tokens.append(token)
                    parents.append(node)
                    paths.append((*path, token))
        return tokens, tuple(parents)


# Those that guess with what they know of the target.
GUESSING = {
    "kangaroo": kangaroo(FixedLength(2)),
    "kangaroo-tree": kangaroo(FixedLength(2), Branching(2, 6)),
    "draft_model": draft_model(FixedLength(3)),
    "auto": auto([lookup_in_references(FOUR_SIBLINGS)], [kangaroo(FixedLength(2))]),
}


def count_drafted(monkeypatch: pytest.MonkeyPatch, drafters: list[Drafter]) -> dict[str, int]:
    """How many tokens each of these drafters guesses from now on, by name."""
    found = dict.fromkeys((one.name for one in drafters), 0)

    def watch(one: Drafter) -> None:
        original = one.draft

        def draft(batch: Batch) -> Draft:
            made = original(batch)
            found[one.name] += sum(count - 1 for count in made.num_nodes)
            return made

        monkeypatch.setattr(one, "draft", draft)

    for one in drafters:
        watch(one)
    return found


@pytest.mark.parametrize(
    ("acceptance", "name"),
    [
        *itertools.product(
            ["coupling", "rejection", "block"],
            ["kangaroo", "possible-chain", "draft_model", "auto"],
        ),
        *itertools.product(["coupling", "rejection"], ["kangaroo-tree"]),
        ("rejection", "possible-tree"),
    ],
)
def test_texts_are_drawn_from_the_distribution_of_the_target(
    acceptance: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu.select(BACKEND.kernels, num_threads=1)
    # Who drafts must not depend on how busy the machine is.
    clock = itertools.count(0, 1e-3)
    monkeypatch.setattr("kangaroo.drafters.auto.time", SimpleNamespace(perf_counter=clock.__next__))
    family, prompt_ids = "llama", prompt(6, 2)
    expected = exact_probabilities(family, prompt_ids)
    assert sum(expected.values()) == pytest.approx(1)
    target = target_on(BACKEND, family)
    if name in GUESSING:
        # What to look up are texts that may come.
        texts = {Request((), SamplingParams(seed=seed)): [*prompt_ids, *text] for seed, text in enumerate(expected)}
        drafter = GUESSING[name](target, texts)
        num_drafted = count_drafted(monkeypatch, getattr(drafter, "_sources", [drafter]))
    else:
        num_drafted = {}
        drafter = PossibleDrafter(sorted(expected, key=expected.get), 2 if name == "possible-tree" else 1)
    requests = [
        Request(prompt_ids, SamplingParams(NUM_NEW_TOKENS, seed=seed, acceptance=acceptance, **FEW))
        for seed in range(NUM_TEXTS)
    ]
    engine = Engine(target, drafter, limits=Limits(16))
    begun = [engine.submit(request) for request in requests]
    for one in begun:
        engine.run(one)
    lengths = {length for one in begun for length in one.accepted_lengths}
    assert {1, 2, 3} <= lengths
    assert all(num_drafted.values()), num_drafted
    counts = Counter(tuple(one.new_tokens) for one in begun)
    assert counts.keys() <= expected.keys()
    found, bound = statistic(counts, expected)
    assert found < bound
